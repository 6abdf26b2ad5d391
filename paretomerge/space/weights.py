"""Parameter space: a weight and a density per source, group of layers and role, and the method as a choice.

Parameters are named `weight/<source>/<group>/<role>`; a level that is not split is left out of the name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from paretomerge.checkpoint.architecture import ROLES, Architecture
from paretomerge.errors import ConfigError, unknown
from paretomerge.merge.methods import METHODS
from paretomerge.recipe import Recipe, Slice, Source

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Dial:
    """How finely a number is split: bounds, groups of consecutive layers, and roles told apart or not."""

    bounds: tuple[float, float]
    layer_groups: int = 1
    roles: bool = False

    def __post_init__(self) -> None:
        if not self.bounds[0] < self.bounds[1]:
            raise ConfigError(f"bounds: expected [low, high] with low < high, got {list(self.bounds)}")


@dataclass(frozen=True)
class WeightSpace:
    """Merges of `sources` (name -> path) over `base`; `architecture` is the base's.

    Weights are free to exceed 1 and are never normalised (Akiba et al. 2024 found best sums near 2).
    """

    base: str
    sources: Mapping[str, str]
    architecture: Architecture
    methods: tuple[str, ...] = ("task_arithmetic", "ties", "dare_ties")
    weight: Dial = field(default_factory=lambda: Dial((0.0, 1.5)))
    density: Dial = field(default_factory=lambda: Dial((0.1, 1.0)))
    seed: int = 0

    def __post_init__(self) -> None:
        deltas = [m for m in METHODS.values() if m.base == "required" and m.check is None]  # della's density is bound by its epsilon
        searchable = [m.name for m in deltas if any(k.name == "weight" and k.default is None for k in m.knobs)]
        for method in self.methods:
            if method not in searchable:
                raise ConfigError(f"space.methods: {unknown('searchable method', method, searchable)}")
        for name, dial in (("weight", self.weight), ("density", self.density)):
            if not 1 <= dial.layer_groups <= self.architecture.depth:
                raise ConfigError(f"space.{name}.layer_groups: expected 1 to {self.architecture.depth}, got {dial.layer_groups}")
        if not (self.density.bounds[0] > 0 and self.density.bounds[1] <= 1):
            raise ConfigError(f"space.density.bounds: expected 0 < low < high <= 1, got {list(self.density.bounds)}")

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, whether or not the chosen method reads it."""
        space: dict[str, BaseDistribution] = {}
        if len(self.methods) > 1:
            space["method"] = CategoricalDistribution(self.methods)
        for source in self.sources:
            space |= {name: FloatDistribution(*self.weight.bounds) for name in self._names("weight", self.weight, source)}
            if self._dense():
                space |= {name: FloatDistribution(*self.density.bounds) for name in self._names("density", self.density, source)}
        return space

    @property
    def conditions(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Which parameters count only under some methods: name -> ("method", methods that read it)."""
        if len(self.methods) == 1:
            return {}
        names = [n for source in self.sources for n in self._names("density", self.density, source)]
        return {name: ("method", self._dense()) for name in names} if self._dense() else {}

    def recipe(self, params: Params) -> Recipe:
        """The recipe of one point. Layer groups become slices, roles become filters."""
        method = params.get("method", self.methods[0])
        dials = {"weight": self.weight} | ({"density": self.density} if METHODS[method].has_density else {})
        slices = []
        for first, end in self._ranges(dials.values()):
            sources = tuple(
                Source(path, (first, end), {k: self._setting(params, k, d, name, first) for k, d in dials.items()})
                for name, path in self.sources.items()
            )
            slices.append(Slice(sources))
        if len(slices) == 1:
            slices = [Slice(tuple(Source(s.model, None, s.parameters) for s in slices[0].sources))]
        normalizes = any(knob.name == "normalize" for knob in METHODS[method].knobs)
        return Recipe(method, tuple(slices), self.base, {"normalize": False} if normalizes else {}, seed=self.seed)

    def point(self, method: str, weights: Mapping[str, float], density: float = 1.0) -> dict[str, Any]:
        """The parameters at which every part of a source has one weight (clipped to the bounds)."""
        point: dict[str, Any] = {}
        low, high = self.density.bounds
        for name in self.distributions:
            kind, _, rest = name.partition("/")
            if kind == "method":
                point[name] = method
            elif kind == "density":
                point[name] = min(max(density, low), high)
            else:
                point[name] = min(max(weights[rest.split("/")[0]], self.weight.bounds[0]), self.weight.bounds[1])
        return point

    def starts(self) -> dict[str, dict[str, Any]]:
        """Known good points to begin with: each source alone, the soup, task arithmetic, TIES and DARE as published."""
        equal = 1 / len(self.sources)
        plain = next((m for m in self.methods if not METHODS[m].has_density), self.methods[0])
        points = {}
        for source in self.sources:
            points[source] = self.point(plain, {s: float(s == source) for s in self.sources})
        points["uniform soup"] = self.point(plain, dict.fromkeys(self.sources, equal))
        for scale in (0.5, 0.7):
            points[f"task arithmetic {scale}"] = self.point(plain, dict.fromkeys(self.sources, scale))
        for method in self.methods:
            if METHODS[method].has_density:
                density = 0.2 if method == "ties" else 0.5
                points[f"{method} at density {density}"] = self.point(method, dict.fromkeys(self.sources, 0.7), density)
        return points

    def _dense(self) -> tuple[str, ...]:
        return tuple(m for m in self.methods if METHODS[m].has_density)

    def _names(self, kind: str, dial: Dial, source: str) -> list[str]:
        groups = [f"/{g}" for g in range(dial.layer_groups)] if dial.layer_groups > 1 else [""]
        roles = [f"/{r}" for r in ROLES] if dial.roles else [""]
        return [f"{kind}/{source}{group}{role}" for group in groups for role in roles]

    def _setting(self, params: Params, kind: str, dial: Dial, source: str, layer: int) -> Any:
        group = f"/{layer * dial.layer_groups // self.architecture.depth}" if dial.layer_groups > 1 else ""
        if not dial.roles:
            return float(params[f"{kind}/{source}{group}"])
        entries = [
            {"filter": pattern, "value": float(params[f"{kind}/{source}{group}/{role}"])}
            for role in ROLES[:-1]
            for pattern in self.architecture.filters(role)
        ]
        return [*entries, {"value": float(params[f"{kind}/{source}{group}/{ROLES[-1]}"])}]

    def _ranges(self, dials: Any) -> Iterator[tuple[int, int]]:
        depth = self.architecture.depth
        groups = [tuple(layer * d.layer_groups // depth for d in dials) for layer in range(depth)]
        first = 0
        for layer in range(1, depth + 1):
            if layer == depth or groups[layer] != groups[first]:
                yield first, layer
                first = layer


def named_sources(models: Sequence[str]) -> dict[str, str]:
    """Short names for paths: the last part, or the whole path where two would be alike."""
    short = [Path(model).name for model in models]
    return {(s if short.count(s) == 1 else m.replace("/", "_")): m for s, m in zip(short, models, strict=True)}
