from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import ConfigError
from paretomerge.merging.delta_profile import profile
from paretomerge.merging.engine import merge, merged_tensors
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from paretomerge.space.sources import named_sources
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.layout import Granularity
from paretomerge.space.weights.method_parameters import SEARCHABLE_METHODS
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.testing import check_space

DATA_FREE = tuple(
    method for method in SEARCHABLE_METHODS if METHODS[method].statistics is None
)
"""Without the methods that need statistics; for those see tests/calibration."""


def space(pico, **settings) -> WeightSearchSpace:
    sources = named_sources([str(pico / e) for e in ("ada", "bob", "cyd")])
    return WeightSearchSpace(
        str(pico / "base"),
        sources,
        Checkpoint(str(pico / "base")).architecture,
        **settings,
    )


def test_one_number_per_source_group_and_role(pico):
    full = space(
        pico,
        weight=Granularity((0, 1.5), Grouping(2), roles=True),
        density=Granularity((0.1, 1), Grouping(2)),
    )
    names = set(full.distributions)
    assert {
        "method",
        "weight/ada/0/attention",
        "weight/cyd/1/other",
        "density/bob/1",
    } <= names
    assert len(names) == 1 + 3 * 2 * 3 + 3 * 2
    assert full.distributions["weight/ada/0/mlp"].high == 1.5
    assert full.conditions["density/ada/0"] == (("method", ("ties", "dare_ties")),)


def test_every_number_reaches_its_tensors(pico):
    full = space(
        pico,
        methods=("ties",),
        weight=Granularity((0, 1.5), Grouping(2), roles=True),
        density=Granularity((0.1, 1), Grouping(4)),
    )
    params = {name: 0.1 + i / 100 for i, name in enumerate(full.distributions)}
    jobs = {job.name: job for job in make_plan(full.recipe(params)).jobs}
    for source, which in (("ada", 0), ("bob", 1), ("cyd", 2)):
        parameters = jobs["model.layers.2.mlp.up_proj.weight"].parameters[which]
        assert parameters == {
            "weight": params[f"weight/{source}/1/mlp"],
            "density": params[f"density/{source}/2"],
            "vote": 1.0,
        }
        parameters = jobs["model.layers.1.self_attn.q_proj.weight"].parameters[which]
        assert parameters == {
            "weight": params[f"weight/{source}/0/attention"],
            "density": params[f"density/{source}/1"],
            "vote": 1.0,
        }
        assert (
            jobs["model.embed_tokens.weight"].parameters[which]["weight"]
            == params[f"weight/{source}/0/other"]
        )
        assert (
            jobs["lm_head.weight"].parameters[which]["weight"]
            == params[f"weight/{source}/1/other"]
        )
    assert jobs["lm_head.weight"].options == {
        "lambda": 1.0,
        "normalize": False,
        "rescale": False,
    }


def test_every_start_is_inside_and_the_first_are_the_sources(pico):
    full = space(pico)
    starts = full.baselines()
    assert list(starts)[:4] == ["ada", "bob", "cyd", "uniform soup"]
    for params in starts.values():
        assert set(params) == set(full.distributions)
        assert all(
            full.distributions[n]._contains(full.distributions[n].to_internal_repr(v))
            for n, v in params.items()
        )
    merged = dict(merged_tensors(make_plan(full.recipe(starts["bob"]))))
    bob = Checkpoint(str(pico / "bob"))
    assert all(torch.equal(merged[name], bob.tensor(name)) for name in bob.headers)


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({"methods": ("consensus_ta", "task_arithmetic")}, True),
        ({"methods": ("consensus_ta", "pcb", "ties")}, True),
        ({"methods": ("consensus_ta",)}, False),
        ({"methods": ("pcb",)}, False),
        (
            {"methods": ("pcb",), "subset": True, "density": Granularity((0.1, 0.5))},
            True,
        ),
        (
            {
                "methods": ("consensus_ta",),
                "subset": True,
                "weight": Granularity((0.2, 1)),
            },
            True,
        ),
        ({"weight": Granularity((0.2, 0.8))}, False),
        ({"weight": Granularity((0.2, 1.5))}, False),
        ({"methods": ("ties",), "density": Granularity((0.1, 0.5))}, False),
        *(
            ({"methods": (method,)}, True)
            for method in DATA_FREE
            if METHODS[method].models[0] == 1
        ),
        ({"methods": ("sce",), "method_parameters": {"select_topk": 0.4}}, False),
        ({"methods": ("tsv", "iso_c", "sce")}, True),
        ({"methods": ("iso_c",)}, False),
        ({"methods": ("tsv", "iso_c"), "subset": True}, True),
    ],
)
def test_a_start_that_bears_a_source_s_name_is_that_source(pico, settings, exact):
    full = space(pico, **settings)
    names = ["ada", "bob", "cyd"] if exact else ["near ada", "near bob", "near cyd"]
    assert list(full.baselines())[:3] == names and full.holds_sources is exact
    recipe = full.recipe(full.baselines()[names[1]])
    bob = Checkpoint(str(pico / "bob"))
    same = [
        torch.allclose(tensor.float(), bob.tensor(name).float(), rtol=0.01)
        for name, tensor in merged_tensors(make_plan(recipe))
    ]
    assert all(same) is exact


