"""Merged vocabularies: which row goes where, what is written, what is refused.

Agrees with mergekit, run aside.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from paretomerge.checkpoint.tokenizer import read_tokens
from paretomerge.checkpoint.vocabulary import Vocabulary, merge_vocabularies
from paretomerge.errors import CheckpointError, RecipeError
from tests.checkpoint.test_tokenizer import save, special

LETTERS = "abcdefgh"


def rows_of(folders: Mapping[str, Path]) -> dict[str, int]:
    return {
        model: max(read_tokens(folder).ids.values()) + 1
        for model, folder in folders.items()
    }


def tensors(rows: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Rows that tell where they come from: 1000 times the model's number plus the row's."""
    return {
        m: torch.arange(n, dtype=torch.float32)[:, None] + 1000 * (k + 1)
        for k, (m, n) in enumerate(rows.items())
    }


def brought(
    vocabulary: Vocabulary, held: Mapping[str, torch.Tensor]
) -> dict[str, list[float]]:
    return {
        m: row_map.apply(held[m], held.__getitem__)[:, 0].tolist()
        for m, row_map in vocabulary.row_maps.items()
    }


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    """a: x y z; b: z x w <s>; c: w y v <t>."""
    return {
        "a": save(tmp_path / "a", ["x", "y", "z"]),
        "b": save(tmp_path / "b", ["z", "x", "w"], [special("<s>")]),
        "c": save(tmp_path / "c", ["w", "y", "v"], [AddedToken("<t>", lstrip=True)]),
    }


def test_union_worked(three: dict[str, Path]) -> None:
    rows = rows_of(three)
    vocabulary = merge_vocabularies("union", three, rows, "a")
    # the base's numbers, then others' ordinary tokens model by model, then added ones
    assert vocabulary.tokens.ids == {
        "x": 0,
        "y": 1,
        "z": 2,
        "w": 3,
        "v": 4,
        "<s>": 5,
        "<t>": 6,
    }
    got = brought(vocabulary, tensors(rows))
    mean_w = (2002 + 3000) / 2
    assert got["a"] == [1000, 1001, 1002, mean_w, 3002, 2003, 3003]
    assert got["b"] == [2001, 1001, 2000, 2002, 3002, 2003, 3003]
    assert got["c"] == [1000, 3001, 1002, 3000, 3002, 2003, 3003]
    assert vocabulary.row_maps["a"].donors == ("b", "c")
    assert vocabulary.config_updates == {"vocab_size": 7}


def test_without_a_base_the_first_model_gives_numbers_but_no_rows(
    three: dict[str, Path],
) -> None:
    rows = rows_of(three)
    vocabulary = merge_vocabularies("union", three, rows, None)
    assert list(vocabulary.tokens.ids)[:3] == ["x", "y", "z"]
    assert brought(vocabulary, tensors(rows))["c"][0] == (1000 + 2001) / 2


def test_source_base_or_one_model(three: dict[str, Path], tmp_path: Path) -> None:
    rows = rows_of(three)
    base = merge_vocabularies("base", three, rows, "b")
    assert brought(base, tensors(rows))["c"] == [2000, 2001, 3000, 2003]
    assert base.row_maps["b"].is_identity and not base.row_maps["c"].is_identity
    one = merge_vocabularies("c", three, rows, "b")
    assert brought(one, tensors(rows))["b"] == [2002, (1001 + 3001) / 2, 3002, 3003]
    out = tmp_path / "out"
    out.mkdir()
    one.write(out)
    assert (out / "tokenizer.json").read_bytes() == (
        three["c"] / "tokenizer.json"
    ).read_bytes()


def test_overrides(three: dict[str, Path]) -> None:
    rows = rows_of(three)
    tokens = {
        "w": {"source": "c"},
        "x": {
            "source": {"kind": "model_token", "model": "c", "token": "v"},
            "force": True,
        },
        "y": {"source": {"kind": "zero"}},
        "z": {"force": True},
        "<new>": {"source": {"kind": "model_token", "model": "b", "token_id": 1}},
        "<bare>": {},
    }
    vocabulary = merge_vocabularies("base", three, rows, "a", tokens)
    assert vocabulary.tokens.ids == {
        "x": 0,
        "y": 1,
        "z": 2,
        "w": 3,
        "<new>": 4,
        "<bare>": 5,
    }
    got = brought(vocabulary, tensors(rows))
    assert got["a"] == [3002, 1001, 1002, 3000, 2001, 0]
    assert got["b"] == [3002, 0, 1002, 2002, 2001, 0]
    assert got["c"] == [3002, 3001, 1002, 3000, 2001, 0]
    assert tokens["w"] == {"source": "c"}


