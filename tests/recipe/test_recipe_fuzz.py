"""Any text gives a Recipe or a RecipeError, in bounded time and memory.

What is written is what was read.
"""

import copy
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretomerge.errors import RecipeError
from paretomerge.recipe import Recipe
from paretomerge.recipe.text import dump

LONG = int(os.environ.get("PARETOMERGE_FUZZ", "0"))  # examples, for a long run by hand
FEW = settings(
    max_examples=LONG or 50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

NAMES = st.sampled_from(
    [
        "a",
        "owner/b",
        "./c",
        "d+e",
        "owner/f@main",
        "g h",
        "-",
        "1e5",
        "yes",
        "ü",
        "x: y",
        "null",
        "~",
        "---",
        "#",
        "|",
    ]
)
NUMBERS = st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from([1e-7, 1e30, 0.1])
SCALARS = NUMBERS | st.booleans() | st.sampled_from(["inverse_density", "x"])
GRADIENTS = st.lists(NUMBERS, min_size=1, max_size=3)
FILTERS = st.lists(
    st.fixed_dictionaries(
        {"value": NUMBERS | GRADIENTS},
        optional={"filter": st.sampled_from(["mlp", "*", ".2."]) | st.none()},
    ),
    min_size=1,
    max_size=3,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["weight", "density", "lambda", "t", "1", "no"]),
    SCALARS | GRADIENTS | FILTERS,
    max_size=3,
)
MODEL = st.fixed_dictionaries({"model": NAMES}, optional={"parameters": PARAMETERS})


@st.composite
def slices(draw: st.DrawFn) -> dict[str, Any]:
    first, length = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    sources = draw(st.lists(MODEL, min_size=1, max_size=3))
    piece: dict[str, Any] = {
        "sources": [
            {**source, "layer_range": [first, first + length]} for source in sources
        ]
    }
    return {**piece, "parameters": draw(PARAMETERS)} if draw(st.booleans()) else piece


CONTENT = st.one_of(
    st.fixed_dictionaries({"models": st.lists(MODEL, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"slices": st.lists(slices(), min_size=1, max_size=2)}),
)
MODULES = st.dictionaries(
    st.sampled_from(["default", "visual", "1"]), CONTENT, min_size=1, max_size=2
)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "source": NAMES
        | st.fixed_dictionaries(
            {
                "kind": st.just("model_token"),
                "model": NAMES,
                "token_id": st.integers(0, 3),
            }
        ),
        "force": st.booleans(),
    },
)
TOKENIZERS = st.fixed_dictionaries(
    {},
    optional={
        "source": st.sampled_from(["union", "base"]) | NAMES,
        "tokens": st.dictionaries(st.text(min_size=1, max_size=3), RULES, max_size=2),
        "pad_to_multiple_of": st.integers(1, 64) | st.none(),
    },
)
DTYPES = st.sampled_from(["float32", "bfloat16", None])


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    data = {
        "merge_method": draw(NAMES),
        **draw(CONTENT | st.fixed_dictionaries({"modules": MODULES})),
    }
    more = {
        "base_model": NAMES | st.none(),
        "parameters": PARAMETERS | st.none(),
        "dtype": DTYPES,
        "out_dtype": DTYPES,
        "chat_template": st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
            min_size=1,
            max_size=5,
        ),
        "seed": st.integers(0, 99),
        "name": NAMES,
    }
    data |= {key: draw(kind) for key, kind in more.items() if draw(st.booleans())}
    vocabulary = draw(st.sampled_from([None, "tokenizer", "tokenizer_source"]))
    return (
        data
        if vocabulary is None
        else {
            **data,
            vocabulary: draw(TOKENIZERS if vocabulary == "tokenizer" else NAMES),
        }
    )


def same_when_written(recipe: Recipe) -> None:
    again = Recipe.from_yaml(recipe.to_yaml())
    assert (
        again == recipe
        and again.key == recipe.key
        and again.to_yaml() == recipe.to_yaml()
    )
    assert set(recipe.source_models) <= {
        m for r in (*recipe.steps, recipe) for m in r.models
    }


