import pytest
import torch

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import ConfigError
from paretomerge.merge.engine import merged_tensors
from paretomerge.merge.plan import make_plan
from paretomerge.space.weights import Dial, WeightSpace, named_sources


def space(pico, **settings) -> WeightSpace:
    sources = named_sources([str(pico / e) for e in ("ada", "bob", "cyd")])
    return WeightSpace(str(pico / "base"), sources, Checkpoint(str(pico / "base")).architecture, **settings)


def test_one_number_per_source_group_and_role(pico):
    full = space(pico, weight=Dial((0, 1.5), layer_groups=2, roles=True), density=Dial((0.1, 1), layer_groups=2))
    names = set(full.distributions)
    assert {"method", "weight/ada/0/attention", "weight/cyd/1/other", "density/bob/1"} <= names
    assert len(names) == 1 + 3 * 2 * 3 + 3 * 2
    assert full.distributions["weight/ada/0/mlp"].high == 1.5
    assert full.conditions["density/ada/0"] == ("method", ("ties", "dare_ties"))


def test_every_number_reaches_its_tensors(pico):
    full = space(pico, methods=("ties",), weight=Dial((0, 1.5), layer_groups=2, roles=True), density=Dial((0.1, 1), layer_groups=4))
    params = {name: 0.1 + i / 100 for i, name in enumerate(full.distributions)}
    jobs = {job.name: job for job in make_plan(full.recipe(params)).jobs}
    for source, which in (("ada", 0), ("bob", 1), ("cyd", 2)):
        knobs = jobs["model.layers.2.mlp.up_proj.weight"].knobs[which]
        assert knobs == {"weight": params[f"weight/{source}/1/mlp"], "density": params[f"density/{source}/2"]}
        knobs = jobs["model.layers.1.self_attn.q_proj.weight"].knobs[which]
        assert knobs == {"weight": params[f"weight/{source}/0/attention"], "density": params[f"density/{source}/1"]}
        assert jobs["model.embed_tokens.weight"].knobs[which]["weight"] == params[f"weight/{source}/0/other"]
        assert jobs["lm_head.weight"].knobs[which]["weight"] == params[f"weight/{source}/1/other"]
    assert jobs["lm_head.weight"].options == {"lambda": 1.0, "normalize": False, "rescale": False}


def test_every_start_is_inside_and_the_first_are_the_sources(pico):
    full = space(pico)
    starts = full.starts()
    assert list(starts)[:4] == ["ada", "bob", "cyd", "uniform soup"]
    for params in starts.values():
        assert set(params) == set(full.distributions)
        assert all(full.distributions[n]._contains(full.distributions[n].to_internal_repr(v)) for n, v in params.items())
    merged = dict(merged_tensors(make_plan(full.recipe(starts["bob"]))))
    bob = Checkpoint(str(pico / "bob"))
    assert all(torch.equal(merged[name], bob.tensor(name)) for name in bob.headers)


def test_the_method_is_in_the_recipe(pico):
    full = space(pico)
    for method in ("task_arithmetic", "ties", "dare_ties"):
        assert full.recipe(full.point(method, dict.fromkeys(full.sources, 0.5))).merge_method == method


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"methods": ("tiess",)}, "did you mean 'ties'"),
        ({"methods": ("slerp",)}, "searchable"),
        ({"density": Dial((0, 1))}, "0 < low"),
        ({"weight": Dial((0, 1), layer_groups=9)}, "1 to 4"),
    ],
)
def test_bad_settings(pico, settings, told):
    with pytest.raises(ConfigError, match=told):
        space(pico, **settings)
    with pytest.raises(ConfigError, match="low < high"):
        Dial((1, 1))


def test_sources_of_one_name_keep_their_paths():
    assert named_sources(["a/x", "b/x", "c/y"]) == {"a_x": "a/x", "b_x": "b/x", "y": "c/y"}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"])
def test_every_searchable_method_gives_recipes_that_can_be_planned(pico, method):
    full = space(pico, methods=(method,))
    for point in full.starts().values():
        plan = make_plan(full.recipe(point))
        assert plan.recipe.merge_method == method and not plan.notes


@pytest.mark.parametrize("method", ["della", "pcb", "slerp", "tsv"])
def test_methods_without_free_weights_cannot_be_searched(pico, method):
    with pytest.raises(ConfigError, match="unknown searchable method"):
        space(pico, methods=(method,))
