"""Families in closed form: the algebra, the folder, and the checkpoints for a preference."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from paretomerge.errors import CheckpointError, ConfigError, ParetoMergeError
from paretomerge.merging.engine import merge
from paretomerge.systems.pareto_merging import LiveFamily, ParetoFamily, pareto_merge
from paretomerge.systems.pareto_merging import factors as factors_module
from paretomerge.systems.pareto_merging.factors import factorise
from tests.conftest import EXPERTS, pico_config, pico_states, save_pico, save_tokenizer
from tests.pico import build_pico, moved

SCALE = 0.4
K = len(EXPERTS)


def models(folder):
    return [str(folder / name) for name in EXPERTS]


def make(folder, out, **options):
    settings = {"scale": SCALE, **options}
    return pareto_merge(str(folder / "base"), models(folder), out, **settings)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Pico models with matrices that are large beside rank 4, in float32."""
    folder = tmp_path_factory.mktemp("wide")
    for name, state in pico_states(width=32, layers=2).items():
        model = LlamaForCausalLM(pico_config(2, 32))
        model.load_state_dict(state)
        save_pico(folder / name, state, layers=2, width=32)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=["base", "mean"])
def low_rank(request, wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return make(wide, folder / "low", rank=4, centre=request.param)


def states_of(folder):
    """The tensors on disk, in float32."""
    states = {}
    for name in ("base", *EXPERTS):
        model = LlamaForCausalLM.from_pretrained(folder / name)
        states[name] = {n: t.float() for n, t in model.state_dict().items()}
    return states


def plain_line(states, gamma, scale=SCALE):
    """theta_0 + lambda K sum_k gamma_k tau_k."""
    line = {}
    for name, base in states["base"].items():
        delta = sum(
            share * (states[expert][name] - base)
            for share, expert in zip(gamma, EXPERTS, strict=True)
        )
        line[name] = base + scale * K * delta
    return line


def random_deltas(k=3, c=12, d=9, seed=0):
    return torch.randn(k, c, d, generator=torch.Generator().manual_seed(seed))


# ----- the algebra


def test_the_directions_are_numpys_and_the_error_is_the_discarded_energy():
    deltas = random_deltas()
    found = factorise(deltas, rank=4)
    arrays = deltas.double().numpy()
    left = np.linalg.svd(np.concatenate(list(arrays), axis=1))[0][:, :4]
    right = np.linalg.svd(np.concatenate(list(arrays), axis=0))[2][:4].T
    # Singular vectors have no sign, so the subspaces are compared.
    np.testing.assert_allclose(found.a @ found.a.T, left @ left.T, atol=1e-10)
    np.testing.assert_allclose(found.b @ found.b.T, right @ right.T, atol=1e-10)
    for k, delta in enumerate(arrays):
        kept = left @ left.T @ delta @ right @ right.T
        update = found.update(torch.eye(3, dtype=torch.float64)[k])
        np.testing.assert_allclose(update, kept, atol=1e-10)


def test_no_core_is_better_than_the_closed_form():
    deltas = random_deltas().double()
    found = factorise(deltas, rank=3)
    design = np.kron(found.a.numpy(), found.b.numpy())
    for k, delta in enumerate(deltas):
        best = np.linalg.lstsq(design, delta.numpy().reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(found.cores[k], best.reshape(3, 3), atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 12, 9), (2, 4, 30), (3, 40, 3)])
def test_full_rank_loses_nothing(shape):
    deltas = random_deltas(*shape)
    found = factorise(deltas, rank=max(shape))
    for k, delta in enumerate(deltas):
        gamma = torch.eye(len(deltas), dtype=torch.float64)[k]
        torch.testing.assert_close(found.update(gamma), delta.double())


def test_directions_without_energy_are_left_out():
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(2, 20, 3, generator=generator)
    deltas = thin @ torch.randn(2, 3, 15, generator=generator)
    found = factorise(deltas, rank=12)
    assert found.cores.shape == (2, 6, 6)
    torch.testing.assert_close(
        found.update(torch.tensor([0.0, 1.0], dtype=torch.float64)),
        deltas[1].double(),
        atol=1e-5,
        rtol=0,
    )