@FEW
@given(documents())
def test_what_is_written_is_what_was_read(data: dict[str, Any]) -> None:
    before = copy.deepcopy(data)
    recipe = Recipe.from_dict(data)
    same_when_written(recipe)
    assert recipe == Recipe.from_yaml(dump(data))
    assert data == before
    assert recipe.rename_models(lambda model: model) == recipe


@FEW
@given(st.lists(documents(), min_size=2, max_size=3), st.data())
def test_several_documents_are_what_was_read(
    several: list[dict[str, Any]], data: st.DataObject
) -> None:
    for i, document in enumerate(several):
        document["name"] = f"step {i}"
    if data.draw(st.booleans()):
        del several[-1]["name"]
    if data.draw(st.booleans()) and "models" in several[-1]:
        several[-1]["models"][0]["model"] = "step 0"
    recipe = Recipe.from_yaml("---\n".join(dump(d) for d in several))
    assert len(recipe.steps) == len(several) - 1
    same_when_written(recipe)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.dates()
    | st.binary(max_size=2)
    | NAMES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.integers() | st.none(), inner, max_size=3
        )
    ),
    max_leaves=12,
)


def read(text: str) -> None:
    try:
        recipe = Recipe.from_yaml(text)
    except RecipeError as error:
        assert len(str(error)) < 10_000
    else:
        same_when_written(recipe)


@FEW
@given(documents(), st.data())
def test_a_changed_recipe_is_a_recipe_or_an_error(
    document: dict[str, Any], data: st.DataObject
) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        places: list[tuple[Any, Any]] = []
        stack: list[Any] = [document]
        while stack:
            part = stack.pop()
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            places += [(part, key) for key in keys]
            stack += [part[key] for key in keys if isinstance(part[key], (dict, list))]
        if not places:
            break
        part, key = data.draw(st.sampled_from(places))
        value = data.draw(ANY)
        if isinstance(part, dict) and data.draw(st.booleans()):
            held = part.pop(key)
            part[data.draw(st.text(max_size=5) | st.integers() | NAMES)] = held
        else:
            part[key] = value
    read(dump(document))


@FEW
@given(ANY)
def test_any_data_is_a_recipe_or_an_error(data: Any) -> None:
    read(dump(data))


LINES = [
    "merge_method: ties",
    "models:",
    "- model: a",
    "  parameters: {weight: 1e-5}",
    "slices:",
    "---",
    "...",
    "&a",
    "*a",
    "<<: *a",
    "? ",
    ": ",
]
LINES += [
    "[",
    "]",
    "{",
    "}",
    "!!set",
    "!!omap",
    "!!python/name:os.system",
    "%YAML 1.1",
    "\t",
    "0x1F",
    "2001-01-01",
    ".nan",
    "'",
    '"',
    "\\",
    "|",
    ">",
]


@FEW
@given(
    st.lists(st.sampled_from(LINES) | st.text(max_size=6), max_size=12).map(
        lambda parts: "\n".join(parts)
    )
    | st.text(max_size=40)
)
def test_any_text_is_a_recipe_or_an_error(text: str) -> None:
    read(text)