def test_the_method_is_in_the_recipe(pico):
    full = space(pico)
    for method in ("task_arithmetic", "ties", "dare_ties"):
        assert (
            full.recipe(
                full.uniform_params(method, dict.fromkeys(full.sources, 0.5))
            ).merge_method
            == method
        )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"methods": ("tiess",)}, "did you mean 'ties'"),
        ({"methods": ("slerp",)}, "searchable"),
        ({"density": Granularity((0, 1))}, "0 < low"),
        (
            {"weight": Granularity((0, 1), Grouping(9))},
            "space.weight.groups: expected 1 to 4",
        ),
        ({"weight": Granularity((0, 1), Grouping(5), smooth=True)}, "1 to 4"),
        ({"weight": Granularity((0, 1), Grouping(2, "profile"))}, "expected a profile"),
        (
            {"weight": Granularity((0, 1), roles={"mlp": ["mlpp"]})},
            "'mlpp', which is in none",
        ),
        ({"method_groups": Grouping(7)}, "space.method_groups: expected 1 to 4"),
        ({"methods": ("ties", "ties")}, "each method once"),
        ({"method_parameters": {"gama": 0.1}}, "unknown parameter"),
        (
            {"methods": ("breadcrumbs",), "method_parameters": {"gama": 0.1}},
            "did you mean 'gamma'",
        ),
        (
            {"methods": ("breadcrumbs",), "method_parameters": {"gamma": (0.5, 1.5)}},
            "from 0 to 1",
        ),
        (
            {"methods": ("breadcrumbs",), "method_parameters": {"gamma": (0.5, 0.5)}},
            "or \\[low, high\\]",
        ),
        (
            {"methods": ("della",), "method_parameters": {"epsilon": 1.0}},
            "from 0 to 0.99",
        ),
        (
            {"methods": ("della",), "method_parameters": {"epsilon": float("nan")}},
            "from 0 to 0.99",
        ),
        (
            {"methods": ("wudi",), "method_parameters": {"steps": (10, 100)}},
            r"steps: expected a whole number from 0 on, got \(10, 100\)",
        ),
        (
            {"methods": ("wudi",), "method_parameters": {"steps": 2.5}},
            "steps: expected a whole number from 0 on, got 2.5",
        ),
        (
            {"methods": ("wudi",), "method_parameters": {"lr": float("inf")}},
            "lr: expected a number",
        ),
        (
            {"methods": ("tsv",), "method_parameters": {"steps": 10}},
            "unknown parameter of these methods 'steps'",
        ),
    ],
)
def test_bad_settings(pico, settings, told):
    with pytest.raises(ConfigError, match=told):
        space(pico, **settings)
    for bounds in ((1, 1), (1, 0), (float("nan"), 1), (0, float("inf"))):
        with pytest.raises(ConfigError, match="low < high"):
            Granularity(bounds)
    for groups in (
        Grouping(1),
        Grouping(2, "profile"),
        Grouping.parse([[0, 1], [1, 4]]),
    ):
        with pytest.raises(ConfigError, match="number of control points"):
            Granularity((0, 1), groups, smooth=True)
    with pytest.raises(ConfigError, match="roles: expected false, true, or names"):
        Granularity((0, 1), roles={})
    for roles in ({"a/b": ["mlp"]}, {"a": []}, {"a": [""]}, {"a": "mlp"}):
        with pytest.raises(ConfigError, match="roles: expected a name"):
            Granularity((0, 1), roles=roles)


