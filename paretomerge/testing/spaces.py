"""The contract of a search space, for authors of one.

Each check raises AssertionError with a message that names the law, the parameter and the point:

    check_space(MySpace(...))
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

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
from paretomerge.types import Params, ParamValue

_TOLERANCE = 1e-6

_BFLOAT16_ROUNDING = 0.01
"""Relative; bfloat16 has 8 bits of precision."""


def check_space(
    space: SearchSpace,
    points: int = 20,
    seed: int = 0,
) -> None:
    """Check the laws of every space, at its baseline recipes and at random points.

    - Conditions name parameters of the space, and values that their parents can have.
    - Every baseline recipe (`starts`) is inside the space. The sources come first, one each. The
      recipe under a source's name gives its tensors; one that does not is called `near <name>`.
    - Every point gives a recipe that can be planned. It has the base's depth, unless it is a route.
      It is the same recipe each time, also after a round trip through YAML.
    - An inactive parameter changes nothing in the recipe, an active one changes it.
    - `params_of` maps the recipe of a point to a point that has the same recipe.

    Args:
        space: The space to check.
        points: Number of random points.
        seed: Seed of the random points.

    Raises:
        AssertionError: The space violates a law.
    """
    _check_conditions(space)
    starts = space.baselines()
    _check_starts(space, starts)
    rng = np.random.default_rng(seed)
    random_points = [_random_point(space, rng) for _ in range(points)]
    # Opened once for all points.
    models = [space.base, *space.sources.values()]
    weights = open_weights(models)
    for params in (*starts.values(), *random_points):
        _check_recipe(space, params, weights)
    _check_activity(space, random_points, rng)
    _check_source_tensors(space, starts, weights)


def is_active(
    space: SearchSpace,
    name: str,
    params: Params,
) -> bool:
    """Return whether a parameter is active, given the values of its parents."""
    conditions = space.conditions.get(name, ())
    return all(params[parent] in values for parent, values in conditions)


def same_recipe(a: Recipe, b: Recipe) -> bool:
    """Return whether two recipes are equal up to rounding of numbers."""
    documents_a = _documents(a)
    documents_b = _documents(b)
    return _same(documents_a, documents_b)


def _documents(recipe: Recipe) -> list[dict[str, object]]:
    return [document.to_dict() for document in (*recipe.steps, recipe)]


def _check_conditions(space: SearchSpace) -> None:
    for name, conditions in space.conditions.items():
        assert name in space.distributions, (
            f"conditions: {name} is not a parameter of the space"
        )
        assert conditions, f"conditions: {name} has none; leave it out"
        for parent, values in conditions:
            distribution = space.distributions.get(parent)
            assert isinstance(
                distribution, (CategoricalDistribution, IntDistribution)
            ), (
                f"conditions: {name} depends on {parent}, "
                "which is not a categorical or integer parameter of the space"
            )
            # A parameter without a possible value of its parent would never be active.
            assert values, (
                f"conditions: {name} needs {parent} to have none of its values"
            )
            for value in values:
                assert _contains(distribution, value), (
                    f"conditions: {name} needs {parent} = {value}, outside {distribution}"
                )


def _check_starts(space: SearchSpace, starts: Mapping[str, Params]) -> None:
    # A study takes its reference point from the first trials, which must be the sources.
    labels = list(starts)
    n_sources = len(space.sources)
    first_labels = labels[:n_sources]
    names = [label.removeprefix("near ") for label in first_labels]
    assert names == list(space.sources), (
        f"starts: expected the sources first, got {labels}"
    )
    for label, params in starts.items():
        assert set(params) == set(space.distributions), (
            f"start {label!r}: expected every parameter and no other"
        )
        for name, value in params.items():
            distribution = space.distributions[name]
            assert _contains(distribution, value), (
                f"start {label!r}: {name} = {value} is outside {distribution}"
            )


def _check_recipe(
    space: SearchSpace,
    params: Params,
    weights: Mapping[str, Weights],
) -> None:
    recipe = space.recipe(params)
    plan = make_plan(recipe, weights)
    layers = len(plan.route)
    base = weights[space.base]
    depth = base.architecture.depth
    assert space.routed or layers == depth, (
        f"{params}: expected a recipe of {depth} layers, got {layers}"
    )
    again = space.recipe(dict(params))
    assert recipe.key == again.key, f"{params}: the recipe differs the second time"
    # Recipes are written to YAML files and read back.
    text = recipe.to_yaml()
    reread = Recipe.from_yaml(text)
    assert recipe.key == reread.key, (
        f"{params}: the recipe changes on its way through YAML"
    )
    # The parameters may differ: inactive ones are free.
    params_of_recipe = space.params_of(recipe)
    back = space.recipe(params_of_recipe)
    assert same_recipe(recipe, back), (
        f"{params}: params_of leads to another recipe:\n{recipe.to_yaml()}\n{back.to_yaml()}"
    )


def _check_source_tensors(
    space: SearchSpace,
    starts: Mapping[str, Params],
    weights: Mapping[str, Weights],
) -> None:
    """The recipe under a source's name gives the source's tensors."""
    for source, path in space.sources.items():
        if source not in starts:
            continue
        recipe = space.recipe(starts[source])
        plan = make_plan(recipe, weights)
        tensors = dict(merged_tensors(plan))
        for name, expected in _source_tensors(space, path, weights):
            # base + (source - base) rounds differently under different methods.
            same = torch.allclose(
                tensors[name].float(),
                expected.float(),
                rtol=_BFLOAT16_ROUNDING,
                atol=_TOLERANCE,
            )
            assert same, (
                f"start {source!r}: {name} is not that of the source; "
                f"call a start that is only near one `near {source}`"
            )


def _source_tensors(
    space: SearchSpace,
    path: str,
    weights: Mapping[str, Weights],
) -> Iterator[tuple[str, torch.Tensor]]:
    """A source's tensors, under the base's names and in its dtype."""
    source = Source(path, None, {"weight": 1.0})
    recipe = Recipe(
        merge_method="task_arithmetic",
        slices=(Slice((source,)),),
        base_model=space.base,
    )
    plan = make_plan(recipe, weights)
    return merged_tensors(plan)


def _check_activity(
    space: SearchSpace,
    points: Sequence[Params],
    rng: np.random.Generator,
) -> None:
    """Inactive parameters change no recipe, active ones change at least one.

    At a single point a choice can hide the effect of an active parameter, so one effect is enough.
    """
    n_active: Counter[str] = Counter()
    effective = set()
    for params in points:
        recipe = space.recipe(params)
        for name, distribution in space.distributions.items():
            old_value = params[name]
            value = _draw(distribution, rng, other_than=old_value)
            if value == old_value:
                continue
            changed_params = {**params, name: value}
            changed_recipe = space.recipe(changed_params)
            is_changed = changed_recipe.key != recipe.key
            if not is_active(space, name, params):
                assert not is_changed, (
                    f"{name} is inactive at {params}, and changes the recipe"
                )
                continue
            n_active[name] += 1
            if is_changed:
                effective.add(name)
    for name, count in n_active.items():
        assert name in effective, (
            f"{name} is active at {count} points, and changes no recipe"
        )


def _random_point(space: SearchSpace, rng: np.random.Generator) -> Params:
    params = {}
    for name, distribution in space.distributions.items():
        params[name] = _draw(distribution, rng)
    return params


def _draw(
    distribution: BaseDistribution,
    rng: np.random.Generator,
    other_than: ParamValue = None,
) -> ParamValue:
    """Draw a value. A categorical parameter gets another one than `other_than` if it has one."""
    if isinstance(distribution, CategoricalDistribution):
        choices = [choice for choice in distribution.choices if choice != other_than]
        # A parameter with a single choice has no other one.
        if not choices:
            choices = list(distribution.choices)
        index = int(rng.integers(len(choices)))
        return choices[index]
    if isinstance(distribution, IntDistribution):
        # NumPy excludes the upper bound, Optuna includes it.
        value = rng.integers(distribution.low, distribution.high + 1)
        return int(value)
    assert isinstance(distribution, FloatDistribution), (
        f"expected a float, int or categorical parameter, got {distribution}"
    )
    number = rng.uniform(distribution.low, distribution.high)
    return float(number)


def _contains(distribution: BaseDistribution, value: ParamValue) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    assert isinstance(value, (int, float)), f"expected a number, got {value!r}"
    return distribution.low <= value <= distribution.high


def _same(a: object, b: object) -> bool:
    """Whether two documents are equal, numbers compared up to rounding."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return False
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return False
        return all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= _TOLERANCE
    return a == b
