"""The vocabulary of a merged model, and where each model's embedding rows go in it.

    vocabulary = merge_vocabularies("union", folders, embedding_rows, base)
    row_map = vocabulary.rows[model]
    embedding = row_map.bring(own_tensor, tensor_of)     # (vocabulary.size, hidden); the same for the head

A token that a model lacks takes the row of the base; else that of its only owner; else the mean over its owners.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretomerge.checkpoint.tokenizer import (
    Tokens,
    copy_tokenizer,
    read_json,
    read_tokens,
    write_tokens,
)
from paretomerge.errors import CheckpointError, RecipeError, unknown_name

if TYPE_CHECKING:
    import torch

Pairs = tuple[tuple[str, int], ...]
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class RowMap:
    """For one model: where each row of its embedding, brought into the merged vocabulary, comes from.

    own: (n_out,) int64, the row in the model's own tensor, -1 where it has none.
    filled: output row -> (model, row) pairs whose mean it takes; () is a row of zeros.
    tokens: rows from here on only make up a multiple; each is the mean of the rows before.
    """

    own: np.ndarray
    filled: Mapping[int, Pairs]
    tokens: int

    @cached_property
    def identity(self) -> bool:
        """Whether the result is the first `n_out` rows of the model's own tensor."""
        n = len(self.own)
        return not self.filled and self.tokens == n and bool(np.array_equal(self.own, np.arange(n)))

    @cached_property
    def donors(self) -> tuple[str, ...]:
        """The models whose tensors `bring` asks for."""
        return tuple(dict.fromkeys(model for pairs in self.filled.values() for model, _ in pairs))

    def bring(
        self, own: "torch.Tensor", tensor_of: Callable[[str], "torch.Tensor"]
    ) -> "torch.Tensor":
        """`own` (rows, ...) in the merged vocabulary: (n_out, ...); an identity map gives a view of it.

        tensor_of: the same tensor of another model, by name; called once for each donor. Arithmetic is in the dtype
        of `own`, on its device.
        """
        import torch

        if self.identity:
            return own[: len(self.own)]
        index = torch.from_numpy(self.own).to(own.device)
        held = torch.nonzero(index >= 0).squeeze(1)
        out = own.new_zeros((len(self.own), *own.shape[1:]))
        out[held] = own[index[held]]
        for position, model, rows, origins in self._gathers():
            taken = tensor_of(model)[torch.from_numpy(origins).to(own.device)].to(out)
            at = torch.from_numpy(rows).to(own.device)
            out[at] = taken if position == 0 else out[at] + taken
        means = {row: len(pairs) for row, pairs in self.filled.items() if len(pairs) > 1}
        if means:
            shape = (len(means), *[1] * (own.dim() - 1))
            out[torch.tensor(list(means), device=own.device)] /= (
                torch.tensor(list(means.values())).to(out).reshape(shape)
            )
        if self.tokens < len(
            self.own
        ):  # Hewitt 2021: a new row at the mean disturbs the softmax least
            out[self.tokens :] = out[: self.tokens].mean(dim=0)
        return out

    def _gathers(self) -> list[tuple[int, str, np.ndarray, np.ndarray]]:
        """`filled` as few gathers: (position in the pairs, model, output rows, rows of the model)."""
        groups: dict[tuple[int, str], tuple[list[int], list[int]]] = {}
        for row, pairs in self.filled.items():
            for position, (model, origin) in enumerate(pairs):
                rows, origins = groups.setdefault((position, model), ([], []))
                rows.append(row)
                origins.append(origin)
        ordered = sorted(groups.items(), key=lambda item: item[0][0])
        return [
            (position, model, np.array(rows), np.array(origins))
            for (position, model), (rows, origins) in ordered
        ]


@dataclass(frozen=True)
class Vocabulary:
    """The merged vocabulary: `size` rows in every embedding, a RowMap for each model.

    config_updates: what config.json must say now: `vocab_size`, and the special token ids where another model than
    the base gives the tokenizer (None: that model has no such token).
    """

    size: int
    rows: Mapping[str, RowMap]
    config_updates: Mapping[str, Any]
    tokens: Tokens = field(repr=False)
    grown: bool = False
    """Whether `tokens` are more than their folder has."""

    def write(self, folder: Path) -> None:
        """Put the tokenizer into `folder`: the source's files byte for byte, or its tokenizer.json with more tokens."""
        if self.grown:
            write_tokens(self.tokens, folder)
        else:
            copy_tokenizer(self.tokens.folder, folder)


