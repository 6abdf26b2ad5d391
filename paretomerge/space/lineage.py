"""A space of lineages: each trial is a source, or a merge of two earlier trials.

A merge of merges is a recipe with steps: the recipes of both parents, down to the sources. Nothing
but recipes is stored. A step is named after its trial, and the same trial is one step, however
often its descendants use it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.errors import ConfigError
from paretomerge.recipe import Recipe
from paretomerge.types import Conditions, Params, ParamValue

SOURCE = "source"
"""The method of a trial that is a source alone."""
LINEAR = "linear"
"""The method of a weighted mean of both parents."""
CROSSOVER = "crossover"
"""The method that takes the second parent's part on a random mask; see docs/methods.md."""

_MOST_TRIALS = 1_000_000
_MOST_SEED = 2**31 - 1
_STEP = re.compile(r"trial-(\d+)")
# What stands in parameters that are inactive.
_INACTIVE: Params = {
    "first": 0,
    "second": 0,
    "t": 0.5,
    "crossover_rate": 0.5,
    "seed": 0,
}


class Individuals(Protocol):
    """The trials that others may be merged from."""

    def recipe(self, number: int) -> Recipe:
        """Return the recipe of a trial that was scored.

        Raises:
            ConfigError: There is no such trial.
        """
        ...

    def number(self, recipe: Recipe) -> int:
        """Return the number of the first trial with a recipe: the inverse of `recipe`.

        Raises:
            ConfigError: There is no such trial.
        """
        ...


@dataclass(frozen=True)
class LineageSearchSpace:
    """Sources, and merges of two earlier trials of the study.

    Parameters: `method`; for a source its name, `source`; for a merge the numbers of both parents,
    `first` and `second`, and the second one's share `t`; for a crossover the `crossover_rate` and
    the `seed` of its mask.

    Attributes:
        base: The base model.
        sources: Name -> path of the fine-tunes.
        individuals: Where the recipes of earlier trials are found.
        most: The number of trials that parents may be chosen from.
    """

    base: str
    sources: Mapping[str, str]
    individuals: Individuals
    most: int = _MOST_TRIALS

    @property
    def routed(self) -> bool:
        """False: all merges have the base's depth."""
        return False

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter and its distribution."""
        last = self.most - 1
        return {
            "method": CategoricalDistribution([SOURCE, LINEAR, CROSSOVER]),
            "source": CategoricalDistribution(list(self.sources)),
            "first": IntDistribution(0, last),
            "second": IntDistribution(0, last),
            "t": FloatDistribution(0, 1),
            "crossover_rate": FloatDistribution(0, 1),
            "seed": IntDistribution(0, _MOST_SEED),
        }

    @property
    def conditions(self) -> Conditions:
        """When each parameter is active."""
        of_merges = (("method", (LINEAR, CROSSOVER)),)
        of_crossovers = (("method", (CROSSOVER,)),)
        return {
            "source": (("method", (SOURCE,)),),
            "first": of_merges,
            "second": of_merges,
            "t": of_merges,
            "crossover_rate": of_crossovers,
            "seed": of_crossovers,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing to note."""
        return ()

    def recipe(self, params: Params) -> Recipe:
        """The recipe of a trial, self-contained down to the sources.

        Args:
            params: Its parameters.

        Returns:
            The recipe; the parents and their ancestors are its steps.

        Raises:
            ConfigError: A parent is no trial of the study that was scored.
        """
        method = str(params["method"])
        if method == SOURCE:
            path = self.sources[str(params["source"])]
            return Recipe.from_dict(_one_model(path))
        first_number = _integer(params, "first")
        second_number = _integer(params, "second")
        first, first_steps = self._parent(first_number)
        second, second_steps = self._parent(second_number)
        content: dict[str, object]
        if first == second:
            content = _one_model(first)
        elif method == LINEAR:
            t = _number(params, "t")
            one = {"model": first, "parameters": {"weight": 1 - t}}
            other = {"model": second, "parameters": {"weight": t}}
            content = {"merge_method": LINEAR, "models": [one, other]}
        else:
            shares: dict[str, object] = {
                name: params[name] for name in ("t", "crossover_rate")
            }
            content = {
                "merge_method": CROSSOVER,
                "base_model": first,
                "models": [{"model": first}, {"model": second}],
                "parameters": shares,
                # In the step's own document: each merge has a mask of its own.
                "seed": params["seed"],
            }
        steps = {step.name: step for step in (*first_steps, *second_steps)}
        # Parents have lower numbers than their children. One order for all: a step of this recipe
        # has the steps that it has as a recipe, in the same order.
        ordered = sorted(steps.values(), key=_step_number)
        return replace(Recipe.from_dict(content), steps=tuple(ordered))

    def _parent(self, number: int) -> tuple[str, tuple[Recipe, ...]]:
        """The model that stands for a trial in recipes, and the steps that make it."""
        recipe = self.individuals.recipe(number)
        path = _source_of(recipe)
        if path is not None:
            return path, ()
        name = f"trial-{number}"
        # A step has no chat template: only a result has one.
        itself = replace(recipe, name=name, steps=(), chat_template=None)
        return name, (*recipe.steps, itself)

    def baselines(self) -> dict[str, Params]:
        """The sources alone: a lineage begins with them."""
        points: dict[str, Params] = {}
        for name in self.sources:
            points[name] = self.point(SOURCE, source=name)
        return points

    def point(self, method: str, **active: ParamValue) -> dict[str, ParamValue]:
        """A value for every parameter.

        Args:
            method: The method.
            **active: The parameters that it has; the others get a fixed value.

        Returns:
            Parameter -> value.
        """
        first_source = next(iter(self.sources))
        return {"method": method, "source": first_source, **_INACTIVE, **active}

    def params_of(self, recipe: Recipe) -> Params:
        """The parameters of a recipe of this space.

        Args:
            recipe: A source alone, or a merge of two trials of the study.

        Returns:
            The parameters that give it.

        Raises:
            ConfigError: It is no such recipe.
        """
        path = _source_of(recipe)
        names = {model: name for name, model in self.sources.items()}
        if path in names:
            return self.point(SOURCE, source=names[path])
        params = self._params_of_merge(recipe)
        same = params is not None and _content(self.recipe(params)) == _content(recipe)
        if params is None or not same:
            raise ConfigError(
                "a lineage has sources, linear merges of two trials and crossovers, and not this "
                f"{recipe.merge_method} recipe; leave it out"
            )
        return params

    def _params_of_merge(self, recipe: Recipe) -> Params | None:
        """The parameters of a merge; None where it has not the form of one of this space."""
        if len(recipe.slices) != 1:
            return None
        sources = recipe.slices[0].sources
        if not 1 <= len(sources) <= 2:
            return None
        numbers = [self._number_of(recipe, source.model) for source in sources]
        active: dict[str, ParamValue] = {"first": numbers[0], "second": numbers[-1]}
        if recipe.merge_method == LINEAR:
            active["t"] = sources[-1].parameters.get("weight")
        elif recipe.merge_method == CROSSOVER:
            active |= recipe.parameters
            active["seed"] = recipe.seed
        else:
            return None
        params = self.point(recipe.merge_method, **active)
        is_in_space = all(_is_in(self, name, params.get(name)) for name in _INACTIVE)
        return params if is_in_space else None

    def _number_of(self, recipe: Recipe, model: str) -> int:
        """The number of the trial that a model of a recipe is."""
        if model in self.sources.values():
            return self.individuals.number(Recipe.from_dict(_one_model(model)))
        return self.individuals.number(_step_alone(recipe, model))