@given(st.floats(0.05, 1.0), st.integers(0, 5))
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(energy, seed):
    deltas = random_deltas(seed=seed)
    found = factorise(deltas, energy=energy)
    rank = max(found.cores.shape[1:])
    total = float((deltas.double() ** 2).sum())
    assert float((found.cores**2).sum()) >= energy * total * (1 - 1e-9)
    if rank > 1:
        smaller = factorise(deltas, rank=rank - 1)
        assert float((smaller.cores**2).sum()) < energy * total


def test_large_matrices_have_nearly_the_same_subspace(monkeypatch):
    decay = 0.8 ** torch.arange(60.0)
    deltas = random_deltas(2, 80, 60) * decay
    exact = factorise(deltas, rank=6)
    monkeypatch.setattr(factors_module, "_LARGEST_EXACT", 10)
    near = factorise(deltas, rank=6)
    # The best possible energy, up to a millionth.
    ratio = float((near.cores**2).sum() / (exact.cores**2).sum())
    assert ratio == pytest.approx(1, abs=1e-6)
    assert torch.equal(near.a, factorise(deltas, rank=6).a)


# ----- the family


def test_at_a_high_rank_a_family_is_the_plain_line(wide, tmp_path):
    family = make(wide, tmp_path / "full", rank=32)
    states = states_of(wide)
    gamma = (0.5, 0.2, 0.3)
    merged = family.merge(dict(zip(EXPERTS, gamma, strict=True)))
    torch.testing.assert_close(merged, plain_line(states, gamma), atol=1e-6, rtol=1e-5)
    assert family.manifest.kept_in_all == 1
    # Deltas are then smaller than their factors.
    assert not family.manifest.ranks
    corner = family.merge({"bob": 1})
    for name, base in states["base"].items():
        target = base + SCALE * K * (states["bob"][name] - base)
        torch.testing.assert_close(corner[name], target, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("centre", ["base", "mean"])
def test_deltas_of_low_rank_lose_nothing(wide, tmp_path, centre):
    """Such as those of adapters: two directions each, six in all."""
    base = LlamaForCausalLM.from_pretrained(wide / "base")
    generator = torch.Generator().manual_seed(0)
    for expert in EXPERTS:
        model = LlamaForCausalLM.from_pretrained(wide / "base")
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight
            left = torch.randn(weight.shape[0], 2, generator=generator)
            right = torch.randn(2, weight.shape[1], generator=generator)
            weight.data += 0.1 * left @ right
        model.save_pretrained(tmp_path / expert)
    family = pareto_merge(
        str(wide / "base"), models(tmp_path), tmp_path / "out", rank=9, centre=centre
    )
    # With the default lambda the corners are the sources; other tensors do not vary.
    assert set(family.manifest.ranks.values()) == {6}
    assert len(family.varying) == base.config.num_hidden_layers
    assert family.manifest.kept_in_all == pytest.approx(1, abs=1e-9)
    for expert in EXPERTS:
        source = LlamaForCausalLM.from_pretrained(tmp_path / expert).state_dict()
        merged = family.merge({expert: 2})
        torch.testing.assert_close(merged, dict(source), atol=1e-5, rtol=1e-5)


def test_what_is_lost_is_what_the_manifest_says(wide, low_rank):
    states = states_of(wide)
    for k, expert in enumerate(EXPERTS):
        gamma = np.eye(K)[k]
        target = plain_line(states, gamma)
        merged = low_rank.merge({expert: 1})
        lost = sum(float(((merged[n] - target[n]) ** 2).sum()) for n in target)
        energy = sum(
            float(((target[n] - states["base"][n]) ** 2).sum()) for n in target
        )
        kept = low_rank.manifest.kept[expert]
        assert kept == pytest.approx(1 - lost / energy, abs=1e-5)
        assert 0.1 < kept < 0.95


def test_equal_shares_lose_nothing_around_the_mean(wide, tmp_path):
    family = make(wide, tmp_path / "mean", rank=2, centre="mean")
    line = plain_line(states_of(wide), [1 / K] * K)
    torch.testing.assert_close(family.merge("mean"), line, atol=1e-6, rtol=1e-5)
    assert family.manifest.ranks


@given(
    st.lists(st.floats(0, 1), min_size=K, max_size=K).filter(lambda w: sum(w) > 0.1),
    st.lists(st.floats(0, 1), min_size=K, max_size=K).filter(lambda w: sum(w) > 0.1),
    st.floats(0, 1),
)
def test_gamma_is_linear(low_rank, one, other, share):
    one, other = np.asarray(one), np.asarray(other)
    one, other = one / one.sum(), other / other.sum()
    mixed = share * one + (1 - share) * other

    def at(gamma, name):
        weights = dict(zip(EXPERTS, gamma.tolist(), strict=True))
        return low_rank.tensor(name, weights)

    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        line = share * at(one, name) + (1 - share) * at(other, name)
        torch.testing.assert_close(at(mixed, name), line, atol=1e-6, rtol=1e-5)


def test_weights_are_scaled_and_order_does_not_matter(low_rank):
    expected = torch.tensor([0.25, 0.0, 0.75])
    assert torch.equal(low_rank.gamma({"cyd": 3, "ada": 1}), expected)
    assert torch.equal(low_rank.gamma("mean"), torch.full((3,), 1 / 3))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"adda": 1}, "did you mean 'ada'"),
        ({"ada": -1}, "0 or more, not ada=-1"),
        ({"ada": float("nan")}, "0 or more"),
        ({"ada": 0.0}, "above 0"),
        ("knee", "mean or"),
    ],
)
def test_preferences_without_a_meaning_are_refused(low_rank, weights, message):
    with pytest.raises(ConfigError, match=message):
        low_rank.merge(weights)


