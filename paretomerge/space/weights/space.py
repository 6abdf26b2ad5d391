"""Parameter space: numbers per source, group of layers and role, and the method itself as a choice.

Parameters are named `weight/<source>/<group>/<role>`; a level that is not split is left out of the name. The others are
`method` or `method/<group>`, a method's own method_parameters (`gamma`, `epsilon`, ...) likewise, and `use/<source>`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.errors import ConfigError, unknown_name
from paretomerge.merging.delta_profile import DeltaProfile
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.plan import Weights
from paretomerge.recipe import Recipe
from paretomerge.space.weights.decode import point_of
from paretomerge.space.weights.encode import PLAIN, write_recipe
from paretomerge.space.weights.layers import ONE, Grouping, group_of
from paretomerge.space.weights.layout import Granularity, ParameterLayout
from paretomerge.space.weights.method_parameters import (
    RANGES,
    SEARCHABLE,
    ParameterBounds,
    check_settings,
    readers,
)

Params = Mapping[str, Any]
Conditions = dict[str, tuple[tuple[str, tuple[Any, ...]], ...]]
"""name -> (parent, values) pairs: the parameter counts where every parent has one of its values."""

_LEAST_IMPORTANCE = (
    0.01  # of the largest of its kind: a part that did not move still has a length scale
)


@dataclass(frozen=True)
class WeightSearchSpace:
    """Merges of `sources` (name -> path) over `base`; `architecture` is the base's.

    Weights are free to exceed 1 and are never normalised (Akiba et al. 2024 found best sums near 2); a negative one
    takes a skill away. method_groups: layers with a method of their own. method_parameters: bounds of the methods' own method_parameters, or
    fixed values. subset: whether a source can be left out. profile: of the deltas, for groups of equal mass and
    `importance`. notes: what to tell the user about the sources.
    """

    base: str
    sources: Mapping[str, str]
    architecture: Architecture
    methods: tuple[str, ...] = ("task_arithmetic", "ties", "dare_ties")
    weight: Granularity = field(default_factory=lambda: Granularity((-0.5, 1.5)))
    density: Granularity = field(default_factory=lambda: Granularity((0.1, 1.0)))
    seed: int = 0
    method_groups: Grouping = ONE
    method_parameters: Mapping[str, ParameterBounds] = field(default_factory=dict)
    subset: bool = False
    profile: DeltaProfile | None = None
    notes: tuple[str, ...] = ()

    @property
    def routed(self) -> bool:
        return False

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in SEARCHABLE:
                raise ConfigError(
                    f"space.methods: {unknown_name('searchable method', method, SEARCHABLE)}"
                )
            if len(self.sources) < METHODS[method].models[0]:
                raise ConfigError(
                    f"space.methods: {method}: expected {METHODS[method].models[0]} models or more, got {len(self.sources)}"
                )
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(
                f"space.methods: expected each method once, got {', '.join(self.methods)}"
            )
        if not readers("weight", self.methods):
            raise ConfigError(
                f"space.methods: expected one with a weight per source among them, got {', '.join(self.methods)}"
            )
        if not (self.density.bounds[0] > 0 and self.density.bounds[1] <= 1):
            raise ConfigError(
                f"space.density.bounds: expected 0 < low < high <= 1, got {list(self.density.bounds)}"
            )
        check_settings(self.method_parameters, self.methods)
        if self.profile and (
            missing := [name for name in self.sources if name not in self.profile.names]
        ):
            raise ConfigError(
                f"space: expected a profile of every source, got none of {missing[0]}"
            )
        several = (
            max(len(self.method_starts), *(len(split.starts) for split in self.splits.values())) > 1
        )
        if several and len(self.architecture.main_stacks) > 1:
            raise ConfigError(
                "space: expected one group, for the architecture has several stacks of layers, got more"
            )

    @cached_property
    def method_starts(self) -> tuple[int, ...]:
        """First layers of the groups that have a method of their own."""
        try:
            starts = self.method_groups.starts(self.architecture.depth, self._layer_mass)
        except ConfigError as error:
            raise ConfigError(f"space.method_{error}") from error
        return starts if len(self.methods) > 1 else (0,)

    @cached_property
    def splits(self) -> Mapping[str, ParameterLayout]:
        """How weights and densities are split over the model. What only some methods read is cut where the method changes."""
        splits = {}
        for kind, dial in (("weight", self.weight), ("density", self.density)):
            split = ParameterLayout.of(kind, dial, self.architecture, self._layer_mass)
            if len(self.method_starts) > 1 and 0 < len(readers(kind, self.methods)) < len(
                self.methods
            ):
                if dial.smooth:
                    raise ConfigError(
                        f"space.{kind}.smooth: expected methods that all read `{kind}` where layers have methods of their own"
                    )
                split = split.cut(self.method_starts)
            splits[kind] = split
        return splits

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, whether or not it counts at a given point."""
        space: dict[str, BaseDistribution] = {}
        if len(self.methods) > 1:
            space |= {
                name: CategoricalDistribution(self.methods) for name in self.per_method("method")
            }
        for parameter in self.own_parameters:
            low, high = self.bounds(parameter)
            if low < high:
                space |= {name: FloatDistribution(low, high) for name in self.per_method(parameter)}
        for source in self.sources:
            if self.subset:
                space[f"use/{source}"] = CategoricalDistribution((True, False))
            for kind, dial in (("weight", self.weight), ("density", self.density)):
                if readers(kind, self.methods):
                    space |= {
                        name: FloatDistribution(*dial.bounds)
                        for name in self.splits[kind].names(source).values()
                    }
        return space

    @cached_property
    def conditions(self) -> Conditions:
        """Which parameters count only under some methods, or only where their source is used."""
        found: Conditions = {}
        for parameter in self.own_parameters:
            for group, name in enumerate(self.per_method(parameter)):
                found[name] = self._under(parameter, group)
        for source in self.sources:
            used = ((f"use/{source}", (True,)),) if self.subset else ()
            for kind, split in self.splits.items():
                for (group, _), name in split.names(source).items():
                    found[name] = used + self._under(
                        kind,
                        0
                        if split.dial.smooth
                        else group_of(self.method_starts, split.starts[group]),
                    )
        return {
            name: parents
            for name, parents in found.items()
            if parents and name in self.distributions
        }

    @cached_property
    def importance(self) -> dict[str, float]:
        """Name -> the size of the deltas that a parameter governs: the root of their mass, relative to the other
        parameters of its kind (geometric mean 1). {} without a profile."""
        if self.profile is None:
            return {}
        kinds: dict[str, dict[str, float]] = defaultdict(dict)
        for name, mass in self._masses(self.profile).items():
            kinds[name.split("/")[0]][name] = float(np.sqrt(mass))
        found: dict[str, float] = {}
        for sizes in kinds.values():
            least = max(sizes.values()) * _LEAST_IMPORTANCE or 1.0
            sizes = {name: max(size, least) for name, size in sizes.items()}
            middle = float(np.exp(np.mean(np.log(list(sizes.values())))))
            found |= {name: size / middle for name, size in sizes.items()}
        return {name: found[name] for name in self.distributions}

    def recipe(self, params: Params) -> Recipe:
        """The recipe of one point. Groups of layers become slices, roles filters, methods per group named steps."""
        return write_recipe(self, params)

    def warm(self, recipe: Recipe) -> dict[str, Any]:
        """The point that gives the user's recipe; a ConfigError says which part of it is outside the space."""
        return point_of(self, recipe, self._opened)

    def point(
        self, method: str, weights: Mapping[str, float], density: float = 1.0
    ) -> dict[str, Any]:
        """The parameters at which every part of a source has one weight (clipped to the bounds). Where sources can be left
        out, those of weight 0 are."""
        values = {"method": method} | {
            parameter: float(np.clip(RANGES[parameter].start, *self.bounds(parameter)))
            for parameter in self.own_parameters
        }
        point: dict[str, Any] = {}
        for name in self.distributions:
            kind, _, rest = name.partition("/")
            source = rest.split("/")[0]
            if kind == "use":
                point[name] = weights[source] != 0
            elif kind == "density":
                point[name] = self.density.clip(density)
            else:
                point[name] = (
                    self.weight.clip(weights[source]) if kind == "weight" else values[kind]
                )
        return point

    def starts(self) -> dict[str, dict[str, Any]]:
        """Known good points to begin with: each source alone, the soup, task arithmetic, the others as published."""
        dense = readers("density", self.methods)
        plain = self._plain
        name = "{}" if self.holds_sources else "near {}"
        alone = {
            name.format(source): self.point(plain, {s: float(s == source) for s in self.sources})
            for source in self.sources
        }
        points = {
            "uniform soup": self.point(plain, dict.fromkeys(self.sources, 1 / len(self.sources)))
        }
        for scale in (0.5, 0.7):
            points[f"{plain.replace('_', ' ')} {scale}"] = self.point(
                plain, dict.fromkeys(self.sources, scale)
            )
        for method in self.methods:
            if method in dense:
                density = 0.2 if method == "ties" else 0.5
                points[f"{method} at density {density}"] = self.point(
                    method, dict.fromkeys(self.sources, 0.7), density
                )
            elif method != plain:
                points[method] = self.point(method, dict.fromkeys(self.sources, 0.7))
        known = {self.recipe(point).key for point in alone.values()}
        for label, point in points.items():
            if (key := self.recipe(point).key) not in known:
                known.add(key)
                alone[label] = point
        return alone

    @property
    def holds_sources(self) -> bool:
        """Whether each source alone is a point of the space; where it is not, the start in its place is called `near` it."""
        method = PLAIN if self.subset and METHODS[self._plain].models[0] > 1 else self._plain
        weights = [1.0] if self.subset else [0.0, 1.0]
        whole = not readers("density", (method,)) or self.density.clip(1.0) == 1.0
        return (
            METHODS[method].models[0] == 1
            and whole
            and all(self.weight.clip(weight) == weight for weight in weights)
        )

    @property
    def _plain(self) -> str:
        """The method of the plain starts: one that gives a single model back, and needs no density for it, if there is one."""
        dense = readers("density", self.methods)
        return min(
            readers("weight", self.methods),
            key=lambda method: (METHODS[method].models[0] > 1, method in dense),
        )

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """Knobs that some method reads, besides weight and density."""
        return tuple(parameter for parameter in RANGES if readers(parameter, self.methods))

    def bounds(self, parameter: str) -> tuple[float, float]:
        """Of a method's own parameter; two equal numbers where it is fixed."""
        said = self.method_parameters.get(
            parameter, (RANGES[parameter].low, RANGES[parameter].high)
        )
        return (
            (float(said[0]), float(said[1]))
            if isinstance(said, (tuple, list))
            else (float(said), float(said))
        )

    def per_method(self, kind: str) -> list[str]:
        """Names of what every group of layers with a method of its own has: `gamma`, or `gamma/0`, `gamma/1`, ..."""
        groups = len(self.method_starts)
        return [f"{kind}/{group}" for group in range(groups)] if groups > 1 else [kind]

    @property
    def _layer_mass(self) -> Sequence[float] | None:
        return (
            None
            if self.profile is None
            else self.profile.by_layer(self.architecture).sum(1).tolist()
        )

    @cached_property
    def _opened(self) -> Mapping[str, Weights]:
        return open_weights((self.base, *self.sources.values()))

    def _under(self, parameter: str, group: int) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        """The condition that a group's method reads a parameter; () where every method does."""
        reading = readers(parameter, self.methods)
        return (
            ()
            if len(reading) == len(self.methods)
            else ((self.per_method("method")[group], reading),)
        )

    def _masses(self, profile: DeltaProfile) -> dict[str, float]:
        """Name -> squared norm of the deltas that the parameter governs; by one pass over the tensors."""
        masses = dict.fromkeys(self.distributions, 0.0)
        at = {source: profile.names.index(source) for source in self.sources}
        for tensor, name, source, share in self._governed(profile):
            row = profile.mass[tensor]
            if name in masses:
                masses[name] += share * (
                    row[at[source]] if source else sum(row[i] for i in at.values())
                )
        return masses

    def _governed(self, profile: DeltaProfile) -> Iterator[tuple[str, str, str, float]]:
        """(tensor, parameter, source or '' for all, share of the tensor that it governs)."""
        names = {
            kind: {source: split.names(source) for source in self.sources}
            for kind, split in self.splits.items()
        }
        for tensor in profile.mass:
            layer, ahead = self.architecture.layer(tensor), self.architecture.is_embedding(tensor)
            group = group_of(self.method_starts, layer) if layer is not None else 0 if ahead else -1
            for kind in ("method", *self.own_parameters):
                yield tensor, self.per_method(kind)[group], "", 1.0
            for source in self.sources:
                yield tensor, f"use/{source}", source, 1.0
                for kind, split in self.splits.items():
                    for cell, share in split.shares[tensor].items():
                        yield tensor, names[kind][source][cell], source, share
