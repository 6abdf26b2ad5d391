"""Tokenizers on disk: tokens numbered as transformers numbers them, chat templates."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from paretomerge.checkpoint.chat_template import (
    CHAT_TEMPLATES,
    resolve_chat_template,
    write_chat_template,
)
from paretomerge.checkpoint.tokenizer import read_tokens
from paretomerge.checkpoint.vocabulary import merge_vocabularies
from paretomerge.errors import CheckpointError, RecipeError


def build(kind: str, words: Sequence[str]) -> Tokenizer:
    """A tokenizer of one of four kinds with exactly `words` (for BPE, letters come first)."""
    numbers = {word: i for i, word in enumerate(words)}
    model: Any = {
        "WordLevel": lambda: models.WordLevel(numbers, unk_token=words[0]),
        "WordPiece": lambda: models.WordPiece(numbers, unk_token=words[0]),
        "BPE": lambda: models.BPE(
            numbers, [(w[0], w[1]) for w in words if len(w) == 2]
        ),
        "Unigram": lambda: models.Unigram([(word, -1.0) for word in words], unk_id=0),
    }[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def save(
    folder: Path,
    words: Sequence[str],
    added: Sequence[AddedToken] = (),
    kind: str = "WordLevel",
    config: Mapping[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build(kind, words)
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})})
    )
    return folder


def special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"pad_token": "[PAD]", "eos_token": "x"}, {}),
        (
            {
                "bos_token": {
                    "__type": "AddedToken",
                    "content": "<b>",
                    "lstrip": False,
                    "normalized": False,
                }
            },
            {},
        ),
        ({"additional_special_tokens": ["<i>", "<j>"], "mask_token": "<j>"}, {}),
        (
            {},
            {
                "added_tokens.json": {"[OLD]": 3},
                "special_tokens_map.json": {"pad_token": "[PAD]", "unk_token": "[OLD]"},
            },
        ),
        (
            {"added_tokens_decoder": {"3": {"content": "<d>", "special": False}}},
            {"special_tokens_map.json": {"pad_token": "[NOT READ]"}},
        ),
    ],
)
def test_tokens_are_numbered_as_transformers_does(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any]
) -> None:
    save(tmp_path, ["x", "y"], [AddedToken("<s>")], config=config)
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    tokens, tokenizer = read_tokens(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokens.ids == tokenizer.get_vocab()
    assert {t: f["special"] for t, f in tokens.added.items()} == {
        t.content: t.special for t in tokenizer.added_tokens_decoder.values()
    }


def test_older_files_go_through_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3})
    )
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"})
    )
    tokens = read_tokens(folder)
    assert tokens.ids == {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    folders = {"old": folder, "new": save(tmp_path / "new", ["ab", "<n>"])}
    merge_vocabularies("union", folders, {"old": 4, "new": 2}, "old").write(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab<n>")["input_ids"] == [2, 4]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        read_tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.vocab"):
        read_tokens(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text("torn")
    with pytest.raises(CheckpointError, match="save a fast tokenizer"):
        read_tokens(tmp_path)


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
        ),
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        ),
        ("mistral", "<s>[INST] S\n\nU [/INST] A</s>"),
        (
            "exaone",
            "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n",
        ),
    ],
)
def test_named_chat_templates(tmp_path: Path, name: str, expected: str) -> None:
    save(
        tmp_path,
        ["x"],
        [special("<s>"), special("</s>")],
        config={"bos_token": "<s>", "eos_token": "</s>", "chat_template": "old"},
    )
    write_chat_template(tmp_path, resolve_chat_template(name, {}) or "")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected
    # what a model is asked to continue is the beginning of what it was shown
    asked = tokenizer.apply_chat_template(
        CHAT[:2], tokenize=False, add_generation_prompt=True
    )
    assert expected.startswith(asked)
    assert "chat_template" not in json.loads(
        (tmp_path / "tokenizer_config.json").read_text()
    )


def test_chat_template_values(tmp_path: Path) -> None:
    assert set(CHAT_TEMPLATES) == {"chatml", "alpaca", "llama3", "mistral", "exaone"}
    assert resolve_chat_template("{{ messages }}", {}) == "{{ messages }}"
    with pytest.raises(RecipeError, match="did you mean 'chatml'"):
        resolve_chat_template("chatlm", {})
    named = [
        {"name": "tool_use", "template": "{{ 1 }}"},
        {"name": "default", "template": "{{ 2 }}"},
    ]
    folders = {
        "a": save(tmp_path / "a", ["x"]),
        "b": save(tmp_path / "b", ["x"], config={"chat_template": "{{ 3 }}"}),
        "c": save(tmp_path / "c", ["x"], config={"chat_template": named}),
        "d": save(tmp_path / "d", ["x"], config={"chat_template": "not this"}),
    }
    (folders["d"] / "chat_template.jinja").write_text("{{ 2 }}\n")
    assert resolve_chat_template("auto", folders) == "{{ 2 }}"
    assert resolve_chat_template("auto", {m: folders[m] for m in "abc"}) == "{{ 3 }}"
    assert resolve_chat_template("auto", {"a": folders["a"]}) is None