def merge_vocabularies(
    source: str,
    folders: Mapping[str, Path],
    embedding_rows: Mapping[str, int],
    base: str | None,
    tokens: Mapping[str, Any] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Vocabulary:
    """The vocabulary that a recipe's `tokenizer` asks for.

    source: "union" (the base's numbers kept, other models' tokens behind them), "base" or a key of `folders`.
    folders, embedding_rows: by model name, in the recipe's order; without a `base` the first model stands for it
    as the giver of the tokenizer, but has no precedence as a giver of rows.
    tokens: per-token overrides, {token: {"source": ..., "force": bool}}; unknown_name tokens are added.
    """
    template = base if base is not None else next(iter(folders))
    if source not in ("union", "base", *folders):
        raise RecipeError(
            f"tokenizer source: {unknown_name('source', source, ('union', 'base', *folders))}"
        )
    if pad_to_multiple_of is not None and (
        type(pad_to_multiple_of) is not int or pad_to_multiple_of < 1
    ):
        raise RecipeError(
            f"tokenizer.pad_to_multiple_of: expected a whole number from 1 on, got {pad_to_multiple_of!r}"
        )
    overrides = {token: _override(token, data, folders) for token, data in (tokens or {}).items()}
    parsed: dict[bytes, Tokens] = {}
    known = {model: read_tokens(folder, parsed) for model, folder in folders.items()}
    giver = template if source in ("union", "base") else source
    _check_rows(giver, known[giver], embedding_rows[giver])
    merged = known[giver]
    if source == "union":
        merged = merged.grown(_others(giver, known, embedding_rows))
    if fresh := [{"content": token} for token in overrides if token not in merged.ids]:
        merged = merged.grown(fresh)
    own = _own_rows(merged, known[giver], known, embedding_rows)
    size = own.shape[1] + (-own.shape[1] % (pad_to_multiple_of or 1))
    return Vocabulary(
        size=size,
        rows=_row_maps(
            own, size, list(folders), base, _resolve(overrides, merged, known, embedding_rows)
        ),
        config_updates={"vocab_size": size, **_special_ids(folders[giver], folders[template])},
        tokens=merged,
        grown=merged.added != known[giver].added,
    )


def _check_rows(model: str, tokens: Tokens, rows: int) -> None:
    token = max(tokens.ids, key=tokens.ids.__getitem__)
    if (needed := tokens.ids[token] + 1) > rows:
        raise CheckpointError(
            f"{model}: expected an embedding row for each token, got {rows} rows for {needed} tokens (the last is {token!r}); "
            "call model.resize_token_embeddings and save it, or take another model's tokenizer"
        )


def _others(
    giver: str, known: Mapping[str, Tokens], embedding_rows: Mapping[str, int]
) -> list[Mapping[str, Any]]:
    """What a union adds to the giver's tokens: first other models' ordinary tokens, then everyone's added ones.

    A token without an embedding row is none; where models disagree on the flags of an added token, the first is right.
    """
    added: dict[str, Mapping[str, Any]] = {}
    ordinary: dict[str, None] = {}
    done: list[tuple[Tokens, int]] = []
    for model in dict.fromkeys([giver, *known]):
        tokens, rows = known[model], embedding_rows[model]
        if any(
            tokens.ids == other.ids and tokens.added == other.added and rows <= n
            for other, n in done
        ):
            continue  # a twin brings nothing new
        done.append((tokens, rows))
        for token, flags in tokens.added.items():
            if tokens.ids[token] < rows:
                added.setdefault(token, {"content": token, **flags})
        if model != giver:
            fresh = {
                t: i
                for t, i in tokens.ids.items()
                if i < rows and t not in tokens.added and t not in known[giver].ids
            }
            ordinary.update(dict.fromkeys(sorted(fresh, key=fresh.__getitem__)))
    return [{"content": token} for token in ordinary if token not in added] + list(added.values())


def _own_rows(
    merged: Tokens, giver: Tokens, known: Mapping[str, Tokens], embedding_rows: Mapping[str, int]
) -> np.ndarray:
    """(K, n) the row that each model has for each merged token, -1 where it has none."""
    n = max(merged.ids.values()) + 1
    names: list[Any] = [None] * n
    for token, number in merged.ids.items():
        names[number] = token
    same = np.arange(n)
    same[[number for token, number in merged.ids.items() if token not in giver.ids]] = -1
    rows = []
    for model, tokens in known.items():
        # The same vocabulary: numbers without a token (gaps) belong together, too.
        alike = tokens.ids == giver.ids
        own = (
            same.copy()
            if alike
            else np.fromiter(map(tokens.ids.get, names, repeat(-1)), np.int64, n)
        )
        own[own >= embedding_rows[model]] = -1
        rows.append(own)
    return np.stack(rows)


def _row_maps(
    own: np.ndarray,
    size: int,
    models: Sequence[str],
    base: str | None,
    overrides: Mapping[int, tuple[Pairs | None, bool]],
) -> dict[str, RowMap]:
    """The default rule, then the overrides: output row -> (pairs or None for the rule, whether owners take it too)."""
    n = own.shape[1]
    owned = own >= 0
    forced = [row for row, (_, force) in overrides.items() if force]
    wanted = np.union1d(np.flatnonzero(~owned.all(axis=0)), np.array(forced, np.int64))
    held = owned[:, wanted]
    donor = np.where(held.sum(axis=0) == 1, held.argmax(axis=0), -1)
    if base is not None:
        donor = np.where(held[models.index(base)], models.index(base), donor)
    rule: dict[int, Pairs] = {}
    for row, giver, origin in zip(
        wanted.tolist(), donor.tolist(), own[donor, wanted].tolist(), strict=True
    ):
        if giver >= 0:
            rule[row] = ((models[giver], origin),)
        else:  # nobody's (zeros) or several models'
            rule[row] = tuple(
                (model, int(own[k, row])) for k, model in enumerate(models) if owned[k, row]
            )
    rule |= {row: pairs for row, (pairs, _) in overrides.items() if pairs is not None}
    maps = {}
    for k, model in enumerate(models):
        rows = np.full(size, -1, np.int64)
        rows[:n] = own[k]
        rows[forced] = -1
        maps[model] = RowMap(
            rows, {row: rule[row] for row in np.flatnonzero(rows[:n] < 0).tolist()}, n
        )
    return maps


def _override(token: str, data: Any, models: Mapping[str, Path]) -> Mapping[str, Any]:
    """One entry of `tokens`, its grammar and models checked."""
    where = f"tokenizer.tokens[{token!r}]"
    if (
        not isinstance(data, Mapping)
        or set(data) - {"source", "force"}
        or type(data.get("force", False)) is not bool
    ):
        raise RecipeError(f"{where}: expected `source` and `force: true` or `false`, got {data!r}")
    source = data.get("source")
    if isinstance(source, Mapping):
        keys = set(source) - {"kind"}
        of_token = source.get("kind") == "model_token" and keys in (
            {"model", "token"},
            {"model", "token_id"},
        )
        if not of_token and source != {"kind": "zero"}:
            raise RecipeError(
                f"{where}.source: expected a model, {{kind: zero}} or {{kind: model_token, model: ..., token: ...}} "
                f"(or token_id in place of token), got {dict(source)!r}"
            )
    model = source.get("model") if isinstance(source, Mapping) else source
    if (
        source is not None
        and source != {"kind": "zero"}
        and not (isinstance(model, str) and model in models)
    ):
        raise RecipeError(f"{where}.source: {unknown_name('model', model, models)}")
    return data


def _resolve(
    overrides: Mapping[str, Mapping[str, Any]],
    merged: Tokens,
    known: Mapping[str, Tokens],
    embedding_rows: Mapping[str, int],
) -> dict[int, tuple[Pairs | None, bool]]:
    """Overrides by output row, with the rows that they take; None where the default rule stands."""
    out: dict[int, tuple[Pairs | None, bool]] = {}
    for token, data in overrides.items():
        source = data.get("source")
        pairs: Pairs | None = None
        if isinstance(source, Mapping) and source["kind"] == "zero":
            pairs = ()
        elif source is not None:
            entry = source if isinstance(source, Mapping) else {"model": source, "token": token}
            pairs = (
                (
                    entry["model"],
                    _row(token, entry, known[entry["model"]], embedding_rows[entry["model"]]),
                ),
            )
        out[merged.ids[token]] = (pairs, data.get("force", False))
    return out


def _row(token: str, entry: Mapping[str, Any], tokens: Tokens, rows: int) -> int:
    where, model = f"tokenizer.tokens[{token!r}].source", entry["model"]
    if "token" in entry and entry["token"] not in tokens.ids:
        raise RecipeError(
            f"{where}: expected a token of {model}, got {entry['token']!r}, which it lacks; name one that it has"
        )
    row = tokens.ids[entry["token"]] if "token" in entry else entry["token_id"]
    if type(row) is not int or not 0 <= row < rows:
        raise RecipeError(
            f"{where}: expected a token id from 0 to {rows - 1}, the rows of {model}'s embedding; got {row!r}"
        )
    return row


def _special_ids(giver: Path, template: Path) -> dict[str, Any]:
    """Special token ids that the giver's config.json says otherwise than the template's, which the result follows."""
    theirs, ours = read_json(giver / "config.json"), read_json(template / "config.json")
    return {key: theirs.get(key) for key in _SPECIAL_IDS if theirs.get(key) != ours.get(key)}
