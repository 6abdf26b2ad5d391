"""A recipe -> the parameters that give it: the inverse of `encode`.

The recipe's seed, dtypes and order of sources are ignored: the study sets them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from optuna.distributions import FloatDistribution

from paretomerge.checkpoint.reference import canonical_name
from paretomerge.errors import ConfigError
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.plan.plan import Weights
from paretomerge.recipe import Recipe
from paretomerge.space.weights.encode import recipe_of
from paretomerge.space.weights.layout import Cell, ParameterLayout
from paretomerge.space.weights.method_parameters import find_parameter
from paretomerge.space.weights.parameters import TASK_ARITHMETIC, ParameterSpace
from paretomerge.space.weights.tensor_settings import (
    AVERAGE,
    WEIGHT_TOLERANCE,
    TensorSettings,
    settings_difference,
    tensor_settings,
)
from paretomerge.types import Array, Params, ParamValue

_DIGITS = 12
"""Decimals of values that are solved for, so that 0.3 does not become 0.30000000000000004."""


def params_of(
    space: ParameterSpace,
    recipe: Recipe,
    weights: Mapping[str, Weights],
) -> dict[str, ParamValue]:
    """Return the parameters whose recipe has the same meaning as `recipe`.

    Args:
        space: The parameters' names, groups and bounds.
        recipe: A recipe over the base and sources of the space, however it is written.
        weights: Path -> open checkpoint, of the base and every source.

    Returns:
        A value for every parameter. Inactive ones have the value of the baseline recipes.

    Raises:
        ConfigError: A part of the recipe, named in the message, is outside the space.
    """
    if recipe.tokenizer or recipe.tokenizer_source or recipe.chat_template:
        raise ConfigError(
            "expected the base's tokenizer and chat template, "
            "got `tokenizer`, `tokenizer_source` or `chat_template`"
        )
    for document in (*recipe.steps, recipe):
        if document.calibration not in (None, space.calibration):
            raise ConfigError(
                f"calibration: expected {space.calibration or 'none'}, as in the space, got "
                f"{document.calibration}"
            )
    renamed = _with_paths_of(space, recipe)
    # An average needs no base, and its weights sum to 1, so it is a merge over any base.
    without_base = renamed.base_model is None and renamed.merge_method == AVERAGE
    if renamed.base_model != space.base and not without_base:
        base = recipe.base_model or "none"
        raise ConfigError(f"base_model: expected {space.base}, got {base}")
    models = [space.base, *space.sources.values()]
    for model in renamed.source_models:
        if model not in models:
            raise ConfigError(f"expected models of the study, got {model}")
    plan = make_plan(renamed, weights)
    tensors = tensor_settings(space, plan)
    params = _Decoder(space, tensors).params()
    _check_same_merge(space, params, tensors, weights)
    return params


def _check_same_merge(
    space: ParameterSpace,
    params: Params,
    tensors: Mapping[str, TensorSettings],
    weights: Mapping[str, Weights],
) -> None:
    """Check that the decoded parameters give back what the recipe states for every tensor.

    The parameters of a space state less than recipes can. Whatever the decoder does not look at
    would otherwise be lost in silence, and the trial would be of another merge.
    """
    recipe = recipe_of(space, params)
    plan = make_plan(recipe, weights)
    encoded = tensor_settings(space, plan)
    for name, stated in tensors.items():
        difference = settings_difference(stated, encoded[name])
        if difference:
            raise ConfigError(
                f"{name}: the space has no parameters for this: {difference}"
            )


def _with_paths_of(space: ParameterSpace, recipe: Recipe) -> Recipe:
    """The recipe with models written as in the space: `./ada/` and `ada` are the same folder."""
    models = [space.base, *space.sources.values()]
    paths = {canonical_name(path): path for path in models}

    def path_in_space(model: str) -> str:
        location = canonical_name(model)
        return paths.get(location, model)

    return recipe.rename_models(path_in_space)


@dataclass(frozen=True)
class _Decoder:
    """Finds each parameter from the settings of the tensors that it governs.

    Attributes:
        space: The parameters' names, groups and bounds.
        tensors: Tensor -> what the recipe states for it.
    """

    space: ParameterSpace
    tensors: Mapping[str, TensorSettings]

    def params(self) -> dict[str, ParamValue]:
        space = self.space
        if self._is_base():
            return self._base_params()
        decoded: dict[str, ParamValue] = {}
        for group, name in enumerate(space.names("method")):
            decoded[name] = self._method(group)
        for parameter in space.method_bounds:
            names = space.names(parameter)
            for group, name in enumerate(names):
                decoded[name] = self._method_parameter(parameter, group)
        for source in space.sources:
            decoded[f"use/{source}"] = not self._is_left_out(source)
            for layout in space.layouts.values():
                decoded |= self._layout_params(layout, source)

        params = space.uniform_params(
            method=space.methods[0],
            weights=dict.fromkeys(space.sources, 1.0),
        )
        for name in params:
            value = decoded.get(name)
            # A parameter that no tensor of the recipe reads is inactive and has no value.
            if value is not None:
                params[name] = value
        return self._inside_bounds(params)

    def _is_left_out(self, source: str) -> bool:
        return self.space.subset and source not in self._used_sources

    def _is_base(self) -> bool:
        """Whether all weights are 0, so that the merge is the base."""
        return all(tensor.is_base for tensor in self.tensors.values())

    def _base_params(self) -> dict[str, ParamValue]:
        space = self.space
        layout = space.layouts["weight"]
        low, high = layout.granularity.bounds
        # With `subset` the base is the merge that leaves out every source.
        if not space.subset and not low <= 0 <= high:
            raise ConfigError(f"weight: expected {low:g} to {high:g}, got 0 everywhere")
        return space.uniform_params(
            method=space.methods[0],
            weights=dict.fromkeys(space.sources, 0.0),
        )

    @cached_property
    def _used_sources(self) -> frozenset[str]:
        """Sources that are listed for at least one tensor."""
        used: set[str] = set()
        for tensor in self.tensors.values():
            used.update(tensor.by_source)
        return frozenset(used)

    def _tensors_in(self, group: int) -> dict[str, TensorSettings]:
        """Tensors of a group of layers with its own method."""
        tensors = {}
        for name, tensor in self.tensors.items():
            if self.space.method_group(name) == group:
                tensors[name] = tensor
        return tensors

    def _method(self, group: int) -> str:
        """The method of a group of layers."""
        methods = set()
        for tensor in self._tensors_in(group).values():
            methods.add(tensor.method)
        if len(methods) > 1:
            listed = " and ".join(sorted(methods))
            raise ConfigError(
                f"merge_method: expected one in each of the space's groups of layers, got {listed}"
            )
        (method,) = methods
        if method in self.space.methods:
            return method
        if method == TASK_ARITHMETIC:
            # Encoding uses task arithmetic in place of a method that needs more sources than are
            # used, so any such method gives this recipe.
            for candidate in self.space.methods:
                least_sources, _ = METHODS[candidate].models
                if least_sources > len(self._used_sources):
                    return candidate
            method = f"{method} (which {AVERAGE} is equivalent to)"
        listed = ", ".join(self.space.methods)
        raise ConfigError(f"merge_method: expected one of {listed}, got {method}")

    def _method_parameter(self, parameter: str, group: int) -> float | None:
        """Value of a per-method parameter in a group; None where no tensor reads it."""
        values: dict[str, float] = {}
        for name, tensor in self._tensors_in(group).items():
            # Methods have a parameter either per source or for the whole merge.
            places = {name: tensor.options}
            for source, settings in tensor.by_source.items():
                places[f"{name} of {source}"] = settings
            for place, settings in places.items():
                if parameter not in settings or settings.get("weight") == 0:
                    continue
                value = settings[parameter]
                if parameter == "epsilon":
                    # The inverse of `della_epsilon`. At density 0 or 1 epsilon has no effect.
                    density = settings["density"]
                    if not 0 < density < 1:
                        continue
                    margin = min(density, 1 - density)
                    value = round(value / margin, _DIGITS)
                values[place] = value
        if not values:
            return None
        shared = _single_value(values, parameter)
        low, high = self.space.method_bounds[parameter]
        is_fixed = low == high
        if is_fixed and abs(shared - low) > WEIGHT_TOLERANCE:
            raise ConfigError(
                f"{parameter}: expected {low:g}, as in the space, got {shared:g}"
            )
        return shared

    def _layout_params(
        self,
        layout: ParameterLayout,
        source: str,
    ) -> dict[str, float]:
        """Weights or densities of one source, of the cells whose methods read them."""
        values = self._values_of(layout, source)
        if layout.smooth:
            by_cell = _solve_control_points(layout, source, values)
        else:
            by_cell = _shared_values(layout, source, values)
        names = layout.names(source)
        return {names[cell]: value for cell, value in by_cell.items()}

    def _values_of(
        self,
        layout: ParameterLayout,
        source: str,
    ) -> dict[str, float]:
        """Tensor -> weight or density of the source there, where the method reads it."""
        kind = layout.kind
        is_weight = kind == "weight"
        values: dict[str, float] = {}
        for name, tensor in self.tensors.items():
            if find_parameter(tensor.method, kind) is None:
                continue
            if source in tensor.by_source:
                parameters = tensor.by_source[source]
                scale = 1.0
                if is_weight:
                    # lambda scales the sum of the weighted deltas, so it scales every weight.
                    scale = tensor.options.get("lambda", 1.0)
                values[name] = parameters[kind] * scale
            elif is_weight and not self._is_left_out(source):
                # A source that is not listed adds nothing.
                values[name] = 0.0
        return values

    def _inside_bounds(self, params: Params) -> dict[str, ParamValue]:
        """The parameters, with rounding errors beyond the bounds removed."""
        inside = dict(params)
        for name, distribution in self.space.distributions.items():
            if not isinstance(distribution, FloatDistribution):
                continue
            value = params[name]
            assert isinstance(value, (int, float))
            low = distribution.low
            high = distribution.high
            if not low - WEIGHT_TOLERANCE <= value <= high + WEIGHT_TOLERANCE:
                raise ConfigError(
                    f"{name}: expected {low:g} to {high:g}, the space's bounds, got {value:g}"
                )
            inside[name] = min(max(value, low), high)
        return inside


def _shared_values(
    layout: ParameterLayout,
    source: str,
    values: Mapping[str, float],
) -> dict[Cell, float]:
    """Values of cells from the values of their tensors, which must be equal."""
    by_cell: dict[Cell, dict[str, float]] = {}
    for tensor, value in values.items():
        # Without interpolation, each tensor belongs to one cell.
        (cell,) = layout.coefficients[tensor]
        of_cell = by_cell.setdefault(cell, {})
        of_cell[tensor] = value
    names = layout.names(source)
    shared = {}
    for cell, of_cell in by_cell.items():
        name = names[cell]
        shared[cell] = _single_value(of_cell, name)
    return shared


def _solve_control_points(
    layout: ParameterLayout,
    source: str,
    values: Mapping[str, float],
) -> dict[Cell, float]:
    """Values of control points from the values of tensors between them."""
    solved: dict[Cell, float] = {}
    for role in layout.roles:
        of_role = {}
        for tensor, value in values.items():
            if layout.role_of(tensor) == role:
                of_role[tensor] = value
        if of_role:
            cells = [cell for cell in layout.cells if cell.role == role]
            solved |= _solve_role(layout, source, cells, of_role)
    return solved


def _solve_role(
    layout: ParameterLayout,
    source: str,
    cells: Sequence[Cell],
    by_tensor: Mapping[str, float],
) -> dict[Cell, float]:
    """Control points of one role from the values of its tensors, by least squares.

    Raises:
        ConfigError: The values do not lie on lines between control points.
    """
    tensors = list(by_tensor)
    values = np.array([by_tensor[tensor] for tensor in tensors])
    matrix = _coefficient_matrix(layout, tensors, cells)
    # A recipe can have a value for every layer, so there can be more values than control points.
    solution, *_ = np.linalg.lstsq(matrix, values, rcond=None)
    interpolated = matrix @ solution
    errors = np.abs(interpolated - values)
    worst = int(errors.argmax())
    if errors[worst] > WEIGHT_TOLERANCE:
        raise ConfigError(
            f"{tensors[worst]}: {layout.kind} of {source}: "
            "expected a value on the space's lines, got another"
        )
    solved = {}
    for column, cell in enumerate(cells):
        # A control point at a layer has that layer's value, without the solver's rounding.
        is_at_point = matrix[:, column] == 1
        if is_at_point.any():
            first = int(is_at_point.argmax())
            solved[cell] = float(values[first])
        else:
            value = float(solution[column])
            solved[cell] = round(value, _DIGITS)
    return solved


def _coefficient_matrix(
    layout: ParameterLayout,
    tensors: Sequence[str],
    cells: Sequence[Cell],
) -> Array:
    """(tensors, cells) interpolation coefficients."""
    shape = (len(tensors), len(cells))
    matrix = np.zeros(shape)
    for row, tensor in enumerate(tensors):
        coefficients = layout.coefficients[tensor]
        for column, cell in enumerate(cells):
            matrix[row, column] = coefficients.get(cell, 0.0)
    return matrix


def _single_value(values: Mapping[str, float], parameter: str) -> float:
    """The value that all tensors share; there is at least one tensor."""
    first, value = next(iter(values.items()))
    for tensor, other in values.items():
        if abs(other - value) > WEIGHT_TOLERANCE:
            raise ConfigError(
                f"{parameter}: expected one value where the space has one, "
                f"got {value:g} in {first} and {other:g} in {tensor}"
            )
    return value