def test_a_written_merge_loads_in_transformers(low_rank, tmp_path):
    weights = {"ada": 0.6, "cyd": 0.4}
    out = low_rank.write(weights, tmp_path / "merged")
    model = LlamaForCausalLM.from_pretrained(out)
    merged = low_rank.merge(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, merged[name])
    card = (out / "README.md").read_text()
    assert "| ada | 0.6 | not stated |" in card
    assert (out / "tokenizer.json").is_file()


def test_a_live_family_has_the_written_weights(low_rank, tmp_path):
    live = LiveFamily(low_rank)
    for number, weights in enumerate(({"ada": 1}, {"bob": 0.3, "cyd": 0.7}, "mean")):
        out = low_rank.write(weights, tmp_path / str(number))
        expected = LlamaForCausalLM.from_pretrained(out).state_dict()
        for name, tensor in live.load(weights).state_dict().items():
            assert torch.equal(tensor, expected[name])


def test_live_families_pack_experts_as_transformers_does(tmp_path):
    base = build_pico("qwen2_moe")
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("ada", "bob")):
        moved(build_pico("qwen2_moe"), seed).save_pretrained(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("ada", "bob")]
    family = pareto_merge(str(tmp_path / "base"), paths, tmp_path / "out", rank=2)
    weights = {"ada": 0.8, "bob": 0.2}
    out = family.write(weights, tmp_path / "merged")
    expected = type(base).from_pretrained(out).state_dict()
    for name, tensor in LiveFamily(family).load(weights).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_family_needs_no_other_folder(pico, tmp_path):
    for name in ("base", *EXPERTS):
        shutil.copytree(pico / name, tmp_path / "from" / name)
    family = make(tmp_path / "from", tmp_path / "family", rank=1)
    before = family.merge("mean")
    shutil.rmtree(tmp_path / "from")
    (tmp_path / "family").rename(tmp_path / "moved")
    torch.testing.assert_close(
        ParetoFamily.load(tmp_path / "moved").merge("mean"), before
    )
    text = (tmp_path / "moved" / "pareto_family.json").read_text()
    assert str(tmp_path) not in text


