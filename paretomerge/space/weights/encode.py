"""A trial's parameters -> the recipe.

Groups of layers become slices and roles become filters, so `weight/ada/1/mlp` is the `weight` of
source ada in the slice of group 1, under the filters of role mlp.

Where groups of layers have different methods, each method is a named step: a merge of the whole
model in which only the layers of its own groups matter. The result takes each group's layers from
the step of its method. Tensors of a step are computed when they are read, so layers that are not
taken cost nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from paretomerge.merging.methods import METHODS
from paretomerge.recipe import ParameterSetting, Recipe, Slice, Source
from paretomerge.space.weights.layers import LayerRange, group_of
from paretomerge.space.weights.method_parameters import (
    della_epsilon,
    find_parameter,
    is_whole_number,
)
from paretomerge.space.weights.parameters import TASK_ARITHMETIC, ParameterSpace
from paretomerge.types import Params


def recipe_of(space: ParameterSpace, params: Params) -> Recipe:
    """Return the recipe of a trial's parameters.

    Args:
        space: The parameters' names, groups and bounds.
        params: Value of every active parameter.

    Returns:
        The recipe; the base itself where every source is left out.
    """
    sources = space.used_sources(params)
    if not sources:
        return _base_recipe(space)
    methods = _method_of_each_group(space, params, len(sources))
    merges = {}
    for method in dict.fromkeys(methods):
        merge = _MethodMerge(
            space=space,
            params=params,
            sources=sources,
            method=method,
            methods=methods,
        )
        merges[method] = merge.recipe()
    if len(merges) == 1:
        return merges[methods[0]]

    steps = []
    for method, recipe in merges.items():
        # Steps in float32, so that rounding happens once, as in a merge by one method.
        step = replace(recipe, name=step_name(method), dtype="float32")
        steps.append(step)
    slices = []
    for layers, method in _method_runs(space, methods):
        source = Source(model=step_name(method), layer_range=layers)
        slices.append(Slice((source,)))
    return Recipe(
        merge_method="passthrough",
        slices=tuple(slices),
        base_model=space.base,
        seed=space.seed,
        steps=tuple(steps),
    )


def step_name(method: str) -> str:
    """Return the name of the recipe's step that merges by a method."""
    return f"by {method}"


def _base_recipe(space: ParameterSpace) -> Recipe:
    # A recipe must list a model; with weight 0 it adds nothing to the base.
    first_path, *_ = space.sources.values()
    source = Source(first_path, parameters={"weight": 0.0})
    return Recipe(
        merge_method=TASK_ARITHMETIC,
        slices=(Slice((source,)),),
        base_model=space.base,
        parameters={"normalize": False},
        seed=space.seed,
    )


def _method_of_each_group(
    space: ParameterSpace,
    params: Params,
    n_sources: int,
) -> tuple[str, ...]:
    methods = []
    for name in space.names("method"):
        # With a single method there is no choice, and so no parameter.
        choice = params.get(name, space.methods[0])
        method = str(choice)
        least_sources, _ = METHODS[method].models
        if n_sources < least_sources:
            # Some methods compare sources, such as pcb, so they need two or more.
            method = TASK_ARITHMETIC
        methods.append(method)
    return tuple(methods)


def _method_runs(
    space: ParameterSpace,
    methods: tuple[str, ...],
) -> list[tuple[LayerRange, str]]:
    """Runs of consecutive layers with the same method, as ([first, end), method)."""
    starts = []
    run_methods: list[str] = []
    for start, method in zip(space.method_starts, methods, strict=True):
        if not run_methods or method != run_methods[-1]:
            starts.append(start)
            run_methods.append(method)
    layers = _ranges(starts, space.architecture.depth)
    return list(zip(layers, run_methods, strict=True))


def _ranges(starts: list[int], depth: int) -> list[LayerRange]:
    """Ranges [first, end) that begin at the starts and end at the next start or the depth."""
    ends = [*starts[1:], depth]
    return list(zip(starts, ends, strict=True))


