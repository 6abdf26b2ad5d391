"""A recipe -> the parameters that give it, however the recipe is written.

An error names the part of the recipe that is outside the space.
"""

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import ConfigError
from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from paretomerge.space.sources import named_sources
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.layout import Granularity
from paretomerge.space.weights.method_parameters import SEARCHABLE_METHODS
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.testing import same_recipe

EXPERTS = ("ada", "bob", "cyd")


def space(pico, **more):
    sources = named_sources([str(pico / e) for e in EXPERTS])
    return WeightSearchSpace(
        str(pico / "base"), sources, Checkpoint(str(pico / "base")).architecture, **more
    )


def recipe(pico, method="task_arithmetic", base="base", **more):
    data = {
        "merge_method": method,
        "base_model": str(pico / base),
        "models": [{"model": str(pico / "ada"), "parameters": {"weight": 0.5}}],
    }
    data |= more
    return Recipe.from_yaml(
        yaml.safe_dump({k: v for k, v in data.items() if v is not None})
    )


def model(pico, name, **parameters):
    return {"model": str(pico / name), "parameters": parameters}


def test_plain_recipes(pico):
    full = space(pico)
    listed = [
        model(pico, "bob", weight=0.7, density=0.3),
        model(pico, "ada", weight=-0.2),
    ]
    parameters = {"normalize": False, "density": 0.6}
    point = full.params_of(recipe(pico, "ties", models=listed, parameters=parameters))
    assert point["method"] == "ties" and point["weight/cyd"] == 0  # cyd is not listed
    assert (
        point["weight/ada"],
        point["density/ada"],
        point["weight/bob"],
        point["density/bob"],
    ) == (-0.2, 0.6, 0.7, 0.3)
    assert set(point) == set(full.distributions)
    halved = full.params_of(
        recipe(
            pico,
            parameters={"lambda": 0.5, "weight": 1.0},
            models=[{"model": str(pico / "ada")}],
        )
    )
    assert halved["weight/ada"] == 0.5 and halved["method"] == "task_arithmetic"


def test_paths_may_be_spelt_otherwise(pico, monkeypatch):
    monkeypatch.chdir(pico)
    data = {
        "merge_method": "task_arithmetic",
        "base_model": "base/",
        "models": [{"model": "./ada", "parameters": {"weight": 0.25}}],
    }
    assert (
        space(pico).params_of(Recipe.from_yaml(yaml.safe_dump(data)))["weight/ada"]
        == 0.25
    )


def test_averages_are_task_arithmetic(pico):
    full = space(pico, methods=("task_arithmetic", "ties"))
    soup = Recipe.from_dict(
        {
            "merge_method": "linear",
            "models": [model(pico, e, weight=1) for e in EXPERTS],
        }
    )
    point = full.params_of(soup)
    assert point["method"] == "task_arithmetic" and [
        point[f"weight/{e}"] for e in EXPERTS
    ] == pytest.approx([1 / 3] * 3)
    with_base = full.params_of(
        recipe(
            pico,
            "linear",
            models=[model(pico, "base", weight=1), model(pico, "ada", weight=3)],
        )
    )
    assert (
        with_base["weight/ada"] == pytest.approx(0.75) and with_base["weight/bob"] == 0
    )
    ours = dict(merged_tensors(make_plan(full.recipe(with_base))))
    theirs = dict(
        merged_tensors(
            make_plan(
                recipe(
                    pico,
                    "linear",
                    models=[
                        model(pico, "base", weight=1),
                        model(pico, "ada", weight=3),
                    ],
                )
            )
        )
    )
    assert all(
        torch.allclose(ours[n].float(), theirs[n].float(), atol=1e-2) for n in ours
    )