def test_sources_of_one_name_keep_their_paths():
    assert named_sources(["a/x", "b/x", "c/y"]) == {
        "a_x": "a/x",
        "b_x": "b/x",
        "y": "c/y",
    }


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["a/x", "a/x"], "models: a/x is listed twice"),
        (["a/b/x", "a_b/x"], "models: a/b/x and a_b/x would both be named a_b_x"),
    ],
)
def test_no_source_is_lost_under_another_s_name(models, message):
    with pytest.raises(ConfigError, match=message):
        named_sources(models)


@pytest.mark.parametrize("method", SEARCHABLE_METHODS)
def test_every_searchable_method_gives_recipes_that_can_be_planned(
    pico, pico_calibration, method
):
    full = space(
        pico,
        methods=tuple(dict.fromkeys((method, "task_arithmetic"))),
        calibration=str(pico_calibration),
    )
    for point in (
        full.uniform_params(method, dict.fromkeys(full.sources, 0.5), 0.3),
        *full.baselines().values(),
    ):
        plan = make_plan(full.recipe(point))
        # mergekit ignores the weights of sce.
        other = METHODS["sce"].parameters[0].note
        assert not set(plan.notes) - ({other} if method == "sce" else set())
    assert (
        full.recipe(
            full.uniform_params(method, dict.fromkeys(full.sources, 0.5))
        ).merge_method
        == method
    )


@pytest.mark.parametrize("method", ["slerp", "ram", "model_stock", "linear"])
def test_methods_without_free_weights_cannot_be_searched(pico, method):
    with pytest.raises(ConfigError, match="unknown searchable method"):
        space(pico, methods=(method,))


def merged(recipe):
    return dict(merged_tensors(make_plan(recipe)))


def test_layers_with_methods_of_their_own_are_those_of_the_plain_merges(pico):
    full = space(
        pico,
        methods=("task_arithmetic", "dare_ties", "della"),
        method_groups=Grouping.parse([[0, 1], [1, 3], [3, 4]]),
    )
    point = full.uniform_params("della", {"ada": 0.9, "bob": 0.4, "cyd": -0.3}, 0.4)
    plain = {
        m: merged(
            full.recipe(
                {n: m if n.startswith("method") else v for n, v in point.items()}
            )
        )
        for m in full.methods
    }
    recipe = full.recipe(
        point | {"method/0": "dare_ties", "method/1": "task_arithmetic"}
    )
    assert [step.merge_method for step in recipe.steps] == [
        "dare_ties",
        "task_arithmetic",
        "della",
    ]
    for name, tensor in merged(recipe).items():
        layer = full.architecture.layer(name)
        method = (
            "dare_ties"
            if layer == 0 or "embed" in name
            else "della"
            if layer in (3, None)
            else "task_arithmetic"
        )
        assert torch.equal(tensor, plain[method][name]), name
    assert not full.recipe(point).steps and full.recipe(point).merge_method == "della"


def test_what_a_method_does_not_read_is_cut_where_the_method_changes(pico):
    full = space(
        pico,
        methods=("task_arithmetic", "breadcrumbs"),
        method_groups=Grouping(2),
        density=Granularity((0.1, 1), Grouping.parse([[0, 1], [1, 4]])),
    )
    assert (
        full.conditions["density/ada/1"]
        == full.conditions["density/ada/0"]
        == (("method/0", ("breadcrumbs",)),)
    )
    assert (
        full.conditions["density/ada/2"]
        == full.conditions["gamma/1"]
        == (("method/1", ("breadcrumbs",)),)
    )
    assert "weight/ada" in full.distributions and "weight/ada" not in full.conditions
    with pytest.raises(
        ConfigError,
        match=r"space.density.smooth: expected methods that all read `density`",
    ):
        space(
            pico,
            method_groups=Grouping(2),
            density=Granularity((0.1, 1), Grouping(2), smooth=True),
        )


def test_smooth_weights_lie_on_lines_from_the_first_layer_to_the_last(pico):
    full = space(
        pico,
        methods=("ties",),
        weight=Granularity((-1, 2), Grouping(3), True, True),
        density=Granularity((0.1, 1), Grouping(2)),
    )
    lines = {
        "attention": (0.0, 1.0, -0.5),
        "mlp": (0.3, 0.3, 0.6),
        "other": (0.5, 0.1, 0.9),
    }
    point = full.uniform_params("ties", dict.fromkeys(full.sources, 1.0))
    point |= {
        f"weight/ada/{i}/{role}": v
        for role, line in lines.items()
        for i, v in enumerate(line)
    }
    for job in make_plan(full.recipe(point)).jobs:
        layer, role = (
            full.architecture.layer(job.name),
            full.architecture.role(job.name),
        )
        place = layer if layer is not None else 0 if "embed" in job.name else 3
        assert job.parameters[0]["weight"] == pytest.approx(
            np.interp(place, (0, 1.5, 3), lines[role])
        ), job.name


