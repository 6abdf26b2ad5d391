"""Rows of routers, against hooks in live models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.systems.moe import plan_moe, write_moe
from paretomerge.systems.moe.router import make_router
from tests.conftest import save_tokenizer
from tests.systems.moe.pico import dense, load, save_dense

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FIRST = 2  # the id of "a"
BOS = 30  # the id of "~"


def ids_of(prompt: str) -> list[int]:
    return [FIRST + LETTERS.index(letter) for letter in prompt]


def mlp_inputs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(layers, tokens, d): what goes into the MLPs, recorded at the output of the norm before."""
    recorded = []

    def record(module: Any, args: Any, output: torch.Tensor) -> None:
        recorded.append(output[0])

    handles = [
        layer.post_attention_layernorm.register_forward_hook(record)
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(recorded)


def config_of(source: str, **keys: Any) -> dict[str, Any]:
    return {
        "base_model": source,
        "experts": [
            {
                "source_model": source,
                "positive_prompts": ["abc", "bd"],
                "negative_prompts": ["xyz", "q"],
            },
            {"source_model": source, "positive_prompts": ["xyzw"]},
        ],
        **keys,
    }


@pytest.mark.parametrize("adds_bos", [False, True])
def test_hidden_rows_are_means_at_the_input_of_the_mlp(adds_bos: bool, tmp_path: Path):
    model = dense("llama")
    model.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense", adds_bos)
    plan = plan_moe(config_of(str(tmp_path / "dense")))
    router = make_router(plan)

    def mean(prompts: list[str]) -> torch.Tensor:
        means = []
        for prompt in prompts:
            begin = [BOS] if adds_bos else []
            states = mlp_inputs(model, begin + ids_of(prompt))
            # The token that begins every sequence is read, and is no part of the mean.
            means.append(states[:, len(begin) :].mean(1))
        return torch.stack(means).mean(0)

    difference = mean(["abc", "bd"]) - mean(["xyz", "q"])
    expected = torch.stack([difference, mean(["xyzw"])], dim=1)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(router.gates, expected, rtol=1e-4, atol=1e-5)
    # The layer's own input would point elsewhere.
    with torch.inference_mode():
        out = model(torch.tensor([ids_of("xyzw")]), output_hidden_states=True)
    inputs = torch.stack(out.hidden_states[:-1])[:, 0].mean(1)
    cosines = torch.nn.functional.cosine_similarity(inputs, router.gates[:, 1], dim=-1)
    assert cosines.max() < 0.99


def test_cheap_rows_are_mean_embeddings_in_every_layer(tmp_path: Path):
    source = save_dense(tmp_path / "dense", "llama")
    table = load(source).get_input_embeddings().weight.detach()
    router = make_router(plan_moe(config_of(source, gate_mode="cheap_embed")))
    first = (table[ids_of("abc")].mean(0) + table[ids_of("bd")].mean(0)) / 2
    first = first - (table[ids_of("xyz")].mean(0) + table[ids_of("q")].mean(0)) / 2
    second = table[ids_of("xyzw")].mean(0)
    expected = torch.stack([first / first.norm(), second / second.norm()])
    for layer in range(2):
        torch.testing.assert_close(router.gates[layer], expected)


def test_random_rows_follow_the_seed_and_have_unit_length(tmp_path: Path):
    source = save_dense(tmp_path / "dense", "llama")
    plan = plan_moe(config_of(source, gate_mode="random"))
    assert any("no effect" in note for note in plan.notes)
    one, again, other = (make_router(plan, seed=seed).gates for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(2, 2))
    assert not torch.allclose(one[0], one[1])


def test_the_gate_of_a_shared_expert_has_its_prompts_direction_or_is_zero(
    tmp_path: Path,
):
    source = save_dense(tmp_path / "dense", "qwen2")
    shared = {"source_model": source, "residual_scale": 0.1}
    router = make_router(plan_moe(config_of(source, shared_experts=[shared])))
    assert torch.equal(router.shared, torch.zeros(2, 1, 16))
    with_prompts = {**shared, "positive_prompts": ["xyzw"]}
    router = make_router(plan_moe(config_of(source, shared_experts=[with_prompts])))
    # The second expert has the same prompt.
    assert torch.equal(router.shared[:, 0], router.gates[:, 1])


def test_the_written_router_sends_prompts_to_their_expert(tmp_path: Path):
    """Also behind the experts of earlier layers, which the base did not have."""
    source = save_dense(tmp_path / "dense", "llama")
    other = save_dense(tmp_path / "other", "llama", 1)
    prompts = {0: ["abc", "bca", "cab"], 1: ["xyz", "yzx", "zxy"]}
    experts = []
    for index, model in enumerate((source, other)):
        experts.append(
            {
                "source_model": model,
                "positive_prompts": prompts[index],
                "negative_prompts": prompts[1 - index],
            }
        )
    plan = write_moe({"base_model": source, "experts": experts}, tmp_path / "moe")
    assert not plan.notes
    moe = load(tmp_path / "moe")
    for index, texts in prompts.items():
        for text in texts:
            states = mlp_inputs(moe, ids_of(text))
            for layer, block in enumerate(moe.model.layers):
                scores = states[layer].mean(0) @ block.mlp.gate.weight.T
                assert scores.argmax() == index


def test_an_expert_that_its_own_prompts_do_not_reach_is_a_note(tmp_path: Path):
    source = save_dense(tmp_path / "dense", "llama")
    config = config_of(source)
    # "abc" less "abd" is all but orthogonal to "abc" itself.
    config["experts"] = [
        {
            "source_model": source,
            "positive_prompts": ["abc"],
            "negative_prompts": ["abcabcabd"],
        },
        {"source_model": source, "positive_prompts": ["abcd"]},
    ]
    router = make_router(plan_moe(config))
    assert any(note.startswith("experts[0]: for its own") for note in router.notes)


@pytest.mark.parametrize("gate_mode", ["hidden", "cheap_embed"])
def test_prompts_without_a_direction_are_refused(gate_mode: str, tmp_path: Path):
    source = save_dense(tmp_path / "dense", "llama")
    config = config_of(source, gate_mode=gate_mode)
    config["experts"][0]["negative_prompts"] = ["bd", "abc"]
    with pytest.raises(RecipeError, match=r"experts\[0\]: .* no direction"):
        write_moe(config, tmp_path / "moe")
    # Another text, and the same tokens: only added tokens and letters are in the vocabulary.
    experts = config["experts"]
    experts[0] = {"source_model": source, "positive_prompts": ["A"]}
    experts[1] = {"source_model": source, "positive_prompts": ["B"]}
    with pytest.raises(RecipeError, match="the same row"):
        write_moe(config, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_a_base_that_cannot_read_prompts_is_refused(tmp_path: Path):
    dense("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        write_moe(config_of(str(tmp_path / "dense")), tmp_path / "moe")
    source = save_dense(tmp_path / "short", "llama", max_position_embeddings=3)
    with pytest.raises(RecipeError, match="has 4 tokens, and the base reads 3"):
        write_moe(config_of(source), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_order_of_the_experts_does_not_matter(kind: str, tmp_path: Path):
    """Experts that move with their rows are the same function."""
    base = save_dense(tmp_path / "base", kind)
    prompts = (["abc"], ["xyz"], ["mno"])
    experts = []
    for index, texts in enumerate(prompts):
        source = save_dense(tmp_path / str(index), kind, index + 1)
        experts.append({"source_model": source, "positive_prompts": texts})
    more: dict[str, Any] = {}
    if kind == "qwen2":
        more["shared_experts"] = [{"source_model": base, "positive_prompts": ["q"]}]
    results = []
    for number, order in enumerate(([0, 1, 2], [2, 0, 1])):
        config = {"base_model": base, "experts": [experts[i] for i in order], **more}
        write_moe(config, tmp_path / f"moe-{number}")
        moe = load(tmp_path / f"moe-{number}")
        ids = torch.tensor([ids_of("abcxyzmnoq")])
        with torch.inference_mode():
            results.append(moe(ids).logits)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
