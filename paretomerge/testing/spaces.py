"""The contract of a search space, for authors of one: each check raises AssertionError with a sentence that says which
law fails, for which parameter and point.

    check_space(MySpace(...))
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.plan import Weights
from paretomerge.recipe import Recipe, Slice, Source
from paretomerge.space.space import SearchSpace

Params = Mapping[str, Any]

_CLOSE = 1e-6
_ROUNDING = 0.01  # of bfloat16


def check_space(space: SearchSpace, points: int = 20, seed: int = 0) -> None:
    """The laws of every space, at its starts and at random points.

    - Conditions name parameters of the space, and values that their parents have.
    - Every start is inside; the first are the sources, one each: what bears a source's name gives its tensors, and what the
      space can only come `near` says so.
    - Every point gives a recipe that can be planned and, unless it is a route, has the base's depth; the same one each time, also
      through YAML.
    - A parameter that does not count changes nothing in the recipe; one that counts changes it.
    - `warm` leads from the recipe of a point to a point of that recipe.
    """
    _check_conditions(space)
    starts = space.starts()
    first = [label.removeprefix("near ") for label in list(starts)[: len(space.sources)]]
    assert first == list(space.sources), f"starts: expected the sources first, got {list(starts)}"
    for label, start in starts.items():
        assert set(start) == set(space.distributions), (
            f"start {label!r}: expected every parameter and no other"
        )
        for name, value in start.items():
            assert _inside(space.distributions[name], value), (
                f"start {label!r}: {name} = {value} is outside {space.distributions[name]}"
            )
    rng = np.random.default_rng(seed)
    drawn = [
        {name: _draw(d, rng) for name, d in space.distributions.items()} for _ in range(points)
    ]
    weights = open_weights((space.base, *space.sources.values()))
    for point in (*starts.values(), *drawn):
        recipe = space.recipe(point)
        route = make_plan(recipe, weights).route
        depth = weights[space.base].architecture.depth
        assert len(route) == depth or space.routed, (
            f"{point}: expected a recipe of {depth} layers, got {len(route)}"
        )
        assert recipe.key == space.recipe(dict(point)).key, (
            f"{point}: the recipe differs the second time"
        )
        assert recipe.key == Recipe.from_yaml(recipe.to_yaml()).key, (
            f"{point}: the recipe changes on its way through YAML"
        )
        back = space.recipe(space.warm(recipe))
        assert same_recipe(recipe, back), (
            f"{point}: warm leads to another recipe:\n{recipe.to_yaml()}\n{back.to_yaml()}"
        )
    _check_what_counts(space, drawn, rng)
    _check_sources(space, starts, weights)


def counts(space: SearchSpace, name: str, point: Params) -> bool:
    """Whether a parameter counts at a point."""
    return all(point[parent] in values for parent, values in space.conditions.get(name, ()))


def same_recipe(a: Recipe, b: Recipe) -> bool:
    """Whether two recipes say the same, numbers compared to rounding."""
    return _same([r.to_dict() for r in (*a.steps, a)], [r.to_dict() for r in (*b.steps, b)])


def _check_conditions(space: SearchSpace) -> None:
    for name, parents in space.conditions.items():
        assert name in space.distributions, f"conditions: {name} is no parameter of the space"
        assert parents, f"conditions: {name} has none; leave it out"
        for parent, values in parents:
            told = space.distributions.get(parent)
            assert isinstance(told, (CategoricalDistribution, IntDistribution)), (
                f"conditions: {name} depends on {parent}, which is no choice and no integer of the space"
            )
            assert values and all(_inside(told, v) for v in values), (
                f"conditions: {name} needs {parent} in {values}, outside {told}"
            )


def _check_sources(
    space: SearchSpace, starts: Mapping[str, Params], weights: Mapping[str, Weights]
) -> None:
    for source, path in space.sources.items():
        if source in starts:
            alone = Recipe(
                "task_arithmetic", (Slice((Source(path, None, {"weight": 1.0}),)),), space.base
            )
            merged = dict(merged_tensors(make_plan(space.recipe(starts[source]), weights)))
            for name, tensor in merged_tensors(make_plan(alone, weights)):
                same = torch.allclose(
                    merged[name].float(), tensor.float(), rtol=_ROUNDING, atol=_CLOSE
                )
                assert same, (
                    f"start {source!r}: {name} is not that of the source; call a start that is only near one `near {source}`"
                )


def _check_what_counts(
    space: SearchSpace, drawn: Sequence[Params], rng: np.random.Generator
) -> None:
    """At some points one choice can hide another's effect; a parameter must count somewhere."""
    effective: dict[str, bool] = {}
    for point in drawn:
        key = space.recipe(point).key
        for name, distribution in space.distributions.items():
            value = _draw(distribution, rng, point[name])
            if value == point[name]:
                continue
            changed = space.recipe({**point, name: value}).key != key
            if counts(space, name, point):
                effective[name] = effective.get(name, False) or changed
            else:
                assert not changed, f"{name} does not count at {point}, and changes the recipe"
    idle = [name for name, changed in effective.items() if not changed]
    assert not idle, (
        f"{idle[0]} counts at {sum(counts(space, idle[0], p) for p in drawn)} points, and changes no recipe"
    )


def _draw(distribution: BaseDistribution, rng: np.random.Generator, other_than: Any = None) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        choices = [choice for choice in distribution.choices if choice != other_than] or list(
            distribution.choices
        )
        return choices[int(rng.integers(len(choices)))]
    if isinstance(distribution, IntDistribution):
        return int(rng.integers(distribution.low, distribution.high + 1))
    assert isinstance(distribution, FloatDistribution), (
        f"expected a float, int or categorical parameter, got {distribution}"
    )
    return float(rng.uniform(distribution.low, distribution.high))


def _inside(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return bool(distribution.low <= value <= distribution.high)  # type: ignore[attr-defined]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= _CLOSE
    return bool(a == b)