def _one_model(model: str) -> dict[str, object]:
    """A recipe that hands over one model as it is, bit for bit."""
    whole = {"model": model, "parameters": {"weight": 1.0}}
    return {"merge_method": LINEAR, "models": [whole]}


def _source_of(recipe: Recipe) -> str | None:
    """The source that a recipe hands over as it is; None for merges."""
    if recipe.steps or recipe.merge_method != LINEAR or len(recipe.models) != 1:
        return None
    return recipe.models[0]


def _content(recipe: Recipe) -> str:
    """What is merged, without how the result is stored and which chats it reads."""
    plain = replace(recipe, name=None, dtype=None, chat_template=None)
    return plain.key


def _is_in(space: LineageSearchSpace, name: str, value: ParamValue) -> bool:
    """Whether a number may be the value of a parameter."""
    distribution = space.distributions[name]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return distribution.low <= value <= distribution.high


def _step_number(step: Recipe) -> int:
    match = _STEP.fullmatch(step.name or "")
    assert match is not None
    return int(match[1])


def _step_alone(recipe: Recipe, name: str) -> Recipe:
    """A step as a recipe, with those steps that it uses."""
    needed = {name}
    kept: list[Recipe] = []
    # From the last step to the first: each comes after those that it uses.
    for step in reversed(recipe.steps):
        if step.name in needed:
            needed.update(step.models)
            kept.insert(0, step)
    if not kept or kept[-1].name != name:
        raise ConfigError(f"{name} is neither a source of the study nor a step")
    return replace(kept[-1], name=None, steps=tuple(kept[:-1]))


def _integer(params: Params, name: str) -> int:
    value = params[name]
    assert isinstance(value, int)
    return value


def _number(params: Params, name: str) -> float:
    value = params[name]
    assert isinstance(value, int | float)
    return float(value)