def test_padding_rows_are_the_mean(three: dict[str, Path]) -> None:
    rows = {model: n + 1 for model, n in rows_of(three).items()}
    vocabulary = merge_vocabularies("base", three, rows, "a", pad_to_multiple_of=4)
    assert vocabulary.size == 4 and vocabulary.config_updates["vocab_size"] == 4
    assert brought(vocabulary, tensors(rows))["a"] == [1000, 1001, 1002, 1001]
    assert not vocabulary.row_maps["a"].is_identity
    assert (
        merge_vocabularies("base", three, rows, "b", pad_to_multiple_of=4)
        .row_maps["b"]
        .is_identity
    )


def test_equal_vocabularies_need_no_work(tmp_path: Path) -> None:
    folders = {m: save(tmp_path / m, ["x", "y"], [special("<s>")]) for m in "ab"}
    (folders["b"] / "tokenizer.json").write_text(
        json.dumps(json.loads((folders["b"] / "tokenizer.json").read_text()))
    )
    vocabulary = merge_vocabularies(
        "union", folders, {"a": 3, "b": 8}, "a"
    )  # b's rows were rounded up: they are cut
    assert all(row_map.is_identity for row_map in vocabulary.row_maps.values())
    assert not vocabulary.has_new_tokens
    own = torch.randn(8, 2)
    row_map = vocabulary.row_maps["b"]
    assert row_map.apply(own, {}.__getitem__).data_ptr() == own.data_ptr()
    assert row_map.apply(own, {}.__getitem__).shape == (3, 2)


def test_gaps_between_numbers_stay_where_they_are(tmp_path: Path) -> None:
    folders = {
        "a": save(tmp_path / "a", ["x"]),
        "b": save(tmp_path / "b", ["x"]),
        "c": save(tmp_path / "c", ["x"]),
    }
    for model in "ab":
        path = folders[model] / "tokenizer.json"
        data = json.loads(path.read_text())
        data["model"]["vocab"] = {"x": 0, "y": 2}
        path.write_text(json.dumps(data))
    rows = {"a": 3, "b": 3, "c": 1}
    vocabulary = merge_vocabularies("base", folders, rows, "a")
    assert vocabulary.row_maps["b"].is_identity
    assert brought(vocabulary, tensors(rows))["c"] == [3000, 1001, 1002]


def test_a_token_beyond_a_models_rows_is_none_of_its_tokens(
    three: dict[str, Path],
) -> None:
    rows = {**rows_of(three), "b": 3}  # b's <s> was never given a row
    vocabulary = merge_vocabularies("union", three, rows, "a")
    assert "<s>" not in vocabulary.tokens.ids


WORDS = st.lists(
    st.text(LETTERS, min_size=1, max_size=3), min_size=1, max_size=8, unique=True
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(vocabularies=st.lists(WORDS, min_size=1, max_size=4), with_base=st.booleans())
def test_every_token_keeps_its_row(
    tmp_path: Path, vocabularies: list[list[str]], with_base: bool
) -> None:
    folders = {
        f"m{k}": save(tmp_path / f"m{k}", words) for k, words in enumerate(vocabularies)
    }
    held = {
        m: torch.randn(len(words), 3)
        for m, words in zip(folders, vocabularies, strict=True)
    }
    rows = {m: len(tensor) for m, tensor in held.items()}
    vocabulary = merge_vocabularies("union", folders, rows, "m0" if with_base else None)
    assert set(vocabulary.tokens.ids) == {
        word for words in vocabularies for word in words
    }
    for model, words in zip(folders, vocabularies, strict=True):
        got = vocabulary.row_maps[model].apply(held[model], held.__getitem__)
        for token, number in vocabulary.tokens.ids.items():
            owners = [
                held[m][other.index(token)]
                for m, other in zip(folders, vocabularies, strict=True)
                if token in other
            ]
            if token in words:
                expected = held[model][words.index(token)]
            elif with_base and token in vocabularies[0]:
                expected = owners[0]
            else:
                expected = torch.stack(owners).mean(dim=0)
            torch.testing.assert_close(got[number], expected, rtol=1e-6, atol=1e-6)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), words=WORDS)