def test_a_source_can_be_left_out_and_so_can_all(pico):
    full = space(pico, methods=("ties", "pcb"), subset=True)
    assert full.conditions["density/bob"] == (("use/bob", (True,)),)
    point = full.uniform_params("pcb", {"ada": 0.5, "bob": 0.0, "cyd": 0.7})
    assert point["use/ada"] is True and point["use/bob"] is False
    assert full.recipe(point).models == (
        full.base,
        full.sources["ada"],
        full.sources["cyd"],
    )
    alone = full.recipe(point | {"use/cyd": False})
    assert alone.merge_method == "task_arithmetic"  # pcb takes two models or more
    none = full.recipe(point | {"use/cyd": False, "use/ada": False})
    base = Checkpoint(full.base)
    assert all(
        torch.equal(tensor, base.tensor(name)) for name, tensor in merged(none).items()
    )


def test_per_method_parameters(pico):
    full = space(
        pico,
        methods=("ties", "della", "breadcrumbs", "sce"),
        method_parameters={"gamma": (0.0, 0.3), "select_topk": 0.4},
    )
    assert (
        full.distributions["gamma"].high == 0.3
        and "select_topk" not in full.distributions
    )
    assert full.conditions["epsilon"] == (("method", ("della",)),)
    assert full.conditions["density/ada"] == (
        ("method", ("ties", "della", "breadcrumbs")),
    )
    assert "weight/ada" not in full.conditions
    point = full.uniform_params("della", dict.fromkeys(full.sources, 0.5), 0.8) | {
        "epsilon": 0.5
    }
    assert make_plan(full.recipe(point)).jobs[0].parameters[0][
        "epsilon"
    ] == pytest.approx(0.1)
    assert (
        make_plan(full.recipe(point | {"method": "sce"})).jobs[0].options["select_topk"]
        == 0.4
    )
    assert (
        make_plan(full.recipe(point | {"method": "breadcrumbs", "gamma": 0.2}))
        .jobs[0]
        .parameters[0]["gamma"]
        == 0.2
    )


def test_roles_of_the_users_own_and_cells_without_a_tensor(pico):
    roles = {"ends": ["embed_tokens", "lm_head"], "v": ["v_proj"], "mlp": ["mlp"]}
    full = space(
        pico,
        methods=("task_arithmetic",),
        weight=Granularity((0, 1), Grouping(4), roles),
    )
    names = [name for name in full.distributions if "/ada/" in name]
    assert [n for n in names if n.endswith("ends")] == [
        "weight/ada/0/ends",
        "weight/ada/3/ends",
    ]  # layers 1 and 2 have none
    params = {name: i / 100 for i, name in enumerate(full.distributions)}
    jobs = {
        job.name: job.parameters[0]["weight"]
        for job in make_plan(full.recipe(params)).jobs
    }
    assert jobs["lm_head.weight"] == params["weight/ada/3/ends"]
    assert jobs["model.layers.2.self_attn.v_proj.weight"] == params["weight/ada/2/v"]
    assert (
        jobs["model.layers.2.self_attn.q_proj.weight"] == params["weight/ada/2/other"]
    )


def test_importance_is_the_size_of_the_deltas_that_a_parameter_governs(pico):
    sources = {e: str(pico / e) for e in ("ada", "bob", "cyd")}
    deltas = profile(str(pico / "base"), sources)
    full = space(
        pico,
        weight=Granularity((0, 1), Grouping(2), True),
        subset=True,
        method_groups=Grouping(2),
        profile=deltas,
    )
    assert set(full.importance) == set(full.distributions)
    for kind in ("weight", "density", "use", "method"):
        mine = [v for n, v in full.importance.items() if n.startswith(kind + "/")]
        assert np.prod(mine) == pytest.approx(1) and min(mine) > 0
    a, b = "weight/ada/0/mlp", "weight/cyd/1/attention"
    mlp = deltas.by_layer(full.architecture, "mlp")[:2, 0].sum()
    attention = deltas.by_layer(full.architecture, "attention")[2:, 2].sum()
    assert full.importance[a] / full.importance[b] == pytest.approx(
        (mlp / attention) ** 0.5
    )
    smooth = space(
        pico, weight=Granularity((0, 1), Grouping(3), smooth=True), profile=deltas
    )
    assert set(smooth.importance) == set(smooth.distributions)
    still = space(
        pico, profile=profile(str(pico / "base"), sources | {"bob": str(pico / "base")})
    )
    assert still.importance["weight/bob"] == pytest.approx(
        0.01 * max(still.importance["weight/ada"], still.importance["weight/cyd"])
    )
    assert space(pico).importance == {}


