"""Recipes from programs: wrong arguments, numpy's numbers, hashes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paretomerge.errors import RecipeError
from paretomerge.recipe import Recipe

PLAIN = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recipe.load(None), "^recipe: expected a path, got None"),
        (lambda: Recipe.load(""), "^recipe: expected a path"),
        (lambda: Recipe.load("~/missing.yml"), "no such file"),
        (lambda: Recipe.from_yaml(Path("r.yml")), r"use Recipe\.load\(path\)"),
        (lambda: Recipe.from_yaml(None), "^recipe: expected YAML text, got None"),
        (lambda: Recipe("linear", dtype="foo"), "^recipe: dtype: unknown dtype 'foo'"),
        (
            lambda: replace(Recipe.from_dict(PLAIN), out_dtype="foo"),
            "^recipe: out_dtype: unknown dtype 'foo'",
        ),
        (
            lambda: Recipe.from_dict(
                {**PLAIN, "parameters": {"t": np.array([np.nan])}}
            ),
            "numbers must be finite",
        ),
        (
            lambda: Recipe.from_dict({**PLAIN, "parameters": {"t": np.float32("inf")}}),
            "numbers must be finite",
        ),
    ],
)
def test_what_is_no_recipe(build, message):
    with pytest.raises(RecipeError, match=message):
        build()


def test_data_of_programs_becomes_plain():
    ours = Recipe.from_dict(
        {
            "merge_method": "linear",
            "models": (
                {"model": Path("a"), "parameters": {"weight": np.float32(0.5)}},
                {"model": "b", "parameters": {"weight": (0, np.int64(1))}},
            ),
            "parameters": {"t": np.array([0.0, 1.5])},
            "seed": np.int64(3),
            "dtype": "torch.bfloat16",
        }
    )
    plain = Recipe.from_dict(
        {
            "merge_method": "linear",
            "models": [
                {"model": "a", "parameters": {"weight": 0.5}},
                {"model": "b", "parameters": {"weight": [0, 1]}},
            ],
            "parameters": {"t": [0.0, 1.5]},
            "seed": 3,
            "dtype": "bfloat16",
        }
    )
    assert ours == plain and ours.key == plain.key
    assert Recipe.from_yaml(ours.to_yaml()) == plain


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe.from_dict(PLAIN)
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    assert Recipe.load("~/r.yml") == recipe


def test_equal_recipes_have_equal_hashes():
    whole = Recipe.from_dict({**PLAIN, "parameters": {"t": 1, "weight": [0, 1]}})
    same = Recipe.from_dict({**PLAIN, "parameters": {"weight": [0.0, 1.0], "t": 1.0}})
    other = Recipe.from_dict({**PLAIN, "parameters": {"t": 2}})
    assert whole == same and hash(whole) == hash(same)
    assert len({whole, same, other, Recipe.from_dict(PLAIN)}) == 3
    assert len({replace(other, steps=whole.as_steps("s")), other}) == 2
