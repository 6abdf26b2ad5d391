"""A point of a parameter space -> its recipe.

Groups of layers become slices, roles filters. Where groups have methods of their own, each method is a named step, a
whole model in which only its own groups are meant, and the result takes every group from its method's step. A step's
tensors are computed when they are read, so what is not meant costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from paretomerge.merging.methods import METHODS
from paretomerge.recipe import Recipe, Slice, Source
from paretomerge.space.weights.layers import group_of
from paretomerge.space.weights.layout import Cell, ParameterLayout
from paretomerge.space.weights.method_parameters import epsilon_of, parameter_of

if TYPE_CHECKING:
    from paretomerge.space.weights.space import WeightSearchSpace

PLAIN = "task_arithmetic"
"""The method for fewer sources than the chosen one merges, and for none."""


def write_recipe(space: "WeightSearchSpace", params: Mapping[str, Any]) -> Recipe:
    """The recipe of one point. Without any source it is the base."""
    used = tuple(source for source in space.sources if params.get(f"use/{source}", True))
    if not used:
        first = next(iter(space.sources.values()))
        return Recipe(
            PLAIN,
            (Slice((Source(first, None, {"weight": 0.0}),)),),
            space.base,
            {"normalize": False},
            seed=space.seed,
        )
    chosen = [params.get(name, space.methods[0]) for name in space.per_method("method")]
    methods = tuple(
        method if len(used) >= METHODS[method].models[0] else PLAIN for method in chosen
    )
    documents = {
        method: _Document(space, params, used, method, methods).recipe()
        for method in dict.fromkeys(methods)
    }
    if len(documents) == 1:
        return documents[methods[0]]
    steps = tuple(
        replace(recipe, name=step_name(method), dtype="float32")
        for method, recipe in documents.items()
    )
    slices = [
        Slice((Source(step_name(methods[group]), layers),))
        for layers, group in _runs(space, methods)
    ]
    return Recipe("passthrough", tuple(slices), space.base, seed=space.seed, steps=steps)


def step_name(method: str) -> str:
    """What the result calls the merge by that method."""
    return f"by {method}"


def _runs(
    space: "WeightSearchSpace", methods: tuple[str, ...]
) -> Iterator[tuple[tuple[int, int], int]]:
    """([first, end), a group in it) of consecutive layers with one method."""
    groups = [g for g, method in enumerate(methods) if g == 0 or method != methods[g - 1]]
    ends = [*(space.method_starts[g] for g in groups[1:]), space.architecture.depth]
    yield from (((space.method_starts[g], end), g) for g, end in zip(groups, ends, strict=True))


@dataclass(frozen=True)
class _Document:
    """The merge by one method. methods: of each group of layers; `used`: the sources that are not left out."""

    space: "WeightSearchSpace"
    params: Mapping[str, Any]
    used: tuple[str, ...]
    method: str
    methods: tuple[str, ...]

    def recipe(self) -> Recipe:
        slices = [self._slice(first, end) for first, end in self._ranges()]
        options = {} if parameter_of("normalize", self.method) is None else {"normalize": False}
        if len(slices) == 1:
            options |= slices[0].parameters
            slices = [
                Slice(tuple(replace(source, layer_range=None) for source in slices[0].sources))
            ]
        return Recipe(self.method, tuple(slices), self.space.base, options, seed=self.space.seed)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Layers with the same settings."""
        starts = {0}
        for kind, split in self.space.splits.items():
            if parameter_of(kind, self.method) and not split.dial.smooth:
                starts.update(split.starts)
        if set(self.methods) != {self.method} or any(
            parameter_of(parameter, self.method) for parameter in self.space.own_parameters
        ):
            starts.update(self.space.method_starts)
        starts = {first for first in starts if self._means(first) or first in self._borders()}
        yield from zip(
            sorted(starts), [*sorted(starts)[1:], self.space.architecture.depth], strict=True
        )

    def _borders(self) -> set[int]:
        """Where layers of another method begin."""
        return {first for (first, _), _ in _runs(self.space, self.methods)}

    def _means(self, layer: int) -> bool:
        return self.methods[group_of(self.space.method_starts, layer)] == self.method

    def _slice(self, first: int, end: int) -> Slice:
        if not self._means(first):
            idle = {"weight": 0.0} if parameter_of("weight", self.method) else {}
            return Slice(
                tuple(
                    Source(self.space.sources[source], (first, end), idle) for source in self.used
                )
            )
        group = group_of(self.space.method_starts, first)
        method_parameters = {
            parameter: self._knob(parameter, group)
            for parameter in self.space.own_parameters
            if parameter_of(parameter, self.method)
        }
        own = {
            name: value
            for name, value in method_parameters.items()
            if (parameter := parameter_of(name, self.method)) and parameter.per_source
        }
        sources = tuple(
            Source(self.space.sources[s], (first, end), self._settings(s, first, end, own))
            for s in self.used
        )
        return Slice(
            sources,
            {
                parameter: value
                for parameter, value in method_parameters.items()
                if parameter not in own
            },
        )

    def _settings(
        self, source: str, first: int, end: int, own: Mapping[str, float]
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        for kind, split in self.space.splits.items():
            if parameter_of(kind, self.method):
                settings[kind] = split.setting(self._values(split, source), first, end)
        if "epsilon" in own:
            density = self.space.splits["density"]
            each = density.setting(self._values(density, source), first, end, each_layer=True)
            settings["epsilon"] = epsilon_of(each, own["epsilon"])
        return settings | {
            parameter: value for parameter, value in own.items() if parameter != "epsilon"
        }

    def _values(self, split: ParameterLayout, source: str) -> Callable[[Cell], float]:
        names = split.names(source)
        return lambda cell: float(self.params[names[cell]])

    def _knob(self, parameter: str, group: int) -> float:
        return float(
            self.params.get(
                self.space.per_method(parameter)[group], self.space.bounds(parameter)[0]
            )
        )