KINDS = {
    "plain": {},
    "one method": {"methods": ("ties",)},
    "dense only": {"methods": ("ties", "dare_ties")},
    "every method without data": {"methods": DATA_FREE},
    "groups and roles": {
        "weight": Granularity((-0.5, 1.5), Grouping(2), True),
        "density": Granularity((0.1, 1), Grouping(4)),
    },
    "ranges": {
        "weight": Granularity(
            (0, 1),
            Grouping.parse([[0, 1], [1, 4]]),
            {"embeddings": ["embed_tokens", "lm_head"], "v": ["v_proj"]},
        )
    },
    "smooth": {"weight": Granularity((-0.5, 1.5), Grouping(2), smooth=True)},
    "smooth, three points, roles": {
        "weight": Granularity((-0.5, 1.5), Grouping(3), True, True),
        "density": Granularity((0.1, 1), Grouping(2), True),
    },
    "smooth, a point a layer": {
        "weight": Granularity((0, 1), Grouping(4), smooth=True),
        "density": Granularity((0.1, 0.9), Grouping(2), smooth=True),
    },
    "method per group": {"method_groups": Grouping(2)},
    "method per group, many methods": {
        "methods": ("task_arithmetic", "della", "sce", "breadcrumbs", "pcb", "tsv"),
        "method_groups": Grouping(4),
        "weight": Granularity((-0.5, 1.5), Grouping(2), True),
        "density": Granularity((0.1, 1), Grouping(3)),
    },
    "method per group, smooth": {
        "method_groups": Grouping(3),
        "weight": Granularity((-0.5, 1.5), Grouping(2), smooth=True),
    },
    "subset": {"subset": True},
    "subset, method parameters, roles": {
        "methods": (
            "task_arithmetic",
            "della_linear",
            "breadcrumbs_ties",
            "pcb",
            "consensus_ta",
        ),
        "subset": True,
        "weight": Granularity((0.1, 1.5), roles=True),
        "method_parameters": {"gamma": (0.0, 0.02), "epsilon": 0.5},
    },
    "spectral only": {
        "methods": ("tsv", "iso_c", "iso_cts", "wudi"),
        "method_parameters": {"steps": 3, "lr": (1e-6, 1e-3)},
    },
    "spectral, groups, roles, subset": {
        "methods": ("wudi", "sce", "tsv"),
        "subset": True,
        "weight": Granularity((-0.5, 1.5), Grouping(2), True),
        "method_parameters": {"steps": 3, "select_topk": (0.1, 0.5)},
    },
    "spectral, smooth": {
        "methods": ("iso_cts", "ties"),
        "weight": Granularity((-0.5, 1.5), Grouping(3), smooth=True),
        "method_parameters": {"common_fraction": (0.4, 1.0)},
    },
    "everything": {
        "methods": ("task_arithmetic", "della", "breadcrumbs", "dare_ties"),
        "method_groups": Grouping(2),
        "subset": True,
        "weight": Granularity((-0.5, 1.5), Grouping(4), True),
        "density": Granularity((0.1, 1), roles={"q": ["q_proj"], "mlp": ["mlp"]}),
    },
    "della, smooth density": {
        "methods": ("della",),
        "density": Granularity((0.05, 1), Grouping(3), True, True),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_space_keeps_the_contract(pico, kind):
    check_space(space(pico, **KINDS[kind]), points=6)


@pytest.mark.parametrize("kind", ["plain", "everything", "method per group, smooth"])
def test_random_points_of_the_specialists_load_into_a_live_model(specialists, kind):
    models = specialists / "models"
    base, sources = (
        str(models / "base"),
        {n: str(models / n) for n in ("order", "mirror", "scribe")},
    )
    full = WeightSearchSpace(
        base, sources, Checkpoint(base).architecture, **KINDS[kind]
    )
    live = ResidentModel(base, tuple(sources.values()), "float32")
    rng = np.random.default_rng(0)
    for _ in range(4):
        point = {
            name: d.choices[int(rng.integers(len(d.choices)))]
            if hasattr(d, "choices")
            else float(rng.uniform(d.low, d.high))
            for name, d in full.distributions.items()
        }
        recipe = replace(full.recipe(point), dtype="float32")
        assert (live.load(recipe).facts["sparsity"] < 0) == any(
            point.get(f"use/{source}", True) for source in sources
        )
        name = "model.layers.2.mlp.up_proj.weight"
        assert torch.equal(
            live.model.state_dict()[name],
            dict(merged_tensors(make_plan(recipe), only=[name]))[name],
        )
    assert (
        live.load(
            replace(
                full.recipe(
                    full.uniform_params(full.methods[0], dict.fromkeys(sources, 0.0))
                ),
                dtype="float32",
            )
        ).facts["sparsity"]
        == 0
    )


WITHOUT_DATA = ("tsv", "iso_c", "iso_cts", "wudi", "sce")


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_spectral_methods_are_searched_with_a_weight_per_source(pico, tmp_path, method):
    """A point is the recipe that a user writes, and the same bytes on disk and in memory."""
    full = space(
        pico,
        methods=("task_arithmetic", *WITHOUT_DATA),
        method_parameters={"steps": 20, "lr": 1e-3},
    )
    assert set(full.distributions) == {
        "method",
        "select_topk",
        *(f"weight/{source}" for source in full.sources),
    }
    assert full.conditions == {"select_topk": (("method", ("sce",)),)}
    weights = {"ada": 0.9, "bob": -0.3, "cyd": 0.0}
    point = {f"weight/{source}": weight for source, weight in weights.items()}
    point |= {"method": method, "select_topk": 0.4}
    recipe = full.recipe(point)
    assert full.params_of(recipe) | {"select_topk": 0.4} == point

    # By hand, without the source of weight 0
    options = {"wudi": {"steps": 20, "lr": 1e-3}, "sce": {"select_topk": 0.4}}
    models = [
        {"model": full.sources[source], "parameters": {"weight": weights[source]}}
        for source in ("ada", "bob")
    ]
    by_hand = Recipe.from_dict(
        {
            "merge_method": method,
            "base_model": full.base,
            "models": models,
            "parameters": options.get(method, {}),
        }
    )
    written = merge(by_hand, tmp_path / "by hand")
    expected = load_file(written / "model.safetensors")
    on_disk = load_file(merge(recipe, tmp_path / "point") / "model.safetensors")
    live = ResidentModel(full.base, tuple(full.sources.values()))
    in_memory = live.load(recipe).model.state_dict()
    base = Checkpoint(full.base)
    for name, tensor in expected.items():
        assert torch.equal(on_disk[name], tensor), name
        assert torch.equal(in_memory[name], tensor), name
        assert not torch.equal(base.tensor(name), tensor), name


def test_baselines_of_spectral_methods_have_their_published_settings(pico):
    full = space(pico, methods=("task_arithmetic", "ties", *WITHOUT_DATA))
    baselines = full.baselines()
    for method in WITHOUT_DATA:
        recipe = full.recipe(baselines[method])
        (job, *_) = make_plan(recipe).jobs
        assert recipe.merge_method == method
        assert [values["weight"] for values in job.parameters] == [1.0] * 3
        defaults = {
            row.name: row.default
            for row in METHODS[method].parameters
            if not row.per_source
        }
        assert job.options == defaults
    # What the others have has not changed.
    assert list(baselines)[3:7] == [
        "uniform soup",
        "task arithmetic 0.5",
        "task arithmetic 0.7",
        "ties at density 0.2",
    ]


@pytest.mark.parametrize("methods", [("sce", "tsv"), ("iso_c",), ("wudi", "pcb")])
def test_there_is_no_uniform_average_where_no_method_makes_one(pico, methods):
    full = space(pico, methods=methods)
    assert "uniform soup" not in full.baselines()
    # sce and pcb average by themselves: a sum is the better one to show the sources.
    with_ties = space(pico, methods=(*methods, "ties"))
    soup = with_ties.recipe(with_ties.baselines()["uniform soup"])
    assert soup.merge_method == "ties"


def test_how_long_wudi_takes_can_be_set(pico):
    full = space(pico, methods=("wudi", "iso_cts"))
    assert set(full.distributions) == {
        "method",
        *(f"weight/{source}" for source in full.sources),
    }
    point = full.uniform_params("wudi", dict.fromkeys(full.sources, 0.5))
    steps = full.recipe(point).parameters["steps"]
    assert steps == 300 and type(steps) is int
    shorter = space(pico, methods=("wudi",), method_parameters={"steps": 40})
    del point["method"]
    assert shorter.recipe(point).parameters == {"steps": 40, "lr": 1e-5}