def test_the_same_tokens_in_another_order_are_a_permutation(
    tmp_path: Path, data: st.DataObject, words: list[str]
) -> None:
    shuffled = data.draw(st.permutations(words))
    folders = {"a": save(tmp_path / "a", words), "b": save(tmp_path / "b", shuffled)}
    vocabulary = merge_vocabularies("a", folders, rows_of(folders), None)
    assert vocabulary.row_maps["a"].is_identity
    assert vocabulary.row_maps["b"].is_identity == (words == shuffled)
    assert not vocabulary.row_maps["b"].donor_rows
    assert [shuffled[i] for i in vocabulary.row_maps["b"].own_rows] == words
    assert np.array_equal(
        np.sort(vocabulary.row_maps["b"].own_rows), np.arange(len(words))
    )


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordLevel", "WordPiece"])
def test_a_written_union_loads_and_encodes(tmp_path: Path, kind: str) -> None:
    decoder = {"10": special("<s>").__getstate__() | {"lstrip": True}}
    folders = {
        "a": save(
            tmp_path / "a",
            [*LETTERS, "ab", "cd"],
            [special("<s>")],
            kind,
            {"eos_token": "<s>", "added_tokens_decoder": decoder},
        ),
        "b": save(
            tmp_path / "b",
            [*LETTERS, "ba", "ab"],
            [special("<|end|>"), AddedToken("qq", lstrip=True)],
            kind,
            {"pad_token": "[PAD]"},
        ),
    }
    out = tmp_path / "out"
    out.mkdir()
    vocabulary = merge_vocabularies("union", folders, rows_of(folders), "a")
    vocabulary.write(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == vocabulary.tokens.ids
    assert tokenizer.eos_token == "<s>"
    flags = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    assert flags["<|end|>"].special and flags["[PAD]"].special
    assert not flags["qq"].special and flags["qq"].lstrip
    ids = tokenizer("ab qq cd<|end|>", add_special_tokens=False)["input_ids"]
    assert ids == [vocabulary.tokens.ids[t] for t in ("ab", "qq", "cd", "<|end|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["ab", "qq", "cd"]


def test_special_ids_follow_the_giver_of_the_tokenizer(three: dict[str, Path]) -> None:
    (three["a"] / "config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2})
    )
    (three["b"] / "config.json").write_text(
        json.dumps({"eos_token_id": [3, 0], "pad_token_id": 3})
    )
    vocabulary = merge_vocabularies("b", three, rows_of(three), "a")
    assert vocabulary.config_updates == {
        "vocab_size": 4,
        "bos_token_id": None,
        "eos_token_id": [3, 0],
        "pad_token_id": 3,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "unoin"}, "did you mean 'union'"),
        ({"pad_to_multiple_of": 0}, "positive whole number, got 0"),
        ({"tokens": {"x": "b"}}, "expected `source` and `force"),
        ({"tokens": {"x": {"source": "bb"}}}, "unknown model 'bb'"),
        ({"tokens": {"x": {"source": ["b"]}}}, "unknown model"),
        ({"tokens": {"x": {"source": {"kind": "one"}}}}, "{kind: zero}"),
        (
            {"tokens": {"x": {"source": {"kind": "model_token", "model": "b"}}}},
            "{kind: zero}",
        ),
        (
            {
                "tokens": {
                    "x": {"source": {"kind": "model_token", "model": "d", "token": "x"}}
                }
            },
            "unknown model 'd'",
        ),
        (
            {
                "tokens": {
                    "x": {
                        "source": {"kind": "model_token", "model": "b", "token_id": 4}
                    }
                }
            },
            "from 0 to 3, .* got 4",
        ),
        ({"tokens": {"v": {"source": "b"}}}, "b has no token 'v'"),
    ],
)
def test_recipes_that_cannot_mean_anything(
    three: dict[str, Path], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        merge_vocabularies(
            **{
                "source": "base",
                "folders": three,
                "embedding_rows": rows_of(three),
                "base": "a",
                **arguments,
            }
        )


def test_every_token_of_the_giver_needs_a_row(three: dict[str, Path]) -> None:
    with pytest.raises(
        CheckpointError, match=r"a: .*got 2 rows for 3 tokens.*resize_token_embeddings"
    ):
        merge_vocabularies("base", three, {**rows_of(three), "a": 2}, "a")
