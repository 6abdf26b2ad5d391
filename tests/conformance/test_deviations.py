"""Each row of the table, shown on both sides."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paretomerge.errors import ParetoMergeError
from tests.conformance.compare import (
    differences,
    relative_error,
    rendered,
    vocabulary,
    weights,
)
from tests.conformance.deviations import DEVIATIONS
from tests.conformance.recipes import write
from tests.conftest import REPOSITORY

REFUSED = [name for name, row in DEVIATIONS.items() if row.refused]
ALIKE = [name for name, row in DEVIATIONS.items() if row.like]
BROKEN = ("linear-sum-to-zero", "multislerp-sum-to-zero", "nan")
UP, HEAD = "model.layers.{}.mlp.up_proj.weight", "lm_head.weight"


@pytest.mark.parametrize("name", REFUSED)
def test_we_refuse_what_mergekit_takes(name, ask, ours):
    answer = ask(DEVIATIONS[name].recipe)
    assert not answer.error
    finite = all(torch.isfinite(w).all() for w in weights(answer.out).values())
    assert finite == (name not in BROKEN)
    with pytest.raises(ParetoMergeError, match=DEVIATIONS[name].refused):
        ours(DEVIATIONS[name].recipe)


@pytest.mark.parametrize("name", ALIKE)
def test_we_merge_as_if_it_were_written_out(
    name, ask, ours, oracle, checkpoints, tmp_path
):
    row = DEVIATIONS[name]
    folder, answer = ours(row.recipe), ask(row.recipe)
    like = oracle.merge(
        write(row.like, checkpoints, tmp_path / "like.yml"), tmp_path / "like"
    )
    assert not like.error
    assert differences(folder, like.out) == []
    assert row.fails in answer.error
    if not row.fails:
        assert differences(folder, answer.out) != []


def test_two_layers_of_one_model(ask, ours, checkpoints):
    row = DEVIATIONS["layers-of-one-model"]
    assert row.fails in ask(row.recipe).error
    source, merged = weights(checkpoints / "ada"), weights(ours(row.recipe))
    for i in (0, 1):
        expected = (source[UP.format(i)] + 3 * source[UP.format(i + 2)]) / 4
        assert relative_error(merged[UP.format(i)], expected) < 1e-6


def test_a_stack_of_qwen_layers(ask, ours, checkpoints):
    row = DEVIATIONS["stacked-qwen"]
    assert row.fails in ask(row.recipe).error
    folder = ours(row.recipe)
    merged = weights(folder)
    layers = [("ada", 0), ("ada", 1), ("bob", 1), ("bob", 2)]
    for i, (expert, layer) in enumerate(layers):
        source = weights(checkpoints / f"qwen-{expert}")
        assert torch.equal(merged[UP.format(i)], source[UP.format(layer)])
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 4


def test_the_head_of_a_last_slice_with_more_sources(ask, ours, checkpoints):
    row = DEVIATIONS["head-of-more-sources"]
    ada, bob = (weights(checkpoints / name)[HEAD] for name in ("ada", "bob"))
    assert torch.equal(weights(ask(row.recipe).out)[HEAD], ada)
    assert relative_error(weights(ours(row.recipe))[HEAD], (ada + 3 * bob) / 4) < 1e-6


def test_a_new_token_in_the_vocabulary_of_the_base(ask, ours, checkpoints):
    row = DEVIATIONS["new-token"]
    assert row.fails in ask(row.recipe).error
    folder = ours(row.recipe)
    assert vocabulary(folder).keys() == vocabulary(checkpoints / "base").keys() | {
        "<|new|>"
    }
    like = weights(checkpoints / "base")[HEAD][vocabulary(checkpoints / "base")["q"]]
    # `force` gives the row to every model: all deltas are 0
    assert (
        relative_error(weights(folder)[HEAD][vocabulary(folder)["<|new|>"]], like)
        < 1e-6
    )


def test_a_token_that_no_source_of_the_tensor_has(ask, ours, checkpoints):
    row = DEVIATIONS["token-without-owner"]
    folder, theirs = ours(row.recipe), ask(row.recipe).out
    embedding, owner = (
        weights(f)["model.embed_tokens.weight"]
        for f in (folder, checkpoints / "tokens-ada")
    )
    number = vocabulary(checkpoints / "tokens-ada")["<|bot|>"]
    assert torch.equal(embedding[vocabulary(folder)["<|bot|>"]], owner[number])
    row_of_theirs = vocabulary(theirs)["<|bot|>"]
    assert not weights(theirs)["model.embed_tokens.weight"][row_of_theirs].any()


def test_the_order_of_a_union(oracle, ours, checkpoints, tmp_path):
    """The same models under a dozen paths: mergekit numbers their tokens in more than one way."""
    row = DEVIATIONS["union-order"]
    orders = set()
    for i in range(12):
        (tmp_path / f"root-{i}").symlink_to(checkpoints)
        answer = oracle.merge(
            write(row.recipe, tmp_path / f"root-{i}", tmp_path / f"{i}.yml"),
            tmp_path / f"out-{i}",
        )
        orders.add(tuple(sorted(vocabulary(answer.out).items())))
    assert len(orders) > 1
    added = {
        token: number
        for token, number in vocabulary(ours(row.recipe)).items()
        if number >= 32
    }
    assert added == {"<|user|>": 32, "<|bot|>": 33, "<|tool|>": 34}


@pytest.mark.parametrize("name", ["alpaca", "exaone", "llama3", "mistral"])
def test_chat_templates_differ_in_space_and_end_only(name, ask, ours):
    text = DEVIATIONS["chat-templates"].recipe.replace("NAME", name)
    mine, theirs = rendered(ours(text)), rendered(ask(text).out)
    assert mine != theirs
    assert re.sub(r"\s|EOS", "", mine) == re.sub(r"\s|EOS", "", theirs)


def test_equal_magnitudes(ask, ours, checkpoints):
    """The deltas of `steps` are all of one magnitude: half of them stay."""
    row = DEVIATIONS["equal-magnitudes"]
    base = weights(checkpoints / "grid")
    kept = [
        weights(folder)[UP.format(0)] != base[UP.format(0)]
        for folder in (ours(row.recipe), ask(row.recipe).out)
    ]
    n = kept[0].numel()
    assert kept[0].sum() == kept[1].sum() == n // 2
    assert kept[0].flatten()[: n // 2].all()
    assert not torch.equal(*kept)


def test_scale_about(ask, ours, checkpoints):
    row = DEVIATIONS["scale-about"]
    source = weights(checkpoints / "ada")[UP.format(0)]
    mine, theirs = (
        weights(folder)[UP.format(0)]
        for folder in (ours(row.recipe), ask(row.recipe).out)
    )
    torch.testing.assert_close(mine, 0.5 * (source + 1) - 1)
    torch.testing.assert_close(theirs, 0.5 * source)


def test_weights_of_sce(ask, ours, checkpoints, tmp_path):
    """What mergekit makes of models whose deltas were multiplied before."""
    row = DEVIATIONS["sce-weight"]
    mine, theirs = ours(row.recipe), ask(row.recipe).out
    unweighted = re.sub(r", parameters: {weight: [\d.]+}", "", row.recipe)
    assert differences(ours(unweighted), theirs) == []
    assert differences(mine, theirs) != []
    base = weights(checkpoints / "base")
    for name, weight in (("ada", 0.3), ("bob", 0.7)):
        folder = shutil.copytree(checkpoints / name, tmp_path / name)
        for file in folder.glob("*.safetensors"):
            scaled = {}
            for key, tensor in load_file(file).items():
                scaled[key] = base[key] + weight * (tensor - base[key])
            save_file(scaled, file, metadata={"format": "pt"})
        unweighted = unweighted.replace(f"${name}", str(folder))
    assert differences(mine, ask(unweighted).out) == []


def test_arithmetic_in_bfloat16(ask, ours, checkpoints):
    row = DEVIATIONS["arithmetic"]
    base, *sources = [
        weights(checkpoints / f"{name}-bf16")[UP.format(0)].double()
        for name in ("base", "ada", "bob")
    ]
    exact = base + 0.3 * sum(source - base for source in sources)
    a, b = (
        weights(folder)[UP.format(0)]
        for folder in (ours(row.recipe), ask(row.recipe).out)
    )
    # float32 may lie on the other side of a tie: then, and only then, the last bit differs
    assert (a == exact.to(torch.bfloat16)).double().mean() > 0.99
    assert (b.double() - exact).abs().mean() > 1.1 * (a.double() - exact).abs().mean()


def test_a_mask_has_an_address(ask, ours):
    """What the second model is pruned to must not matter to the first one's mask: its weight is 0."""
    texts = [
        DEVIATIONS["mask-address"].recipe.replace("OTHER", density)
        for density in ("1.0", "0.5")
    ]
    theirs = [weights(ask(text).out) for text in texts]
    assert any(not torch.equal(theirs[0][name], theirs[1][name]) for name in theirs[0])
    mine = [weights(ours(text)) for text in texts]
    assert all(torch.equal(mine[0][name], mine[1][name]) for name in mine[0])


def test_the_document_lists_every_row():
    text = (REPOSITORY / "docs" / "conformance.md").read_text(encoding="utf-8")
    listed = dict(
        re.findall(r"^\| `([\w-]+)` \| (.* \| .* \| .*) \|$", text, flags=re.M)
    )
    assert listed == {name: row.cells() for name, row in DEVIATIONS.items()}
