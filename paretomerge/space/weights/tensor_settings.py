"""What a recipe states for each tensor, in the terms of a weight space: method, sources, settings.

Settings are taken from the recipe's plan, so it does not matter how the recipe states them:
slices, filters, gradients, named steps, or parameters of the whole merge.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretomerge.errors import ConfigError
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.plan import Plan, TensorJob, TensorRef
from paretomerge.merging.plan.steps import RecipeStep
from paretomerge.space.weights.parameters import TASK_ARITHMETIC, ParameterSpace
from paretomerge.types import Params

AVERAGE = "linear"
"""The averaging method. With weights that sum to 1 it equals task arithmetic."""

WEIGHT_TOLERANCE = 1e-6
"""Weights and densities that differ by less are the same."""

_DECODED_TOLERANCE = 1e-5
"""Settings that differ by less after decoding are the same: several tolerances add up there."""

_FLOATS = ("float64", "float32", "float16", "bfloat16")

_FIXED_OPTIONS = ("rescale", "k", "eps", "normalize_fisher")
"""Parameters of methods that a weight space leaves at their defaults."""


@dataclass(frozen=True)
class TensorSettings:
    """What a recipe states for one tensor.

    Attributes:
        method: Merge method.
        by_source: Source -> its parameters, such as weight and density. Sources that are not
            listed are missing.
        options: Parameters of the whole merge.
    """

    method: str
    by_source: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]

    @property
    def is_base(self) -> bool:
        """Whether all weights are 0, so that the merged tensor is that of the base."""
        weights = [parameters.get("weight") for parameters in self.by_source.values()]
        return all(weight == 0 for weight in weights)


def tensor_settings(space: ParameterSpace, plan: Plan) -> dict[str, TensorSettings]:
    """Return what a planned recipe states for every tensor that it merges.

    Args:
        space: The parameters' names, groups and bounds.
        plan: Plan of a recipe whose models have the paths that the space uses.

    Returns:
        Tensor -> settings, in the order of the plan. Tensors of integers, which are copied, are
        left out.

    Raises:
        ConfigError: The recipe does something that no point of a weight space does.
    """
    depth = space.architecture.depth
    if len(plan.route) != depth:
        layers = len(plan.route)
        raise ConfigError(f"expected the base's {depth} layers, got {layers}")
    source_names = {}
    for source, path in space.sources.items():
        source_names[path] = source
    tensor_names = set(space.architecture.names)
    step_merges = _step_merges(plan)
    settings = {}
    for job in plan.jobs:
        name = job.name
        merge = _Merge(plan.method.name, job)
        if merge.method == "passthrough" and _is_unscaled(job):
            # Seen through: the tensor is what the step makes of it.
            merge = step_merges.get(job.sources[0], merge)
        if merge.job.copy:
            # Tensors of integers (position ids) cannot be merged, so a copy is what is expected.
            if merge.job.dtype in _FLOATS:
                raise ConfigError(f"{name}: expected it to be merged, got a copy")
            continue
        _check_place(name, merge.job, tensor_names)
        if merge.method == AVERAGE:
            settings[name] = _average_settings(merge, source_names)
        else:
            settings[name] = _delta_settings(merge, source_names)
    return settings


def settings_difference(stated: TensorSettings, decoded: TensorSettings) -> str | None:
    """Return how two settings of one tensor differ in meaning, None where they do not.

    Args:
        stated: What a recipe states.
        decoded: What the recipe of the decoded parameters states.

    Returns:
        The first difference, for a message.
    """
    if stated.is_base and decoded.is_base:
        return None
    if stated.method != decoded.method:
        return f"{stated.method} (with these parameters it is {decoded.method})"
    for source in sorted({*stated.by_source, *decoded.by_source}):
        before = _effective_settings(stated, source)
        after = _effective_settings(decoded, source)
        if before is None and after is None:
            continue
        if before is None or after is None or before.keys() != after.keys():
            return f"{stated.method} with and without {source} are different merges"
        for name, value in before.items():
            if abs(value - after[name]) > _DECODED_TOLERANCE:
                return f"{name} of {source} is {value:g} (with these parameters {after[name]:g})"
    for name in stated.options.keys() - {"lambda"}:
        if stated.options[name] != decoded.options[name]:
            return f"{name} is {stated.options[name]} (in the space {decoded.options[name]})"
    return None


def _effective_settings(tensor: TensorSettings, source: str) -> dict[str, float] | None:
    """The settings of a source that change the merge: none where it adds nothing.

    None for a source that is not listed, under a method where that is more than adding nothing.
    """
    method = METHODS[tensor.method]
    if source not in tensor.by_source:
        return None if method.zero_weight_counts else {}
    settings = dict(tensor.by_source[source])
    if "weight" in settings:
        settings["weight"] *= tensor.options.get("lambda", 1.0)
        if settings["weight"] == 0 and not method.zero_weight_counts:
            return {}
    density = settings.get("density", 1.0)
    if not 0 < density < 1:
        # All entries are kept, or none: there is nothing to spread the probabilities over.
        settings.pop("epsilon", None)
    return settings


@dataclass(frozen=True)
class _Merge:
    """How a tensor is merged, by the recipe or by one of its steps."""

    method: str
    job: TensorJob


def _step_merges(plan: Plan) -> dict[TensorRef, _Merge]:
    """(step, tensor) -> how the step merges the tensor."""
    merges = {}
    for step, weights in plan.weights.items():
        if not isinstance(weights, RecipeStep):
            continue
        method = weights.plan.method.name
        for job in weights.plan.jobs:
            merges[TensorRef(step, job.name)] = _Merge(method, job)
    return merges


def _is_unscaled(job: TensorJob) -> bool:
    """Whether a job of `passthrough` takes its one tensor as it is."""
    if not job.parameters:
        return False
    (parameters,) = job.parameters
    return bool(parameters["scale"] == 1)


def _check_place(name: str, job: TensorJob, tensor_names: set[str]) -> None:
    """Check that a tensor of the base is made of the sources' tensors of that name."""
    read = [tensor for _, tensor in job.sources]
    in_place = {job.name, *read} == {name}
    if not in_place or name not in tensor_names:
        raise ConfigError(
            f"{name}: expected layers of the sources in their own places, got {read[0]}"
        )


