"""Kinship and profile against a brute-force computation in float64, on whole checkpoints."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging import delta_profile as kinship
from paretomerge.merging.delta_profile import (
    DeltaProfile,
    near_duplicates,
    order_by_similarity,
    profile,
)
from tests.checkpoint.test_adapter import PREFIX, UP, adapter, factors
from tests.conftest import EXPERTS, pico_states, save_pico


@pytest.fixture(scope="module")
def found(pico):
    return profile(str(pico / "base"), {e: str(pico / e) for e in EXPERTS})


def deltas(pico, names=None):
    """(K, n) in float64, tensor after tensor."""
    base = Checkpoint(str(pico / "base"))
    names = names or sorted(base.headers)
    theta = np.concatenate([base.tensor(n).double().numpy().ravel() for n in names])
    experts = [Checkpoint(str(pico / e)) for e in EXPERTS]  # bob lies in several shards
    return np.stack(
        [
            np.concatenate([e.tensor(n).double().numpy().ravel() for n in names])
            - theta
            for e in experts
        ]
    )


def test_similarities_are_those_of_the_whole_deltas(pico, found):
    tau = deltas(pico)
    assert found.size == tau.shape[1]
    lengths = np.linalg.norm(tau, axis=1)
    np.testing.assert_allclose(found.norms, lengths, rtol=1e-12)
    np.testing.assert_allclose(
        found.cosine, tau @ tau.T / np.outer(lengths, lengths), rtol=1e-10
    )
    np.testing.assert_allclose(found.pearson, np.corrcoef(tau), rtol=1e-10)
    for i, j in itertools.combinations(range(3), 2):
        assert found.euclidean[i, j] == pytest.approx(
            np.linalg.norm(tau[i] - tau[j]), rel=1e-10
        )
    assert (np.diag(found.euclidean) == 0).all()


def test_the_profile_says_where_the_deltas_are(pico, found):
    architecture = Checkpoint(str(pico / "base")).architecture
    layers = found.by_layer(architecture)
    assert layers.shape == (4, 3)
    for layer, role in itertools.product(range(4), ("attention", "mlp", "other")):
        names = [
            n for n in architecture.by_layer[layer] if architecture.role(n) == role
        ]
        np.testing.assert_allclose(
            found.by_layer(architecture, role)[layer],
            (deltas(pico, names) ** 2).sum(1),
            rtol=1e-10,
        )
    outside = [n for n in architecture.names if architecture.layer(n) is None]
    np.testing.assert_allclose(
        layers.sum(0) + (deltas(pico, outside) ** 2).sum(1), found.norms**2, rtol=1e-10
    )


@pytest.mark.parametrize("block", [1, 17, 1 << 20])
def test_the_size_of_blocks_changes_rounding_only(pico, found, monkeypatch, block):
    monkeypatch.setattr(kinship, "_BLOCK", block)
    other = profile(str(pico / "base"), {e: str(pico / e) for e in EXPERTS})
    np.testing.assert_allclose(other.products, found.products, rtol=1e-12)


def test_json_there_and_back(found):
    assert DeltaProfile.from_json(found.to_json()) == found
    for text in ("", "[]", "{}", json.dumps({"base": 1, "sources": 3})):
        with pytest.raises(ConfigError, match="expected a delta profile"):
            DeltaProfile.from_json(text)


def test_a_source_that_is_the_base_and_twins(pico, tmp_path):
    sources = {
        "same": str(pico / "base"),
        "ada": str(pico / "ada"),
        "again": str(pico / "ada") + "/",
        "bob": str(pico / "bob"),
    }
    found = profile(str(pico / "base"), sources)
    assert (
        found.norms[0] == 0 and not found.cosine[0].any() and not found.pearson[0].any()
    )
    assert found.cosine[1, 2] == 1 and found.euclidean[1, 2] == 0
    assert near_duplicates(found, 0.98) == {"again": "ada"}
    assert near_duplicates(found.of(("again", "bob", "ada")), 0.98) == {"ada": "again"}
    for threshold in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="near_duplicates"):
            near_duplicates(found, threshold)


def test_the_least_alike_come_first(found):
    products = np.eye(4)
    products[0, 1] = products[1, 0] = products[0, 2] = products[2, 0] = 0.9
    products[1, 2] = products[2, 1] = 0.8
    some = DeltaProfile(
        "b",
        dict.fromkeys("abcd", ""),
        100,
        {},
        tuple(map(tuple, products.tolist())),
        (0.0,) * 4,
    )
    assert order_by_similarity(some) == (
        "d",
        "a",
        "b",
        "c",
    )  # d is like none; of the equally far the earlier
    assert sorted(order_by_similarity(found)) == sorted(EXPERTS)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000), st.floats(0.01, 1.0))
def test_of_twins_one_stays(k, seed, threshold):
    rng = np.random.default_rng(seed)
    tau = rng.standard_normal((k, 3))
    some = DeltaProfile(
        "b",
        {f"m{i}": "" for i in range(k)},
        3,
        {},
        tuple(map(tuple, (tau @ tau.T).tolist())),
        tuple(tau.sum(1).tolist()),
    )
    dropped = near_duplicates(some, threshold)
    kept = [n for n in some.names if n not in dropped]
    assert kept and set(dropped.values()) <= set(kept)
    cosine = some.of(tuple(kept)).cosine - 2 * np.eye(len(kept))
    assert cosine.max() <= threshold
    assert all(
        some.cosine[some.names.index(a)][some.names.index(b)] > threshold
        for a, b in dropped.items()
    )


def test_models_that_do_not_fit_are_refused(pico, tmp_path):
    save_pico(tmp_path / "wide", pico_states(width=32)["ada"], width=32)
    with pytest.raises(
        CheckpointError, match=r"expected one shape, got .*ada \[.*wide \["
    ):
        profile(
            str(pico / "base"),
            {"ada": str(pico / "ada"), "wide": str(tmp_path / "wide")},
        )
    save_pico(tmp_path / "broken", pico_states()["ada"])
    state = load_file(tmp_path / "broken" / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"broken: model.norm.weight: expected finite weights"
    ):
        profile(str(pico / "base"), {"broken": str(tmp_path / "broken")})


def test_adapters_are_models_like_others(pico, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        adapter(tmp_path / name, factors(UP, (32, 16), seed=seed))
    found = profile(
        str(pico / "base"),
        {name: f"{pico / 'base'}+{tmp_path / name}" for name in ("one", "two")},
    )
    assert [tensor for tensor, mass in found.mass.items() if any(mass)] == [
        f"{UP}.weight"
    ]
    base = Checkpoint(str(pico / "base")).tensor(f"{UP}.weight").float()
    tau = []
    for name in ("one", "two"):
        state = load_file(tmp_path / name / "adapter_model.safetensors")
        b, a = (state[f"{PREFIX}{UP}.lora_{side}.weight"].float() for side in "BA")
        tau.append((base + 3 * b @ a - base).double().flatten())
    assert found.cosine[0, 1] == pytest.approx(
        torch.cosine_similarity(*tau, dim=0).item(), rel=1e-5
    )
    assert found.norms[0] == pytest.approx(tau[0].norm().item(), rel=1e-5)


def test_a_tensor_that_one_lacks_is_left_out_for_all(pico, tmp_path):
    save_pico(tmp_path / "less", pico_states()["ada"])
    state = load_file(tmp_path / "less" / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    found = profile(
        str(pico / "base"), {"less": str(tmp_path / "less"), "bob": str(pico / "bob")}
    )
    assert "model.layers.1.mlp.up_proj.weight" not in found.mass
    assert found.size == sum(
        torch.Size(h.shape).numel()
        for n, h in Checkpoint(str(pico / "base")).headers.items()
        if n in found.mass
    )
