import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretomerge.errors import RecipeError
from paretomerge.recipe import Recipe, evaluate_setting, find_value

TIES = """
merge_method: ties
base_model: base
models:
  - model: ada
    parameters: {weight: 0.5, density: [0.1, 0.9]}
  - model: bob
    parameters:
      weight:
        - {filter: mlp, value: 0.7}
        - {value: 0.2}
parameters: {lambda: 1.1, density: 0.4}
dtype: bfloat16
"""


def test_reads_and_writes_the_grammar():
    recipe = Recipe.from_yaml(TIES)
    assert recipe.models == ("base", "ada", "bob")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()).key == recipe.key


def test_key_ignores_the_order_of_keys_but_not_values():
    a = Recipe.from_yaml(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1, normalize: true}}]"
    )
    b = Recipe.from_yaml(
        "models: [{parameters: {normalize: true, weight: 1}, model: a}]\nmerge_method: linear"
    )
    c = Recipe.from_yaml(
        "models: [{parameters: {normalize: true, weight: 2}, model: a}]\nmerge_method: linear"
    )
    assert a.key == b.key != c.key


def test_slices_survive_a_round_trip():
    text = (
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources: [{model: b, layer_range: [1, 4]}]"
    )
    recipe = Recipe.from_yaml(text)
    assert recipe.slices[1].sources[0].layer_range == (1, 4)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("setting", "name", "t", "expected"),
    [
        (0.3, "x", 0.5, 0.3),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 1, 0], "x", 0.75, 0.5),
        ([2.0], "x", 1.0, 2.0),
        (
            [{"filter": "mlp", "value": [0, 2]}, {"value": 9}],
            "layers.0.mlp.w",
            0.5,
            1.0,
        ),
        ([{"filter": "mlp", "value": 1}, {"filter": "*", "value": 9}], "norm", 0.5, 9),
        ([{"filter": "mlp", "value": 1}], "norm", 0.5, None),
        ({"filter": "mlp", "value": [0, 2]}, "layers.0.mlp.w", 0.5, 1.0),
        ({"filter": "mlp", "value": 1}, "norm", 0.5, None),
        ([True, False], "x", 0.9, True),
        ([True, False], "x", 1.0, False),
        (["a", "b", "c"], "x", 0.5, "b"),
    ],
)
def test_resolve(setting, name, t, expected):
    assert evaluate_setting(setting, name, t) == expected


def test_scalars_are_read_before_they_are_interpolated():
    assert evaluate_setting(["1e-1", 0.3], "x", 0.5, read=float) == pytest.approx(0.2)


def test_a_level_where_no_filter_matches_falls_through():
    inner, outer = {"weight": [{"filter": "mlp", "value": 1}]}, {"weight": 0.2}
    assert find_value([inner, outer], "weight", "layers.0.mlp.w", 0) == 1
    assert find_value([inner, outer], "weight", "norm", 0) == 0.2


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_ends(values, t):
    assert min(values) - 1e-9 <= evaluate_setting(values, "x", t) <= max(values) + 1e-9


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge_methd: ties\nmodels: [{model: a}]", "did you mean 'merge_method'"),
        ("models: [{model: a}]", "merge_method"),
        (
            "merge_method: ties",
            "exactly one of `models`, `slices` and `modules` is required, got none",
        ),
        ("merge_method: ties\nmodels: []", "at least one entry"),
        ("merge_method: ties\nmodels: [{model: a, weight: 1}]", "unknown key 'weight'"),
        (
            "merge_method: ties\nmodels: [{model: a, parameters: {weight: [1, {value: 2}]}}]",
            "mixture",
        ),
        (
            "merge_method: ties\nmodels: [{model: a, parameters: {weight: [{filter: x}]}}]",
            "`value`",
        ),
        (
            "merge_method: ties\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]",
            "layer_range",
        ),
        ("merge_method: ties\nmodels: [{model: a}]\ndtype: float12", "unknown dtype"),
        (
            "merge_method: ties\nmodels: [{model: a}]\nmodules: {}",
            "got models and modules",
        ),
        ("merge_method: [", "syntax error"),
        ("just text", "expected a mapping"),
        ("!!python/object/apply:os.system [ls]", "syntax error"),
    ],
)
def test_bad_recipes_say_what_is_wrong(text, told):
    with pytest.raises(RecipeError, match=told):
        Recipe.from_yaml(text)


def test_load_takes_models_beside_the_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "r.yml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: owner/b}]"
    )
    assert Recipe.load(tmp_path / "r.yml").models == (str(tmp_path / "a"), "owner/b")


def test_a_key_that_is_there_twice():
    text = (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1, weight: 2}}]"
    )
    with pytest.raises(RecipeError, match="the key 'weight' is there twice"):
        Recipe.from_yaml(text)
    # An anchor that is merged into a mapping may be overridden.
    merged = (
        "merge_method: linear\nmodels:\n- {model: a, parameters: &w {weight: 1}}\n"
        "- {model: b, parameters: {<<: *w, weight: 2}}"
    )
    assert Recipe.from_yaml(merged).slices[0].sources[1].parameters == {"weight": 2}