def _delta_settings(
    merge: _Merge,
    source_names: Mapping[str, str],
) -> TensorSettings:
    """Settings of a method that merges deltas to the base."""
    job = merge.job
    models = [model for model, _ in job.sources]
    listed = ", ".join(models)
    unknown = set(models) - set(source_names)
    if unknown or METHODS[merge.method].base != "required":
        raise ConfigError(
            "merge_method: expected one on deltas of the study's models, "
            f"got {merge.method} of {listed}"
        )
    # Each listing of a source has its own mask, which one weight and density cannot state.
    if len(set(models)) < len(models):
        raise ConfigError(f"{job.name}: expected each source once, got {listed}")
    options = job.options or {}
    _check_options(merge.method, options)
    by_source = {}
    for model, parameters in zip(models, job.parameters, strict=True):
        source = source_names[model]
        by_source[source] = parameters
    return TensorSettings(
        method=merge.method,
        by_source=by_source,
        options=options,
    )


def _check_options(method: str, options: Mapping[str, object]) -> None:
    """Check the options that have one value everywhere in the space."""
    required: dict[str, object] = {}
    for parameter in METHODS[method].parameters:
        if parameter.name in _FIXED_OPTIONS:
            required[parameter.name] = parameter.default
    # `lambda` becomes a factor of the weights. A negative one would turn their signs, and methods
    # that elect a sign take + where the weighted deltas cancel.
    scale = options.get("lambda", 1.0)
    assert isinstance(scale, int | float)
    if scale < 0 and method != TASK_ARITHMETIC:
        raise ConfigError(f"lambda: expected 0 or more with {method}, got {scale:g}")
    if not METHODS[method].scales_with_lambda:
        required["lambda"] = 1.0
    # Weights are free to be large, so normalising them would lose their scale.
    required["normalize"] = False
    for option, value in required.items():
        stated = options.get(option, value)
        if stated != value:
            raise ConfigError(
                f"{option}: expected {value}, as everywhere in the space, got {stated}"
            )


def _average_settings(
    merge: _Merge,
    source_names: Mapping[str, str],
) -> TensorSettings:
    """Settings of the task arithmetic that equals a weighted average.

    With weights of sum 1, sum w_i theta_i = theta_0 + sum w_i (theta_i - theta_0): the weight of
    the base adds nothing.
    """
    job = merge.job
    total = sum(_weight(parameters) for parameters in job.parameters)
    options = job.options or {}
    sums_to_1 = abs(total - 1) <= WEIGHT_TOLERANCE
    if not sums_to_1 and not options["normalize"]:
        raise ConfigError(
            f"{job.name}: {AVERAGE}: expected weights with a sum of 1, got {total:g}"
        )
    # An average can list a model twice.
    weights: dict[str, float] = defaultdict(float)
    sources = zip(job.sources, job.parameters, strict=True)
    for (model, _), parameters in sources:
        if model in source_names:
            source = source_names[model]
            weights[source] += _weight(parameters) / total
    by_source = {}
    for source, weight in weights.items():
        by_source[source] = {"weight": weight}
    return TensorSettings(
        method=TASK_ARITHMETIC,
        by_source=by_source,
        options={},
    )


def _weight(parameters: Params) -> float:
    """The weight of a source of a weighted average; the plan has checked that it is a number."""
    weight = parameters["weight"]
    assert isinstance(weight, int | float)
    return weight