def test_slices_filters_and_gradients(pico):
    full = space(
        pico,
        methods=("task_arithmetic",),
        weight=Granularity((-1, 2), Grouping(2), True),
    )
    slices = [
        {
            "sources": [
                {
                    "model": str(pico / "ada"),
                    "layer_range": [first, first + 2],
                    "parameters": {
                        "weight": [
                            {"filter": "self_attn", "value": w},
                            {"filter": "mlp", "value": 0.1},
                            {"value": [0.2, 0.2]},
                        ]
                    },
                }
            ]
        }
        for first, w in ((0, 0.8), (2, 0.9))
    ]
    point = full.params_of(recipe(pico, models=None, slices=slices))
    assert (
        point["weight/ada/0/attention"] == 0.8
        and point["weight/ada/1/attention"] == 0.9
    )
    assert (
        point["weight/ada/1/mlp"] == 0.1
        and point["weight/ada/0/other"] == pytest.approx(0.2)
        and point["weight/bob/1/mlp"] == 0
    )
    smooth = space(
        pico,
        methods=("task_arithmetic",),
        weight=Granularity((-1, 2), Grouping(2), smooth=True),
    )
    lines = [
        {"filter": "model.norm", "value": 0.9},
        {"filter": "lm_head", "value": 0.9},
        {"value": [0.3, 0.6, 0.9]},
    ]
    point = smooth.params_of(recipe(pico, models=[model(pico, "ada", weight=lines)]))
    assert point["weight/ada/0"] == pytest.approx(0.3) and point[
        "weight/ada/1"
    ] == pytest.approx(0.9)
    with pytest.raises(
        ConfigError, match="weight of ada: expected a value on the space's lines"
    ):
        smooth.params_of(
            recipe(pico, models=[model(pico, "ada", weight=[0.3, 0.9])])
        )  # norm and head at the first value


def test_sources_that_are_left_out(pico):
    full = space(pico, subset=True, weight=Granularity((0.1, 1)))
    point = full.params_of(recipe(pico))
    assert [point[f"use/{e}"] for e in EXPERTS] == [True, False, False]
    nothing = full.params_of(recipe(pico, models=[model(pico, "ada", weight=0)]))
    assert not any(nothing[f"use/{e}"] for e in EXPERTS)
    with pytest.raises(
        ConfigError, match=r"weight/bob: expected 0.1 to 1, the space's bounds, got 0"
    ):
        space(pico, weight=Granularity((0.1, 1))).params_of(recipe(pico))


def test_della_and_its_epsilon(pico):
    full = space(pico, methods=("della", "ties"))
    said = {"normalize": False, "density": 0.8, "epsilon": 0.15}
    assert full.params_of(recipe(pico, "della", parameters=said))[
        "epsilon"
    ] == pytest.approx(0.75)
    assert (
        full.params_of(recipe(pico, "della", parameters={"normalize": False}))[
            "epsilon"
        ]
        == 0.3
    )  # density 1: nothing to spread
    with pytest.raises(ConfigError, match=r"epsilon: expected 0 to 0\.9"):
        full.params_of(recipe(pico, "della", parameters=said | {"epsilon": 0.19}))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"method": "linear", "parameters": {"weight": 1.0, "normalize": False}},
            "expected weights with a sum of 1",
        ),
        (
            {"method": "multislerp", "parameters": {"weight": 1.0}},
            "merge_method: expected one on deltas",
        ),
        (
            {"method": "linear", "base": "bob", "parameters": {"weight": 1.0}},
            "base_model: expected",
        ),
        (
            {"method": "dare_linear"},
            "expected one of task_arithmetic, ties, dare_ties, got dare_linear",
        ),
        ({"method": "ties"}, "normalize: expected False"),
        (
            {"method": "ties", "parameters": {"normalize": False, "rescale": True}},
            "rescale: expected False",
        ),
        ({"base": "bob"}, "base_model: expected .*base, got .*bob"),
        (
            {"parameters": {"lambda": 4.0}},
            "weight/ada: expected -0.5 to 1.5, the space's bounds, got 2",
        ),
        ({"tokenizer_source": "union"}, "tokenizer"),
    ],
)
def test_what_is_outside_is_named(pico, more, told):
    with pytest.raises(ConfigError, match=told):
        space(pico).params_of(recipe(pico, **more))


