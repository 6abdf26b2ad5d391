"""All parameters of a weight space: their names, distributions and conditions.

`ParameterSpace` is plain data that `encode` (parameters -> recipe) and `decode` (recipe ->
parameters) share. Its parameters, and the places in the recipe where their values go:

| parameter | in the recipe |
|---|---|
| `method`, `method/<group>` | `merge_method`, of a named step where groups have different methods |
| `use/<source>` | whether the source is listed |
| `weight/<source>/<group>/<role>` | `weight` of the source, under a slice and a filter |
| `density/<source>/<group>/<role>` | `density` of the source, likewise |
| `gamma`, `mask_lambda`, `select_topk`, ..., each also `/<group>` | parameter of the same name |
| `epsilon`, `epsilon/<group>` | `epsilon` as a share of min(density, 1 - density) |

A level with a single element is left out of the name: `weight/<source>` has one group and no roles.
The groups of `method` and of the per-method parameters are those of `method_starts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.space.weights.layers import group_of
from paretomerge.space.weights.layout import ParameterLayout
from paretomerge.space.weights.method_parameters import methods_with, search_range
from paretomerge.types import Params, ParamValue

TASK_ARITHMETIC = "task_arithmetic"
"""The method of the base alone, and of trials with fewer sources than their method merges."""

ParentChoice = tuple[str, tuple[ParamValue, ...]]
"""(parent, values): the condition that a parent has one of the values."""

ParentChoices = tuple[ParentChoice, ...]
"""The conditions under which a parameter is active, all of which must hold."""


@dataclass(frozen=True)
class ParameterSpace:
    """The parameters of a weight space on one architecture.

    Attributes:
        base: Path of the base model.
        sources: Name -> path of the models that are merged.
        architecture: Architecture of the base.
        methods: Merge methods to choose from.
        method_starts: First layer of each group of layers with its own method.
        method_bounds: Per-method parameter, such as gamma -> (low, high), equal where it is fixed.
            It has every parameter that one of `methods` has and a search may vary.
        layouts: `weight` and `density` -> how they are divided over the model.
        subset: Whether a source can be left out.
        seed: Seed of the recipes' random masks.
        calibration: The folder with statistics of the sources, for methods that need data.
    """

    base: str
    sources: Mapping[str, str]
    architecture: Architecture
    methods: tuple[str, ...]
    method_starts: tuple[int, ...]
    method_bounds: Mapping[str, tuple[float, float]]
    layouts: Mapping[str, ParameterLayout]
    subset: bool
    seed: int
    calibration: str | None = None

    def names(self, kind: str) -> list[str]:
        """Return the names of a parameter that each group with its own method has.

        Args:
            kind: `method`, or a per-method parameter such as `gamma`.

        Returns:
            `gamma/0`, `gamma/1`, ... by group, or `gamma` alone where there is one group.
        """
        groups = len(self.method_starts)
        if groups == 1:
            return [kind]
        return [f"{kind}/{group}" for group in range(groups)]

    def method_group(self, tensor: str) -> int:
        """Return the index of the method's group that a tensor belongs to.

        Embeddings belong to the first group, the final norm and the head to the last.
        """
        layer = self.architecture.layer(tensor)
        if layer is not None:
            return group_of(self.method_starts, layer)
        # As recipes do, whose first and last slices decide for what is outside the layers.
        if self.architecture.is_embedding(tensor):
            return 0
        return len(self.method_starts) - 1

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, whether or not it is active, and its distribution."""
        distributions: dict[str, BaseDistribution] = {}
        # A choice of one method is no parameter, and neither is a fixed number.
        if len(self.methods) > 1:
            choice = CategoricalDistribution(self.methods)
            distributions |= dict.fromkeys(self.names("method"), choice)
        for parameter, (low, high) in self.method_bounds.items():
            if low < high:
                interval = FloatDistribution(low, high)
                names = self.names(parameter)
                distributions |= dict.fromkeys(names, interval)
        for source in self.sources:
            distributions |= self._source_distributions(source)
        return distributions

    def _source_distributions(self, source: str) -> dict[str, BaseDistribution]:
        distributions: dict[str, BaseDistribution] = {}
        if self.subset:
            choice = CategoricalDistribution((True, False))
            distributions[f"use/{source}"] = choice
        for kind, layout in self.layouts.items():
            if not methods_with(kind, self.methods):
                continue
            low, high = layout.granularity.bounds
            interval = FloatDistribution(low, high)
            names = layout.names(source).values()
            distributions |= dict.fromkeys(names, interval)
        return distributions

    @cached_property
    def conditions(self) -> dict[str, ParentChoices]:
        """Parameter -> the choices of its parents under which it is active.

        Parameters that are always active are left out.
        """
        parents: dict[str, ParentChoices] = {}
        for parameter in self.method_bounds:
            for group, name in enumerate(self.names(parameter)):
                parents[name] = self._method_choices(parameter, group)
        for source in self.sources:
            for layout in self.layouts.values():
                parents |= self._layout_conditions(layout, source)
        conditions = {}
        for name, choices in parents.items():
            # Fixed parameters, and densities that no method has, are not in `distributions`.
            if choices and name in self.distributions:
                conditions[name] = choices
        return conditions

    def _layout_conditions(
        self,
        layout: ParameterLayout,
        source: str,
    ) -> dict[str, ParentChoices]:
        source_used: ParentChoices = ()
        if self.subset:
            is_used: ParentChoice = (f"use/{source}", (True,))
            source_used = (is_used,)
        conditions = {}
        for cell, name in layout.names(source).items():
            # Control points span all groups. A smooth layout is refused where the groups' methods
            # differ in whether they read it, so the choice of the first group stands for all.
            first_layer = 0 if layout.smooth else layout.starts[cell.group]
            group = group_of(self.method_starts, first_layer)
            method_choices = self._method_choices(layout.kind, group)
            conditions[name] = source_used + method_choices
        return conditions

    def _method_choices(self, parameter: str, group: int) -> ParentChoices:
        """The condition that a group's method has a parameter; () where every method has it."""
        methods = methods_with(parameter, self.methods)
        if len(methods) == len(self.methods):
            return ()
        parent = self.names("method")[group]
        return ((parent, methods),)

    def uniform_params(
        self,
        method: str,
        weights: Mapping[str, float],
        density: float = 1.0,
    ) -> dict[str, ParamValue]:
        """Return parameters with one method everywhere and one weight for all cells of a source.

        Args:
            method: Merge method of all layers.
            weights: Source -> weight, clipped to the bounds. Where sources can be left out, those
                with weight 0 are.
            density: Density of all sources, clipped to the bounds.

        Returns:
            A value for every parameter; per-method parameters have their baseline value.
        """
        values: dict[str, ParamValue] = {}
        values |= dict.fromkeys(self.names("method"), method)
        for parameter, (low, high) in self.method_bounds.items():
            baseline = search_range(parameter).baseline
            clipped = min(max(baseline, low), high)
            names = self.names(parameter)
            values |= dict.fromkeys(names, clipped)
        for source in self.sources:
            weight = weights[source]
            values[f"use/{source}"] = weight != 0
            values |= self._uniform_layout("weight", source, weight)
            values |= self._uniform_layout("density", source, density)
        # The order of the distributions; parameters that are not searched are dropped.
        params = {}
        for name in self.distributions:
            params[name] = values[name]
        return params

    def _uniform_layout(
        self,
        kind: str,
        source: str,
        value: float,
    ) -> dict[str, float]:
        """One value for all cells of a source, clipped to the bounds."""
        layout = self.layouts[kind]
        names = layout.names(source).values()
        clipped = layout.granularity.clip(value)
        return dict.fromkeys(names, clipped)

    def used_sources(self, params: Params) -> tuple[str, ...]:
        """Return the sources that a trial's parameters do not leave out."""
        used = []
        for source in self.sources:
            # Without `subset` there is no such parameter.
            if params.get(f"use/{source}", True):
                used.append(source)
        return tuple(used)