def test_a_source_that_equals_the_base_has_no_energy(pico, tmp_path):
    paths = {"none": str(pico / "base"), "ada": str(pico / "ada")}
    family = pareto_merge(
        str(pico / "base"), paths, tmp_path / "out", rank=2, centre="base"
    )
    assert family.manifest.kept["none"] is None
    stored = LlamaForCausalLM.from_pretrained(pico / "base").state_dict()
    merged = family.merge({"none": 1})
    for name, tensor in stored.items():
        assert torch.equal(merged[name], tensor)
    same = []
    for name in ("one", "two"):
        shutil.copytree(pico / "base", tmp_path / name)
        same.append(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="nothing to merge"):
        pareto_merge(str(pico / "base"), same, tmp_path / "same", rank=2)
    assert not (tmp_path / "same").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a rank"),
        ({"rank": 2, "energy": 0.5}, "either a rank"),
        ({"rank": 0}, "1 or more"),
        ({"energy": 1.5}, "up to 1"),
        ({"rank": 2, "scale": 0}, "above 0"),
        ({"rank": 2, "centre": "median"}, "base or mean"),
        ({"rank": 2, "data": {"ada": "x"}}, "bob has no texts"),
    ],
)
def test_wrong_options_are_refused(pico, tmp_path, options, message):
    (tmp_path / "x").write_text("a\nb\nc\nd\n")
    if "data" in options:
        options = {**options, "data": {"ada": tmp_path / "x"}}
    with pytest.raises(ConfigError, match=message):
        pareto_merge(str(pico / "base"), models(pico), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(pico, wide, tmp_path):
    base = str(pico / "base")
    with pytest.raises(ConfigError, match="two sources"):
        pareto_merge(base, [str(pico / "ada")], tmp_path / "out", rank=2)
    twice = {"one": str(pico / "ada"), "two": str(pico / "ada")}
    with pytest.raises(ConfigError, match="one and two are the same model"):
        pareto_merge(base, twice, tmp_path / "out", rank=2)
    other = [str(pico / "ada"), str(wide / "bob")]
    with pytest.raises(ParetoMergeError, match="one base"):
        pareto_merge(base, other, tmp_path / "out", rank=2)
    with pytest.raises(CheckpointError, match="would replace the source"):
        pareto_merge(base, models(pico), pico, rank=2, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_damaged_families_are_refused(low_rank, tmp_path):
    shutil.copytree(low_rank.folder, tmp_path / "bad")
    file = tmp_path / "bad" / "pareto_family.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(CheckpointError, match="another version"):
        ParetoFamily.load(tmp_path / "bad")
    file.write_text(json.dumps({**content, "sources": ["ada", "bob"]}))
    with pytest.raises(CheckpointError, match="damaged"):
        ParetoFamily.load(tmp_path / "bad")
    file.write_text(json.dumps({**content, "whole": ["nothing"]}))
    with pytest.raises(CheckpointError, match="lacks this tensor"):
        ParetoFamily.load(tmp_path / "bad")
    # As an earlier version wrote it
    file.write_text(json.dumps({**content, "digest": ""}))
    (tmp_path / "bad" / "factors-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="do not fit"):
        ParetoFamily.load(tmp_path / "bad")


def test_a_merge_never_replaces_a_part_of_its_family(low_rank, tmp_path):
    folder = shutil.copytree(low_rank.folder, tmp_path / "family")
    family = ParetoFamily.load(folder)
    for out in (folder, folder / "base"):
        with pytest.raises(CheckpointError, match="would replace the source"):
            family.write({"ada": 1}, out, overwrite=True)
    before = family.merge({"ada": 1})
    # Beside its parts there is room.
    for weights in ({"bob": 1}, {"ada": 1}):
        out = family.write(weights, folder / "merged", overwrite=True)
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], written[name]) for name in before)


@pytest.mark.parametrize("part", ["base/model", "factors-00001"])
def test_a_base_or_factors_of_another_family_are_noticed(
    low_rank, wide, tmp_path, part
):
    folder = shutil.copytree(low_rank.folder, tmp_path / "family")
    other = make(wide, tmp_path / "other", rank=4, scale=0.2)
    name = f"{part}.safetensors"
    # Of the same names and shapes, so that nothing but the values differs.
    assert (other.folder / name).stat().st_size == (folder / name).stat().st_size
    shutil.copy(other.folder / name, folder / name)
    with pytest.raises(CheckpointError, match="have changed since the family was made"):
        ParetoFamily.load(folder)