def test_other_models_layers_and_values_are_outside(pico, tmp_path):
    full = space(pico)
    with pytest.raises(
        ConfigError, match="expected models of the study, got elsewhere/model"
    ):
        full.params_of(
            recipe(
                pico, models=[{"model": "elsewhere/model", "parameters": {"weight": 1}}]
            )
        )
    with pytest.raises(
        ConfigError,
        match=r"weight/ada: expected one value where the space has one, got 0.1 .* and 0.9 in ",
    ):
        full.params_of(
            recipe(
                pico,
                models=[
                    model(
                        pico,
                        "ada",
                        weight=[{"filter": "mlp", "value": 0.9}, {"value": 0.1}],
                    )
                ],
            )
        )
    with pytest.raises(ConfigError, match="each source once"):
        full.params_of(recipe(pico, models=[model(pico, "ada", weight=1)] * 2))

    def piece(*ranges):
        return [
            {
                "sources": [
                    {
                        "model": str(pico / "ada"),
                        "layer_range": list(r),
                        "parameters": {"weight": 1},
                    }
                ]
            }
            for r in ranges
        ]

    with pytest.raises(ConfigError, match="expected the base's 4 layers, got 3"):
        full.params_of(recipe(pico, models=None, slices=piece((0, 3))))
    with pytest.raises(ConfigError, match="in their own places"):
        full.params_of(recipe(pico, models=None, slices=piece((2, 4), (0, 2))))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_there_and_back_in_any_space(pico, pico_calibration, data):
    """In any space, at any point, decoded parameters give the same recipe and tensors again."""
    flag = st.booleans()
    method_groups = data.draw(st.integers(1, 4))
    methods = tuple(
        data.draw(
            st.lists(
                st.sampled_from(SEARCHABLE_METHODS), min_size=1, max_size=4, unique=True
            )
        )
    )
    methods = tuple(dict.fromkeys((*methods, "ties")))
    smooth = data.draw(flag)
    weight = Granularity(
        (-0.5, 1.5),
        Grouping(data.draw(st.integers(1 + smooth, 4))),
        data.draw(flag),
        smooth,
    )
    density = Granularity(
        (0.1, 1), Grouping(data.draw(st.integers(1, 4))), data.draw(flag)
    )
    full = space(
        pico,
        methods=methods,
        weight=weight,
        density=density,
        method_groups=Grouping(method_groups),
        subset=data.draw(flag),
        calibration=str(pico_calibration),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    point = {
        name: d.choices[int(rng.integers(len(d.choices)))]
        if hasattr(d, "choices")
        else float(rng.uniform(d.low, d.high))
        for name, d in full.distributions.items()
    }
    there = full.recipe(point)
    back = full.params_of(there)
    assert same_recipe(there, full.recipe(back))
    if "pcb" not in methods:
        a, b = (
            dict(
                merged_tensors(make_plan(r), only=["model.layers.2.mlp.up_proj.weight"])
            )
            for r in (there, full.recipe(back))
        )
        assert all(torch.allclose(a[n].float(), b[n].float(), atol=1e-2) for n in a)


def test_one_value_for_all_sources(pico):
    """The space has one gamma for all sources: a recipe with two is refused, not rounded."""
    models = [
        model(pico, "ada", weight=0.5, gamma=0.01),
        model(pico, "bob", weight=0.5, gamma=0.05),
    ]
    mixed = recipe(
        pico,
        "breadcrumbs",
        models=models,
        parameters={"normalize": False, "density": 0.7},
    )
    full = space(pico, methods=("breadcrumbs", "ties"))
    with pytest.raises(
        ConfigError, match=r"gamma: .* got 0.01 in \S+ of ada and 0.05 in \S+ of bob"
    ):
        full.params_of(mixed)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("pcb", {"density": 0.5})],
)
def test_methods_in_which_a_missing_source_is_not_one_of_weight_0(
    pico, method, parameters
):
    models = [{"model": str(pico / source)} for source in ("ada", "bob")]
    two_of_three = recipe(pico, method, models=models, parameters=parameters)
    methods = (method, "ties")
    with pytest.raises(ConfigError, match=f"{method} with and without cyd"):
        space(pico, methods=methods).params_of(two_of_three)
    with_subset = space(pico, methods=methods, subset=True)
    back = with_subset.recipe(with_subset.params_of(two_of_three))
    assert same_tensors(two_of_three, back)


@pytest.mark.parametrize("method", ["sce", "tsv", "iso_c", "iso_cts", "wudi"])
def test_a_missing_source_is_one_of_weight_0(pico, method):
    steps = {"steps": STEPS} if method == "wudi" else {}
    models = [model(pico, "ada", weight=0.5), {"model": str(pico / "bob")}]
    there = recipe(pico, method, models=models, parameters=steps)
    full = space(pico, methods=(method, "ties"), method_parameters=steps)
    point = full.params_of(there)
    assert [point[f"weight/{source}"] for source in EXPERTS] == [0.5, 1.0, 0.0]
    assert same_tensors(there, full.recipe(point))


