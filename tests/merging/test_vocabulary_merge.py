"""Models with vocabularies of their own, merged.

Rows by hand, a config that says so, a model and a tokenizer that load.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from paretomerge.errors import CheckpointError, ParetoMergeError
from paretomerge.merging.engine import merge, merged_tensors
from paretomerge.merging.plan import layout
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.checkpoint.test_tokenizer import save, special

WORDS = [f"w{i}" for i in range(8)]
TOKENS = {
    "base": (WORDS, []),
    "ada": (WORDS, [special("<a>"), AddedToken("tool", normalized=True)]),
    "bob": ([*reversed(WORDS)], [special("<b>"), special("<a>")]),
}
WIDTH = 8


def build(folder: Path, tied: bool) -> Path:
    """base: 8 tokens; ada: 10, and 12 rows; bob: 10, the words the other way round."""
    for seed, (name, (words, added)) in enumerate(TOKENS.items()):
        torch.manual_seed(seed)
        rows = len(words) + len(added) + (2 if name == "ada" else 0)
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=WIDTH,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        save(folder / name, words, added)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build(tmp_path_factory.mktemp("vocabularies"), request.param)


def recipe(models: Path, base: bool = True, **more: Any) -> Recipe:
    listed = [
        {"model": f"{models}/{m}", "parameters": {"weight": w}}
        for m, w in (("ada", 0.5), ("bob", 0.25))
    ]
    data: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": f"{models}/base",
        "models": listed,
        "dtype": "float32",
        **more,
    }
    if not base:
        del data["base_model"]
        data["merge_method"] = "linear"
    return Recipe.from_dict(data)


def row_of(models: Path, tensor: str) -> Callable[[str, str], torch.Tensor | None]:
    """(model, token) -> its row, None where the model lacks it."""
    held = {m: load_file(models / m / "model.safetensors") for m in TOKENS}
    numbers = {
        m: {t: i for i, t in enumerate([*words, *(str(a.content) for a in added)])}
        for m, (words, added) in TOKENS.items()
    }
    return lambda model, token: (
        held[model][tensor][numbers[model][token]] if token in numbers[model] else None
    )


def filled(
    row: Callable[[str, str], torch.Tensor | None], model: str, token: str, base: bool
) -> torch.Tensor:
    """The documented rule, anew: the model's own row; else the base's; else its only owner's.

    Else the mean of its owners.
    """
    if (own := row(model, token)) is not None:
        return own
    if base and (theirs := row("base", token)) is not None:
        return theirs
    owners = [
        r
        for m in (("base",) if base else ()) + ("ada", "bob")
        if (r := row(m, token)) is not None
    ]
    return torch.stack(owners).mean(0) if owners else torch.zeros(WIDTH)


def check(
    models: Path,
    out: Path,
    base: bool,
    n: int,
    names: tuple[str, ...] = ("model.embed_tokens.weight", "lm_head.weight"),
) -> dict[str, int]:
    got = load_file(out / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(out)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == n
    model = AutoModelForCausalLM.from_pretrained(out)
    for name in names:
        if name not in got:
            assert model.config.tie_word_embeddings
            continue
        row = row_of(models, name)
        assert got[name].shape == (n, WIDTH)
        for token, number in vocabulary.items():
            ada, bob = filled(row, "ada", token, base), filled(row, "bob", token, base)
            start = filled(row, "base", token, base)
            wanted = (
                start + 0.5 * (ada - start) + 0.25 * (bob - start)
                if base
                else (0.5 * ada + 0.25 * bob) / 0.75
            )
            torch.testing.assert_close(
                got[name][number],
                wanted,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, t=token: f"{t}: {m}",
            )
    ids = tokenizer("w3 w0", return_tensors="pt", return_token_type_ids=False)
    assert ids["input_ids"].tolist() == [[vocabulary["w3"], vocabulary["w0"]]]
    assert model(**ids).logits.shape == (1, 2, n)
    return vocabulary


def test_union(models: Path, tmp_path: Path) -> None:
    vocabulary = check(
        models,
        merge(recipe(models, tokenizer_source="union"), tmp_path / "out"),
        True,
        11,
    )
    assert vocabulary == {
        **{w: i for i, w in enumerate(WORDS)},
        "<a>": 8,
        "tool": 9,
        "<b>": 10,
    }


def test_union_without_a_base(models: Path, tmp_path: Path) -> None:
    check(
        models,
        merge(recipe(models, base=False, tokenizer_source="union"), tmp_path / "out"),
        False,
        11,
    )


def test_base(models: Path, tmp_path: Path) -> None:
    out = merge(recipe(models, tokenizer_source="base"), tmp_path / "out")
    check(models, out, True, 8)
    assert (out / "tokenizer.json").read_bytes() == (
        models / "base" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize(("model", "n"), [("ada", 10), ("bob", 10)])
def test_one_model(models: Path, tmp_path: Path, model: str, n: int) -> None:
    out = merge(recipe(models, tokenizer_source=f"{models}/{model}"), tmp_path / "out")
    vocabulary = check(models, out, True, n)
    assert vocabulary == AutoTokenizer.from_pretrained(models / model).get_vocab()


def test_one_token_from_one_model_and_rows_to_a_multiple(
    models: Path, tmp_path: Path
) -> None:
    tokens = {
        "tool": {
            "source": {"kind": "model_token", "model": f"{models}/bob", "token": "w1"},
            "force": True,
        },
        "<zero>": {"source": {"kind": "zero"}},
    }
    settings = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 8}
    out = merge(recipe(models, tokenizer=settings), tmp_path / "out")
    got = load_file(out / "model.safetensors")
    vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
    assert (
        json.loads((out / "config.json").read_text())["vocab_size"] == 16
        and len(vocabulary) == 12
    )
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & got.keys():
        own = row_of(models, name)("bob", "w1")
        assert own is not None
        torch.testing.assert_close(got[name][vocabulary["tool"]], own)
        assert not got[name][vocabulary["<zero>"]].any()
        torch.testing.assert_close(
            got[name][12:], got[name][:12].mean(0).expand(4, -1), rtol=1e-4, atol=1e-6
        )
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 16
    assert Recipe.load(out / "mergekit_config.yml") == recipe(
        models, tokenizer=settings
    )


def test_chat_templates(models: Path, tmp_path: Path) -> None:
    out = merge(
        recipe(models, tokenizer_source="union", chat_template="chatml"),
        tmp_path / "named",
    )
    text = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "w1"}], tokenize=False
    )
    assert text == "<|im_start|>user\nw1<|im_end|>\n"
    out = merge(
        recipe(
            models,
            tokenizer_source="base",
            chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}",
        ),
        tmp_path / "own",
    )
    assert (
        AutoTokenizer.from_pretrained(out).apply_chat_template(
            [{"role": "user", "content": "w1"}], tokenize=False
        )
        == "[w1]"
    )
    with pytest.raises(ParetoMergeError, match="did you mean 'chatml'"):
        merge(
            recipe(models, tokenizer_source="base", chat_template="chatlm"),
            tmp_path / "wrong",
        )
    assert not (tmp_path / "wrong").exists()


def test_a_template_that_is_none_is_told_before_a_weight_is_read(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "paretomerge.checkpoint.operand.StoredTensor.rows",
        lambda *_: pytest.fail("read a weight"),
    )
    with pytest.raises(ParetoMergeError, match="did you mean 'chatml'"):
        make_plan(recipe(models, tokenizer_source="base", chat_template="chatlm"))


@pytest.mark.parametrize("block", [8, 24, 1 << 20])
def test_the_same_bits_for_any_block(models: Path, block: int) -> None:
    plan = make_plan(
        recipe(models, tokenizer={"source": "union", "pad_to_multiple_of": 16})
    )
    whole, other = dict(merged_tensors(plan)), dict(merged_tensors(plan, block=block))
    assert all(torch.equal(whole[n], other[n]) for n in whole)


def test_vocabularies_of_steps(models: Path, tmp_path: Path) -> None:
    """A step's tensors lie in the vocabulary of its base until the last document merges
    vocabularies.
    """
    inner = (
        "name: x\nmerge_method: passthrough\nmodels: "
        f"[{{model: {models}/bob, parameters: {{scale: 0.5}}}}]\n"
    )
    outer = (
        f"merge_method: linear\nbase_model: {models}/ada\nparameters: {{weight: 1}}\nmodels: "
        f"[{{model: {{}}}}]\n"
        "tokenizer: {source: union, pad_to_multiple_of: 16}\ndtype: float32\n"
    )
    merge(Recipe.from_yaml(inner), tmp_path / "x")
    wanted = load_file(
        merge(
            Recipe.from_yaml(outer.replace("{}", str(tmp_path / "x"))), tmp_path / "a"
        )
        / "model.safetensors"
    )
    got = load_file(
        merge(
            Recipe.from_yaml(inner + "---\n" + outer.replace("{}", "x")), tmp_path / "b"
        )
        / "model.safetensors"
    )
    assert got.keys() == wanted.keys() and all(
        torch.equal(got[n], wanted[n]) for n in got
    )


def test_unequal_embeddings_are_refused_with_the_cure(
    models: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"weight: expected one shape, got .* `tokenizer_source: union`",
    ):
        merge(recipe(models), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tokenizer_source": "unoin"}, "unoin"),
        ({"tokenizer_source": "./elsewhere"}, "elsewhere.*no such folder"),
        (
            {"tokenizer": {"source": "union", "tokens": {"q": {"source": "eve"}}}},
            "unknown model 'eve'",
        ),
        (
            {
                "tokenizer": {
                    "source": "union",
                    "tokens": {"q": {"source": {"kind": "one"}}},
                }
            },
            "kind: zero",
        ),
    ],
)
def test_tokenizers_that_cannot_be(
    models: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ParetoMergeError, match=told):
        merge(recipe(models, **settings), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_tokenizer_is_named(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "m")
    (tmp_path / "m" / "bob" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"bob: the folder has no tokenizer"):
        merge(recipe(tmp_path / "m", tokenizer_source="union"), tmp_path / "out")
    (tmp_path / "m" / "bob" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bob.tokenizer\.json: not valid JSON"):
        merge(recipe(tmp_path / "m", tokenizer_source="union"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_is_merged_once_until_a_tokenizer_changes(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search plans thousands of merges of the same models."""
    calls = []
    merge_once = layout.merge_vocabularies

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0])
        return merge_once(*arguments, **options)

    monkeypatch.setattr(layout, "merge_vocabularies", count)
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    sources = [{"model": str(tmp_path / name)} for name in ("ada", "bob")]

    def size(weight: float) -> int:
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "base"),
            "tokenizer_source": "union",
            "models": [{**one, "parameters": {"weight": weight}} for one in sources],
        }
        vocabulary = make_plan(recipe).vocabulary
        assert vocabulary is not None
        return vocabulary.size

    first = size(0.1)
    assert size(0.2) == first and len(calls) == 1
    file = tmp_path / "ada" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"].pop(max(content["model"]["vocab"]))
    file.write_text(json.dumps(content))
    size(0.2)
    assert len(calls) == 2
