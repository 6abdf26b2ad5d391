"""A recipe of the user's -> the point of a parameter space that means the same: the inverse of `writing`.

Read from the plan, tensor by tensor, so it does not matter how the recipe says it: slices, filters, gradients, steps,
settings at the top. The seed of random masks, dtypes and the order of the sources are the study's own affair.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from optuna.distributions import FloatDistribution

from paretomerge.checkpoint.reference import canonical_name
from paretomerge.errors import ConfigError
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.plan.plan import Plan, TensorJob, Weights
from paretomerge.merging.plan.steps import RecipeStep
from paretomerge.recipe import Recipe
from paretomerge.space.weights.encode import PLAIN
from paretomerge.space.weights.layers import group_of
from paretomerge.space.weights.layout import ParameterLayout
from paretomerge.space.weights.method_parameters import parameter_of

if TYPE_CHECKING:
    from paretomerge.space.weights.space import WeightSearchSpace

AVERAGE = "linear"
"""The method that says the same as task arithmetic."""

_SAME = 1e-6  # values nearer than this are one value
_DIGITS = 12  # of values that are solved for


@dataclass(frozen=True)
class _Tensor:
    """What a recipe says of one tensor: method, settings of each source by its name in the space, of the whole merge."""

    method: str
    method_parameters: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]


def point_of(
    space: "WeightSearchSpace", recipe: Recipe, opened: Mapping[str, Weights]
) -> dict[str, Any]:
    """The parameters whose recipe is `recipe`. ConfigError: which part of it is outside the space.

    opened: base and sources, by the space's paths.
    """
    if recipe.tokenizer or recipe.tokenizer_source or recipe.chat_template:
        raise ConfigError(
            "expected the base's tokenizer and chat template, got `tokenizer`, `tokenizer_source` or `chat_template`"
        )
    spelt = {canonical_name(path): path for path in (space.base, *space.sources.values())}
    ours = recipe.rename_models(lambda model: spelt.get(canonical_name(model), model))
    if ours.base_model != space.base and not (
        ours.base_model is None and ours.merge_method == AVERAGE
    ):
        raise ConfigError(f"base_model: expected {space.base}, got {recipe.base_model or 'none'}")
    if strange := [model for model in ours.source_models if model not in spelt.values()]:
        raise ConfigError(f"expected models of the study, got {strange[0]}")
    return _Reading(space, dict(_tensors(space, make_plan(ours, opened)))).point()


@dataclass(frozen=True)
class _Reading:
    """tensors: name -> what the recipe says of it."""

    space: "WeightSearchSpace"
    tensors: Mapping[str, _Tensor]

    def point(self) -> dict[str, Any]:
        """Parameters that do not count take the values that the known starts have."""
        space = self.space
        if all(
            parameters.get("weight") == 0
            for tensor in self.tensors.values()
            for parameters in tensor.method_parameters.values()
        ):
            if not (space.subset or space.weight.bounds[0] <= 0 <= space.weight.bounds[1]):
                raise ConfigError(
                    f"weight: expected {space.weight.bounds[0]:g} to {space.weight.bounds[1]:g}, got 0 everywhere"
                )
            return space.point(space.methods[0], dict.fromkeys(space.sources, 0.0))
        found: dict[str, Any] = {}
        for group, name in enumerate(space.per_method("method")):
            found[name] = self._method(group)
        for parameter in space.own_parameters:
            for group, name in enumerate(space.per_method(parameter)):
                found[name] = self._knob(parameter, group)
        for source in space.sources:
            found[f"use/{source}"] = source in self.used or not space.subset
            for split in space.splits.values():
                found |= self._numbers(split, source)
        start = space.point(space.methods[0], dict.fromkeys(space.sources, 1.0))
        return self._checked(
            {name: start[name] if found.get(name) is None else found[name] for name in start}
        )

    @cached_property
    def used(self) -> tuple[str, ...]:
        """Sources that are somewhere in the recipe."""
        return tuple(
            source
            for source in self.space.sources
            if any(source in tensor.method_parameters for tensor in self.tensors.values())
        )

    def _method(self, group: int) -> str:
        found = {tensor.method for _, tensor in self._in(group)}
        if len(found) > 1:
            raise ConfigError(
                f"merge_method: expected one in each of the space's groups of layers, got {' and '.join(sorted(found))}"
            )
        (method,) = found
        stand_in = next(
            (m for m in self.space.methods if METHODS[m].models[0] > len(self.used)), None
        )
        if method not in self.space.methods and not (method == PLAIN and stand_in):
            got = f"{method}, which {AVERAGE} says too" if method == PLAIN else method
            raise ConfigError(
                f"merge_method: expected one of {', '.join(self.space.methods)}, got {got}"
            )
        return method if method in self.space.methods else str(stand_in)

    def _knob(self, parameter: str, group: int) -> float | None:
        values = {}
        for name, tensor in self._in(group):
            for own in (*tensor.method_parameters.values(), tensor.options):
                if parameter == "epsilon" and "epsilon" in own and 0 < own["density"] < 1:
                    values[name] = round(
                        own["epsilon"] / min(own["density"], 1 - own["density"]), _DIGITS
                    )
                elif parameter != "epsilon" and parameter in own:
                    values[name] = own[parameter]
        value = _one(values, parameter)
        low, high = self.space.bounds(parameter)
        if value is not None and low == high and abs(value - low) > _SAME:
            raise ConfigError(f"{parameter}: expected {low:g}, as in the space, got {value:g}")
        return value

    def _numbers(self, split: ParameterLayout, source: str) -> dict[str, Any]:
        """Weights or densities of one source, where the methods read them."""
        names = split.names(source)
        if split.dial.smooth:
            return self._controls(split, source)
        values: dict[str, dict[str, float]] = defaultdict(dict)
        for tensor, value in self._said(split, source):
            for cell in split.shares[tensor]:
                values[names[cell]][tensor] = value
        return {name: _one(of, name) for name, of in values.items()}

    def _controls(self, split: ParameterLayout, source: str) -> dict[str, Any]:
        """Control points from the values of the layers, by least squares; exact where a control point is at a layer."""
        names = split.names(source)
        found: dict[str, Any] = {}
        for role in split.roles or ("",):
            said = [
                (tensor, value)
                for tensor, value in self._said(split, source)
                if split.role(tensor) == role
            ]
            cells = [cell for cell in split.cells if cell[1] == role]
            if not said:
                continue
            shares = np.array(
                [[split.shares[tensor].get(cell, 0.0) for cell in cells] for tensor, _ in said]
            )
            values = np.array([value for _, value in said])
            solved = np.linalg.lstsq(shares, values, rcond=None)[0]
            off = np.abs(shares @ solved - values)
            if off.max() > _SAME:
                raise ConfigError(
                    f"{said[int(off.argmax())][0]}: {split.kind} of {source}: expected a value on the space's lines, got another"
                )
            for column, cell in enumerate(cells):
                whole = np.flatnonzero(shares[:, column] == 1)
                found[names[cell]] = (
                    float(values[whole[0]]) if len(whole) else round(float(solved[column]), _DIGITS)
                )
        return found

    def _said(self, split: ParameterLayout, source: str) -> Iterator[tuple[str, float]]:
        """(tensor, the source's weight or density there). A source that is not listed has weight 0."""
        for name, tensor in self.tensors.items():
            if parameter_of(split.kind, tensor.method) is None:
                continue
            if source in tensor.method_parameters:
                scale = tensor.options.get("lambda", 1.0) if split.kind == "weight" else 1.0
                yield name, tensor.method_parameters[source][split.kind] * scale
            elif split.kind == "weight" and not (self.space.subset and source not in self.used):
                yield name, 0.0

    def _in(self, group: int) -> Iterator[tuple[str, _Tensor]]:
        """Tensors of a group of layers with a method of its own."""
        last = len(self.space.method_starts) - 1
        for name, tensor in self.tensors.items():
            layer = self.space.architecture.layer(name)
            ahead = layer is None and self.space.architecture.is_embedding(name)
            if group == (
                0 if ahead else last if layer is None else group_of(self.space.method_starts, layer)
            ):
                yield name, tensor

    def _checked(self, point: dict[str, Any]) -> dict[str, Any]:
        """The point, inside the bounds."""
        for name, distribution in self.space.distributions.items():
            if not isinstance(distribution, FloatDistribution):
                continue
            low, high = distribution.low, distribution.high
            if not low - _SAME <= point[name] <= high + _SAME:
                raise ConfigError(
                    f"{name}: expected {low:g} to {high:g}, the space's bounds, got {point[name]:g}"
                )
            point[name] = min(max(point[name], low), high)
        return point


def _tensors(space: "WeightSearchSpace", plan: Plan) -> Iterator[tuple[str, _Tensor]]:
    """What the plan says of every tensor that is merged, seen through steps."""
    names = {path: source for source, path in space.sources.items()}
    known = set(space.architecture.names)
    steps = {
        name: {job.name: job for job in w.plan.jobs}
        for name, w in plan.weights.items()
        if isinstance(w, RecipeStep)
    }
    if len(plan.route) != space.architecture.depth:
        raise ConfigError(
            f"expected the base's {space.architecture.depth} layers, got {len(plan.route)}"
        )
    for job in plan.jobs:
        method, meant = plan.method.name, job
        if (
            method == "passthrough"
            and job.sources[0][0] in steps
            and job.parameters
            and job.parameters[0]["scale"] == 1
        ):
            model, tensor = job.sources[0]
            step = plan.weights[model]
            assert isinstance(step, RecipeStep)
            method, meant = step.plan.method.name, steps[model][tensor]
        if meant.copy and meant.dtype in ("float64", "float32", "float16", "bfloat16"):
            raise ConfigError(f"{job.name}: expected it to be merged, got a copy")
        if not meant.copy:
            yield job.name, _tensor(job, meant, method, names, known)


def _tensor(
    job: TensorJob, meant: TensorJob, method: str, names: Mapping[str, str], known: set[str]
) -> _Tensor:
    if (
        job.name not in known
        or any(tensor != job.name for _, tensor in meant.sources)
        or meant.name != job.name
    ):
        raise ConfigError(
            f"{job.name}: expected layers of the sources in their own places, got {meant.sources[0][1]}"
        )
    models = [model for model, _ in meant.sources]
    if method == AVERAGE:
        return _averaged(job, meant, names)
    if METHODS[method].base != "required" or any(model not in names for model in models):
        raise ConfigError(
            f"merge_method: expected one on deltas of the study's models, got {method} of {', '.join(models)}"
        )
    if len(set(models)) < len(models):
        raise ConfigError(f"{job.name}: expected each source once, got {', '.join(models)}")
    options = meant.options or {}
    fixed = {
        parameter.name: parameter.default
        for parameter in METHODS[method].parameters
        if parameter.name in ("rescale", "k")
    }
    for option, value in (fixed | {"normalize": False}).items():
        if options.get(option, value) != value:
            raise ConfigError(
                f"{option}: expected {value}, as everywhere in the space, got {options[option]}"
            )
    return _Tensor(
        method,
        {
            names[model]: parameters
            for model, parameters in zip(models, meant.parameters, strict=True)
        },
        options,
    )


def _averaged(job: TensorJob, meant: TensorJob, names: Mapping[str, str]) -> _Tensor:
    """sum w_i theta_i with weights of sum 1 is theta_0 + sum w_i tau_i, and the base's own weight means nothing."""
    total = sum(cast(float, parameters["weight"]) for parameters in meant.parameters)
    if not (meant.options or {})["normalize"] and abs(total - 1) > _SAME:
        raise ConfigError(f"{job.name}: {AVERAGE}: expected weights with a sum of 1, got {total:g}")
    weights: dict[str, float] = defaultdict(float)
    for (model, _), parameters in zip(meant.sources, meant.parameters, strict=True):
        if model in names:
            weights[names[model]] += cast(float, parameters["weight"]) / total
    return _Tensor(PLAIN, {source: {"weight": weight} for source, weight in weights.items()}, {})


def _one(values: Mapping[str, float], what: str) -> float | None:
    """The one value of several tensors, None without any."""
    if not values:
        return None
    (first, value), *_ = values.items()
    for tensor, other in values.items():
        if abs(other - value) > _SAME:
            raise ConfigError(
                f"{what}: expected one value where the space has one, got {value:g} in {first} and {other:g} in {tensor}"
            )
    return value