def test_lambda_stands_for_weights_where_the_method_allows_it(pico):
    models = [model(pico, "ada", weight=0.5), model(pico, "bob", weight=1.0)]
    half = {"lambda": 0.5}
    for method in ("tsv", "iso_c", "iso_cts"):
        there = recipe(pico, method, models=models, parameters=half)
        full = space(pico, methods=(method,))
        point = full.params_of(there)
        assert (point["weight/ada"], point["weight/bob"]) == (0.25, 0.5)
        assert same_tensors(there, full.recipe(point))
    there = recipe(pico, "wudi", models=models, parameters=half)
    with pytest.raises(ConfigError, match=r"lambda: expected 1\.0"):
        space(pico, methods=("wudi",)).params_of(there)


def test_a_method_of_two_sources_does_not_stand_in_for_one_source(pico):
    """pcb of one source is task arithmetic, but only where the other sources are left out."""
    one = recipe(pico)
    with pytest.raises(ConfigError, match=r"task_arithmetic \(with these .* pcb\)"):
        space(pico, methods=("pcb", "ties")).params_of(one)
    with_subset = space(pico, methods=("pcb", "ties"), subset=True)
    assert same_tensors(one, with_subset.recipe(with_subset.params_of(one)))


def same_tensors(first: Recipe, second: Recipe) -> bool:
    ours, theirs = (dict(merged_tensors(make_plan(r))) for r in (first, second))
    return all(
        torch.allclose(ours[n].float(), theirs[n].float(), atol=1e-2) for n in ours
    )


# Masks at random are other masks when the order of the sources changes.
DETERMINISTIC = [
    method for method in SEARCHABLE_METHODS if not method.startswith(("dare", "della"))
]


STEPS = 3  # of wudi, which takes 300 by default


@st.composite
def written_recipes(draw):
    """Recipes as users write them: some sources, settings per source or for all of them."""
    method = METHODS[draw(st.sampled_from(DETERMINISTIC))]
    least, _ = method.models
    used = draw(st.lists(st.sampled_from(EXPERTS), min_size=least, unique=True))
    values = {
        "weight": st.floats(-1, 1),
        "density": st.sampled_from([0.4, 0.9, 1.0]),
        "gamma": st.sampled_from([0.01, 0.05]),
        "select_topk": st.sampled_from([0.2, 1.0]),
        "mask_lambda": st.sampled_from([0.3, 0.6]),
        "lambda": st.sampled_from([0.5, 1.0, -2.0]),
    }
    rows = [row for row in method.parameters if row.name in values]
    parameters = {
        row.name: draw(values[row.name]) for row in rows if draw(st.booleans())
    }
    names = [row.name for row in method.parameters]
    if "normalize" in names:
        parameters["normalize"] = False
    sources = {}
    for source in used:
        own = [row.name for row in rows if row.per_source]
        given = [name for name in own if name == "weight" or draw(st.booleans())]
        sources[source] = {name: draw(values[name]) for name in given}
    if method.name == "wudi":
        parameters["steps"] = STEPS
    return method.name, sources, parameters


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(written=written_recipes(), subset=st.booleans())
def test_a_decoded_recipe_merges_to_the_same_tensors(
    pico, pico_calibration, written, subset
):
    """Whatever is written: the parameters give its tensors, or the recipe is refused."""
    method, sources, parameters = written
    models = [model(pico, source, **own) for source, own in sources.items()]
    statistics = str(pico_calibration)
    needs_data = METHODS[method].statistics is not None
    there = recipe(
        pico,
        method,
        models=models,
        parameters=parameters,
        calibration=statistics if needs_data else None,
    )
    full = space(
        pico,
        calibration=statistics,
        methods=tuple(dict.fromkeys((method, "ties"))),
        weight=Granularity((-3, 3)),
        density=Granularity((0.01, 1)),
        subset=subset,
        method_parameters={"steps": STEPS} if method == "wudi" else {},
    )
    try:
        params = full.params_of(there)
    except ConfigError:
        return
    assert same_tensors(there, full.recipe(params))