def test_a_family_tells_where_the_models_differ(pico, tmp_path):
    """The result has the positions, the tensors and the chat template of the base."""
    for name in ("ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    config = json.loads((tmp_path / "ada" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (tmp_path / "ada" / "config.json").write_text(json.dumps(config))
    (tmp_path / "bob" / "chat_template.jinja").write_text("{{ messages }}")
    paths = [str(tmp_path / name) for name in ("ada", "bob")]
    family = pareto_merge(str(pico / "base"), paths, tmp_path / "family", rank=2)
    first, second = ParetoFamily.load(family.folder).manifest.notes
    assert first.startswith("ada: rope_parameters is {'rope_theta': 500000.0")
    assert second == (
        "bob: has a chat template that is not that of base, which the result has"
    )


def test_a_merge_that_its_dtype_cannot_hold_is_refused(pico, tmp_path):
    family = make(
        pico, tmp_path / "family", rank=2, dtype="float16", scale=1e7, centre="base"
    )
    with pytest.raises(CheckpointError, match=r"too large for float16; .*--scale"):
        family.write({"ada": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_vocabularies_are_refused_with_a_cure_that_works(pico, tmp_path):
    model = LlamaForCausalLM.from_pretrained(pico / "ada")
    model.resize_token_embeddings(40, mean_resizing=False)
    model.save_pretrained(tmp_path / "ada")
    save_tokenizer(tmp_path / "ada")
    base, bob = str(pico / "base"), str(pico / "bob")

    def run(ada):
        return pareto_merge(base, [str(ada), bob], tmp_path / "family", rank=2)

    with pytest.raises(
        CheckpointError, match=r"other commands take a model that such a"
    ):
        run(tmp_path / "ada")
    recipe = {
        "merge_method": "passthrough",
        "base_model": base,
        "models": [{"model": str(tmp_path / "ada")}],
        "tokenizer_source": "base",
    }
    family = run(merge(recipe, tmp_path / "cured" / "ada"))
    expected = LlamaForCausalLM.from_pretrained(pico / "ada").state_dict()
    name = "model.embed_tokens.weight"
    # Stored whole, so that the corner is the source.
    assert torch.equal(family.merge({"ada": 1})[name], expected[name])


@pytest.mark.parametrize("centre", ["base", "mean"])
def test_what_is_stored_whole_is_exact_in_bfloat16(pico, tmp_path, centre):
    """Also what the constant part lost when it was rounded."""
    paths = models(pico)
    family = pareto_merge(
        str(pico / "base"), paths, tmp_path / "out", rank=16, centre=centre
    )
    assert not family.manifest.ranks
    for expert in EXPERTS:
        source = AutoModelForCausalLM.from_pretrained(pico / expert).state_dict()
        assert source["lm_head.weight"].dtype == torch.bfloat16
        merged = family.merge({expert: 1})
        assert all(torch.equal(merged[name], source[name]) for name in source)


def test_paths_of_any_kind_are_the_same_models(pico, tmp_path):
    """A source that the plan knows by another name would count as the base, in silence."""
    mixed = pareto_merge(
        pico / "base", [pico / "ada", str(pico / "bob")], tmp_path / "out", rank=2
    )
    named = {"ada": str(pico / "ada"), "bob": pico / "bob"}
    again = pareto_merge(str(pico / "base"), named, str(tmp_path / "two"), rank=2)
    bob = LlamaForCausalLM.from_pretrained(pico / "bob").state_dict()
    for family in (mixed, again):
        # Embeddings are stored whole.
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            assert torch.equal(family.tensor(name, {"bob": 1}), bob[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": None}, "models: expected a list"),
        ({"models": "ada"}, "models: expected a list"),
        ({"models": ["ada", 3]}, "models: expected a folder or a name"),
        ({"out": None}, "out: expected a path"),
        ({"data": {"ada": ["a", "b"], "bob": "x"}}, "data.ada: expected a path"),
        ({"data": "x.txt"}, "data: expected {"),
        ({"data": {}, "training": {"steps": 2}}, "training: expected Training"),
    ],
)
def test_arguments_of_other_types_are_refused(pico, tmp_path, change, message):
    arguments = {"models": ["ada", "bob"], "out": tmp_path / "out", "rank": 2, **change}
    with pytest.raises(ConfigError, match=message):
        pareto_merge(str(pico / "base"), **arguments)
    assert not list(tmp_path.iterdir())
