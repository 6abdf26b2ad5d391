"""The space of lineages: each trial is a source, or a merge of two earlier trials."""

from dataclasses import replace

import pytest

from paretomerge.errors import ConfigError
from paretomerge.recipe import Recipe
from paretomerge.space.lineage import CROSSOVER, LINEAR, SOURCE, LineageSearchSpace
from paretomerge.testing import check_space


class Book:
    """Trials by number, as the record has them."""

    def __init__(self):
        self.recipes = []

    def recipe(self, number):
        if number >= len(self.recipes):
            raise ConfigError(f"trial {number}: there is none")
        return self.recipes[number]

    def number(self, recipe):
        keys = [one.key for one in self.recipes]
        if recipe.key not in keys:
            raise ConfigError("there is no such trial")
        return keys.index(recipe.key)


@pytest.fixture
def space(pico):
    """A space with three sources and six merges of them."""
    sources = {name: f"{pico}/{name}" for name in ("ada", "bob", "cyd")}
    book = Book()
    space = LineageSearchSpace(f"{pico}/base", sources, book, most=9)
    for params in space.baselines().values():
        book.recipes.append(space.recipe(params))
    merges = [
        space.point(CROSSOVER, first=0, second=1, t=0.5, crossover_rate=0.5, seed=7),
        space.point(LINEAR, first=3, second=2, t=0.25),
        space.point(CROSSOVER, first=4, second=3, t=1.0, crossover_rate=0.1, seed=8),
        space.point(CROSSOVER, first=5, second=4, t=0.5, crossover_rate=0.5, seed=9),
        space.point(LINEAR, first=0, second=2, t=0.5),
        space.point(CROSSOVER, first=6, second=7, t=0.5, crossover_rate=0.5, seed=3),
    ]
    for params in merges:
        book.recipes.append(space.recipe(params))
    return space


def test_the_contract_of_spaces(space):
    check_space(space, points=40)


def test_a_recipe_is_self_contained_and_equal_parents_are_one_step(space, pico):
    recipe = space.individuals.recipe(6)
    # Trial 3 is a parent of 4 and of 5, and is there once; sources are read from disk.
    assert [step.name for step in recipe.steps] == ["trial-3", "trial-4", "trial-5"]
    assert set(recipe.source_models) == {f"{pico}/{n}" for n in ("ada", "bob", "cyd")}
    assert recipe.base_model == "trial-5" and recipe.models == ("trial-5", "trial-4")
    # Each generation has the seed of its own mask.
    assert [step.seed for step in recipe.steps] == [7, 0, 8] and recipe.seed == 9
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_steps_stay_in_their_order_in_a_file(space):
    recipe = space.individuals.recipe(8)
    names = [step.name for step in recipe.steps]
    assert names == ["trial-3", "trial-4", "trial-5", "trial-6", "trial-7"]
    reread = Recipe.from_yaml(recipe.to_yaml())
    # Trial 7 has no step as a parent, and could come first.
    assert [step.name for step in reread.steps] == names
    assert reread.key == recipe.key and space.params_of(reread)["second"] == 7


def test_what_only_a_result_has_does_not_become_a_step(space):
    book = space.individuals
    book.recipes[3] = replace(book.recipes[3], chat_template="chatml", dtype="float32")
    child = space.recipe(space.point(LINEAR, first=3, second=2, t=0.5))
    (step,) = child.steps
    assert step.chat_template is None and step.dtype == "float32"


def test_a_trial_merged_with_itself_is_that_trial(space):
    for method in (LINEAR, CROSSOVER):
        source = space.recipe(space.point(method, first=1, second=1))
        assert source == space.individuals.recipe(1)
        merge = space.recipe(space.point(method, first=4, second=4))
        assert merge.models == ("trial-4",) and merge.merge_method == LINEAR


def test_parents_that_are_not_there(space):
    with pytest.raises(ConfigError, match="trial 9: there is none"):
        space.recipe(space.point(LINEAR, first=9, second=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"merge_method": "slerp", "parameters": {"t": 0.5}},
        {"parameters": {"t": 0.5, "crossover_rate": [0.1, 0.9]}},
        {"parameters": {"t": 2.0, "crossover_rate": 0.5}},
        {"parameters": {"t": 0.5}, "seed": 2**40},
        {"base_model": "trial-4"},
        {"steps": ()},
    ],
)
def test_recipes_outside_the_space_are_refused(space, changes):
    recipe = space.individuals.recipe(6)
    assert space.params_of(recipe)["first"] == 5
    with pytest.raises(ConfigError):
        space.params_of(replace(recipe, **changes))


@pytest.mark.parametrize(
    "text",
    [
        "{merge_method: linear, models: [{model: A}, {model: B}, {model: C}]}",
        "{merge_method: linear, models: [{model: A}, {model: B}]}",
        "{merge_method: linear, models: [{model: A, parameters: {weight: 1}},"
        " {model: B, parameters: {weight: 1}}]}",
        "{merge_method: linear, models: [{model: elsewhere}]}",
        "{merge_method: passthrough, slices: [{sources: [{model: A, layer_range: [0, 1]}]}]}",
    ],
)
def test_other_recipes_are_refused(space, pico, text):
    for letter, name in zip("ABC", ("ada", "bob", "cyd"), strict=True):
        text = text.replace(f"model: {letter}", f"model: {pico}/{name}")
    with pytest.raises(ConfigError):
        space.params_of(Recipe.from_yaml(text))


def test_sources_are_the_baselines(space):
    points = space.baselines()
    assert list(points) == ["ada", "bob", "cyd"]
    assert {point["method"] for point in points.values()} == {SOURCE}
    assert not space.routed and not space.notes