@dataclass(frozen=True)
class _MethodMerge:
    """The merge of the whole model by one of the methods.

    Attributes:
        space: The parameters' names, groups and bounds.
        params: The trial's parameters.
        sources: The sources that are not left out.
        method: The method of this merge.
        methods: The method of each group of layers.
    """

    space: ParameterSpace
    params: Params
    sources: tuple[str, ...]
    method: str
    methods: tuple[str, ...]

    def recipe(self) -> Recipe:
        options: dict[str, ParameterSetting] = {}
        if self._has("normalize"):
            # Normalising would take back the scale of the weights, which is searched.
            options["normalize"] = False
        layer_ranges = self._layer_ranges()
        slices = [self._slice(layers) for layers in layer_ranges]
        if len(slices) == 1:
            # One slice over all layers is written as `models`, without layer ranges.
            (whole,) = slices
            options |= whole.parameters
            sources = [replace(source, layer_range=None) for source in whole.sources]
            slices = [Slice(tuple(sources))]
        return Recipe(
            merge_method=self.method,
            slices=tuple(slices),
            base_model=self.space.base,
            parameters=options,
            seed=self.space.seed,
            calibration=self._calibration(),
        )

    def _calibration(self) -> str | None:
        """The folder of statistics, for a method that needs them."""
        needs_data = METHODS[self.method].statistics is not None
        return self.space.calibration if needs_data else None

    def _has(self, parameter: str) -> bool:
        """Whether the method has a parameter of that name."""
        return find_parameter(self.method, parameter) is not None

    def _layer_ranges(self) -> list[LayerRange]:
        """Ranges [first, end) of layers that have the same settings."""
        space = self.space
        starts = {0}
        for kind, layout in space.layouts.items():
            # A smooth layout needs no slices: its gradients span them.
            if self._has(kind) and not layout.smooth:
                starts.update(layout.starts)
        several_methods = len(set(self.methods)) > 1
        has_method_parameters = any(map(self._has, space.method_bounds))
        if several_methods or has_method_parameters:
            starts.update(space.method_starts)
        # Layers of other methods are not taken from this merge: one slice per run is enough.
        runs = _method_runs(space, self.methods)
        run_starts = [first for (first, _), _ in runs]
        needed = []
        for start in sorted(starts):
            if self._is_taken(start) or start in run_starts:
                needed.append(start)
        return _ranges(needed, space.architecture.depth)

    def _is_taken(self, layer: int) -> bool:
        """Whether the result takes the layer from this merge."""
        group = group_of(self.space.method_starts, layer)
        return self.methods[group] == self.method

    def _slice(self, layers: LayerRange) -> Slice:
        first, _ = layers
        if not self._is_taken(first):
            return self._unused_slice(layers)
        per_source = self._method_parameters(first, per_source=True)
        per_merge = self._method_parameters(first, per_source=False)
        sources = []
        for name in self.sources:
            source = Source(
                model=self.space.sources[name],
                layer_range=layers,
                parameters=self._source_parameters(name, layers, per_source),
            )
            sources.append(source)
        return Slice(tuple(sources), per_merge)

    def _unused_slice(self, layers: LayerRange) -> Slice:
        """Layers that the result does not take from this merge, with settings that are valid."""
        parameters = {"weight": 0.0} if self._has("weight") else {}
        sources = []
        for name in self.sources:
            source = Source(
                model=self.space.sources[name],
                layer_range=layers,
                parameters=parameters,
            )
            sources.append(source)
        return Slice(tuple(sources))

    def _method_parameters(self, layer: int, per_source: bool) -> dict[str, float]:
        """Values of the per-method parameters that sources have, or that the merge has."""
        space = self.space
        group = group_of(space.method_starts, layer)
        values = {}
        for parameter, (fixed, _) in space.method_bounds.items():
            row = find_parameter(self.method, parameter)
            if row is None or row.per_source != per_source:
                continue
            # A fixed parameter is not among the trial's: its bounds are its value.
            names = space.names(parameter)
            value = self.params.get(names[group], fixed)
            assert value is not None
            number = float(value)
            values[parameter] = int(number) if is_whole_number(parameter) else number
        return values

    def _source_parameters(
        self,
        source: str,
        layers: LayerRange,
        method_parameters: Mapping[str, float],
    ) -> dict[str, ParameterSetting]:
        """What the recipe states for one source in a slice."""
        layouts = self.space.layouts
        settings: dict[str, ParameterSetting] = {}
        for kind, layout in layouts.items():
            if self._has(kind):
                settings[kind] = layout.setting(self.params, source, layers)
        for name, value in method_parameters.items():
            if name != "epsilon":
                settings[name] = value
                continue
            # Epsilon is not linear in the density, so control points would not do.
            density = layouts["density"].setting(
                self.params,
                source,
                layers,
                each_layer=True,
            )
            settings[name] = della_epsilon(density, share=value)
        return settings