HEAD = "merge_method: linear\nmodels: [{model: a}]\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "a: &a [x, x, x, x]\n"
            + "".join(
                f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n"
                for b, c in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            "at most",
        ),
        ("&a [" + ",".join(["*a"] * 20_000) + "]", "may have at most"),
        ("&a {merge_method: *a}", "does an alias contain itself"),
        ("&a [*a]", "does an alias contain itself"),
        (
            HEAD + "parameters: &p {weight: [{value: *p}]}",
            "does an alias contain itself",
        ),
        (
            "a: &a {x: 1}\n"
            + "".join(
                f"{c}: &{c} {{<<: [{','.join([f'*{b}'] * 10)}]}}\n"
                for b, c in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            "entries",
        ),
        (
            "a: &a {x: 1}\nb: {<<: [" + ",".join(["*a"] * 2000) + "]}",
            "mappings in `<<`",
        ),
        (
            HEAD + "parameters: {weight: " + "[" * 5000 + "]" * 5000 + "}",
            "nested too deeply",
        ),
        (
            HEAD + "base_model: " + "{model: " * 200 + "a" + "}" * 200,
            "nested more than 50",
        ),
        (
            HEAD + "parameters: {weight: " + "[{value: " * 100 + "1" + "}]" * 100 + "}",
            "nested more than 50",
        ),
        ("x" * 2_000_000, "at most 1,000,000 characters"),
        ("\0", "syntax error"),
        ("\x7fELF\x01\x02", "syntax error"),
        (HEAD + 'name: "a\\0b"', "expected a non-empty string"),
        (HEAD + 'name: "\\ud800"', "UTF-8"),
        (HEAD + "seed: 0x" + "f" * 10_000, "64 bits"),
        (HEAD + "seed: " + "9" * 10_000, "syntax error"),
        (HEAD + "dtype: 0x" + "f" * 10_000, "64 bits"),
        (HEAD + "parameters: {weight: 1" + "0" * 400 + "}", "64 bits"),
        (HEAD + "parameters: {weight: .nan}", "finite"),
        (HEAD + "parameters: {weight: [0, -.inf]}", "finite"),
        (HEAD + "name: 2020-99-99", "syntax error"),
        (HEAD + "parameters: {weight: 2020-01-01}", "expected a number"),
        (
            HEAD + "parameters: {1: 0.5, a: 1}",
            "keys must be strings, got 1; put it in quotes",
        ),
        (
            HEAD + "tokenizer: {source: base, tokens: {no: {source: a}}}",
            "keys must be strings, got False",
        ),
        (HEAD + "tokenizer: {source: base, tokens: {a: b}}", "source, force"),
        (HEAD + "tokenizer: {source: base, tokens: {a: {source: [b]}}}", "kind: zero"),
        (
            HEAD + "tokenizer: {source: base, pad_to_multiple_of: 1000000000000}",
            "from 1 to 65536",
        ),
        (HEAD + "parameters: !!set {a, b}", "name: value"),
        (HEAD + "seed: !!binary aaaa", "whole number"),
        ("!!python/object/apply:os.system [ls]", "syntax error"),
    ],
)
def test_bombs_and_junk(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        Recipe.from_yaml(text)
    assert len(str(caught.value)) < 3000


def test_numbers_are_read_as_people_write_them() -> None:
    recipe = Recipe.from_yaml(
        HEAD + "parameters: {a: 1e-5, b: 1E+3, c: -2e0, d: 1.5e3, e: .5, f: '1e-5'}"
    )
    assert recipe.parameters == {
        "a": 1e-5,
        "b": 1000.0,
        "c": -2.0,
        "d": 1500.0,
        "e": 0.5,
        "f": "1e-5",
    }
    same_when_written(recipe)


def test_five_mistakes_are_told_together() -> None:
    text = """
merge_method: ties
base_modl: base
models:
  - {model: a, wieght: 1}
  - {model: b, parameters: {weight: [1, x]}}
dtype: float12
seed: one
"""
    with pytest.raises(RecipeError, match="5 problems") as caught:
        Recipe.from_yaml(text, "r.yml")
    told = (
        "unknown key 'base_modl'; did you mean 'base_model'",
        "models[0]: unknown key 'wieght'",
        "models[1].weight: expected a gradient",
    )
    told += (
        "dtype: unknown dtype 'float12'",
        "seed: expected a whole number, got 'one'",
    )
    assert all(any(t in part for part in caught.value.parts) for t in told), (
        caught.value
    )
    assert all(part.startswith("r.yml: ") for part in caught.value.parts)


def test_mistakes_of_several_documents_are_told_together() -> None:
    with pytest.raises(RecipeError, match="2 problems") as caught:
        Recipe.from_yaml(
            "name: one\nmerge_method: linear\n---\n"
            "merge_method: linear\nmodels: [{model: one}]\ndtype: x"
        )
    assert (
        "document 1" in caught.value.parts[0] and "document 2" in caught.value.parts[1]
    )
