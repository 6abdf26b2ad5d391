"""The vocabulary of a merged model, and where the rows of each model's embedding go in it.

    vocabulary = merge_vocabularies("union", folders, embedding_rows, base)
    row_map = vocabulary.row_maps[model]
    embedding = row_map.apply(own_tensor, tensor_of)     # (vocabulary.size, hidden); same for heads

A token that a model lacks takes the row of the base; if the base lacks it, too, that of the only
model that has it, or else the mean over all models that have it.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paretomerge.checkpoint.companions import copy_files, tokenizer_files
from paretomerge.checkpoint.json_file import (
    JsonObject,
    ReadOnlyJson,
    read_optional_json,
)
from paretomerge.checkpoint.tokenizer import (
    Tokens,
    read_tokens,
    write_tokens,
)
from paretomerge.errors import CheckpointError, RecipeError, unknown_name

if TYPE_CHECKING:
    import torch

RowSources = tuple[tuple[str, int], ...]
"""(model, row) pairs whose mean a row takes; () for a row of zeros."""

_SPECIAL_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ZERO_SOURCE = {"kind": "zero"}


@dataclass(frozen=True)
class RowMap:
    """Where each row of one model's embedding in the merged vocabulary comes from.

    Attributes:
        own_rows: (n_rows,) int64, the row in the model's own tensor; -1 where it has none.
        donor_rows: Output row -> the rows that it takes, for rows that the model lacks.
        n_tokens: Number of rows that are tokens. The rows after them are padding; each is the
            mean of the rows before.
    """

    own_rows: NDArray[np.int64]
    donor_rows: Mapping[int, RowSources]
    n_tokens: int

    @property
    def n_rows(self) -> int:
        """Number of output rows."""
        return len(self.own_rows)

    @cached_property
    def is_identity(self) -> bool:
        """Whether the output is the first `n_rows` rows of the model's own tensor."""
        if self.donor_rows or self.n_tokens != self.n_rows:
            return False
        identity = np.arange(self.n_rows)
        return bool(np.array_equal(self.own_rows, identity))

    @cached_property
    def donors(self) -> tuple[str, ...]:
        """The models whose tensors `apply` needs."""
        # A dict and not a set: the order of the models must not depend on the hash seed.
        models: dict[str, None] = {}
        for sources in self.donor_rows.values():
            for model, _ in sources:
                models[model] = None
        return tuple(models)

    def apply(
        self, own: "torch.Tensor", tensor_of: Callable[[str], "torch.Tensor"]
    ) -> "torch.Tensor":
        """Bring a tensor into the merged vocabulary.

        Args:
            own: (rows, ...), the model's own tensor.
            tensor_of: Returns the same tensor of another model, by the model's name; called once
                for each position of a donor in `donor_rows`.

        Returns:
            (n_rows, ...) in the dtype and on the device of `own`; a view of it if the map is the
            identity.
        """
        import torch

        if self.is_identity:
            return own[: self.n_rows]
        own_rows = torch.from_numpy(self.own_rows).to(own.device)
        present = torch.nonzero(own_rows >= 0).squeeze(1)
        row_shape = own.shape[1:]
        out = own.new_zeros((self.n_rows, *row_shape))
        out[present] = own[own_rows[present]]
        self._add_donor_rows(out, tensor_of)
        # A new row at the mean of the others changes the softmax least (Hewitt 2021,
        # "Initializing new word embeddings for pretrained language models").
        if self.n_tokens < self.n_rows:
            token_rows = out[: self.n_tokens]
            out[self.n_tokens :] = token_rows.mean(dim=0)
        return out

    def _add_donor_rows(
        self, out: "torch.Tensor", tensor_of: Callable[[str], "torch.Tensor"]
    ) -> None:
        import torch

        for gather in self._gathers():
            donor_rows = torch.from_numpy(gather.donor_rows).to(out.device)
            out_rows = torch.from_numpy(gather.out_rows).to(out.device)
            tensor = tensor_of(gather.model)
            values = tensor[donor_rows].to(out)
            # The first source is copied and not added to zero: 0 + -0.0 would lose its sign.
            if gather.position == 0:
                out[out_rows] = values
            else:
                out[out_rows] += values
        counts = {}
        for row, sources in self.donor_rows.items():
            if len(sources) > 1:
                counts[row] = len(sources)
        if counts:
            rows = torch.tensor(list(counts), device=out.device)
            divisors = torch.tensor(list(counts.values())).to(out)
            other_dimensions = [1] * (out.dim() - 1)
            out[rows] /= divisors.reshape(len(counts), *other_dimensions)

    def _gathers(self) -> list["_Gather"]:
        """`donor_rows` as few vectorised copies, those of each row's first source first."""
        row_pairs = defaultdict(list)
        for out_row, sources in self.donor_rows.items():
            for position, (model, donor_row) in enumerate(sources):
                row_pairs[position, model].append((out_row, donor_row))
        gathers = []
        for (position, model), pairs in row_pairs.items():
            out_rows, donor_rows = np.array(pairs).T.copy()
            gather = _Gather(
                position=position,
                model=model,
                out_rows=out_rows,
                donor_rows=donor_rows,
            )
            gathers.append(gather)
        # A row's sum starts with its first source, so those must come before all others.
        return sorted(gathers, key=lambda gather: gather.position)


@dataclass(frozen=True)
class _Gather:
    """Rows of one donor that are added to output rows.

    Attributes:
        position: Index of the donor among the sources of each row.
        model: The donor.
        out_rows: (n,) output rows.
        donor_rows: (n,) rows of the donor's tensor.
    """

    position: int
    model: str
    out_rows: NDArray[np.int64]
    donor_rows: NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """A merged vocabulary.

    Attributes:
        size: Number of rows of every embedding.
        row_maps: For each model, how its embedding is brought into this vocabulary.
        config_updates: New values for config.json: `vocab_size`, and the special token ids if
            another model than the base gives the tokenizer (None if that model has no such token).
        tokens: The tokens and their ids.
        has_new_tokens: Whether `tokens` has tokens that its folder does not have.
    """

    size: int
    row_maps: Mapping[str, RowMap]
    config_updates: ReadOnlyJson
    tokens: Tokens = field(repr=False)
    has_new_tokens: bool = False

    def write(self, folder: Path) -> None:
        """Write the tokenizer into a folder.

        The files are copied byte for byte, or tokenizer.json is written with the new tokens.
        """
        if self.has_new_tokens:
            write_tokens(self.tokens, folder)
        else:
            source = self.tokens.folder
            copy_files(tokenizer_files(source), source, folder)


@dataclass(frozen=True)
class _Model:
    """A model whose vocabulary is merged.

    Attributes:
        name: Name in the recipe.
        tokens: Its tokens.
        n_rows: Number of rows of its embedding.
    """

    name: str
    tokens: Tokens
    n_rows: int

    def adds_nothing_to(self, other: "_Model") -> bool:
        """Whether every token that has a row here has one in the other model as well."""
        if self.n_rows > other.n_rows:
            return False
        has_same_ids = self.tokens.ids == other.tokens.ids
        return has_same_ids and self.tokens.added == other.tokens.added


@dataclass(frozen=True)
class _Override:
    """A recipe's rule for one token.

    Attributes:
        sources: The rows that the token takes; None for the default rule.
        force: Whether models that have the token take these rows as well.
    """

    sources: RowSources | None
    force: bool


def merge_vocabularies(
    source: str,
    folders: Mapping[str, Path],
    embedding_rows: Mapping[str, int],
    base: str | None,
    tokens: ReadOnlyJson | None = None,
    pad_to_multiple_of: int | None = None,
) -> Vocabulary:
    """Merge the vocabularies of several models as a recipe's `tokenizer` says.

    Args:
        source: "union" (the base's ids, then the other models' tokens), "base" or a model.
        folders: Folder of each model, in the recipe's order.
        embedding_rows: Number of embedding rows of each model.
        base: The base model. Without one, the first model gives the tokenizer, but its rows have
            no priority.
        tokens: Rules for single tokens: token -> {"source": ..., "force": bool}. Unknown tokens
            are added.
        pad_to_multiple_of: The number of rows is rounded up to a multiple of this.

    Raises:
        RecipeError: If the source or a rule is invalid.
        CheckpointError: If a tokenizer cannot be read, or the one that is used has more tokens
            than its model has rows.
    """
    _check_arguments(source, folders, pad_to_multiple_of)
    rules = tokens or {}
    for token, rule in rules.items():
        _check_rule(token, rule, folders)
    template = base if base is not None else next(iter(folders))
    provider_name = template if source in ("union", "base") else source
    cache: dict[bytes, Tokens] = {}
    models = {}
    for name, folder in folders.items():
        models[name] = _Model(
            name=name,
            tokens=read_tokens(folder, cache),
            n_rows=embedding_rows[name],
        )
    provider = models[provider_name]
    _check_every_token_has_a_row(provider)
    merged = provider.tokens
    if source == "union":
        merged = merged.with_added(_tokens_of_others(provider, models))
    unknown_tokens = [token for token in rules if token not in merged.ids]
    if unknown_tokens:
        merged = merged.with_added({"content": token} for token in unknown_tokens)
    own_rows = _own_rows(merged, provider.tokens, models)
    n_tokens = own_rows.shape[1]
    size = n_tokens + (-n_tokens % (pad_to_multiple_of or 1))
    overrides = _resolve_rules(rules, merged, models)
    special_ids = _changed_special_ids(folders[provider.name], folders[template])
    return Vocabulary(
        size=size,
        row_maps=_row_maps(own_rows, size, list(folders), base, overrides),
        config_updates={"vocab_size": size, **special_ids},
        tokens=merged,
        has_new_tokens=merged.added != provider.tokens.added,
    )


def _check_arguments(
    source: str,
    folders: Mapping[str, Path],
    pad_to_multiple_of: int | None,
) -> None:
    known = ("union", "base", *folders)
    if source not in known:
        raise RecipeError(f"tokenizer source: {unknown_name('source', source, known)}")
    if pad_to_multiple_of is None:
        return
    # `type` and not `isinstance`: YAML's `true` is a bool, and bool is a subclass of int.
    if type(pad_to_multiple_of) is not int or pad_to_multiple_of < 1:
        raise RecipeError(
            "tokenizer.pad_to_multiple_of: expected a positive whole number, "
            f"got {pad_to_multiple_of!r}"
        )


def _check_every_token_has_a_row(model: _Model) -> None:
    ids = model.tokens.ids
    last_token = max(ids, key=ids.__getitem__)
    needed = ids[last_token] + 1
    if needed > model.n_rows:
        raise CheckpointError(
            f"{model.name}: expected an embedding row for each token, got {model.n_rows} rows for "
            f"{needed} tokens (the last is {last_token!r}); call model.resize_token_embeddings "
            "and save it, or use another model's tokenizer"
        )


def _tokens_of_others(
    provider: _Model, models: Mapping[str, _Model]
) -> list[ReadOnlyJson]:
    """The tokens that a union adds to the provider's: ordinary ones, then added ones.

    A token without an embedding row does not count. If models disagree about the flags of an
    added token, the first model's are used.
    """
    added: dict[str, ReadOnlyJson] = {}
    ordinary: dict[str, None] = {}
    visited: list[_Model] = []
    others = [model for model in models.values() if model is not provider]
    for model in [provider, *others]:
        # Most fine-tunes share the base's tokens, and comparing is faster than merging them.
        if any(model.adds_nothing_to(other) for other in visited):
            continue
        visited.append(model)
        ids = model.tokens.ids
        for token, flags in model.tokens.added.items():
            if ids[token] < model.n_rows:
                added.setdefault(token, {"content": token, **flags})
        new = []
        for token, token_id in ids.items():
            is_known = token in provider.tokens.ids or token in model.tokens.added
            if token_id < model.n_rows and not is_known:
                new.append(token)
        # In the order of their ids: that of the file's keys is not part of a tokenizer.
        ordinary |= dict.fromkeys(sorted(new, key=ids.__getitem__))
    entries: list[ReadOnlyJson] = []
    for token in ordinary:
        if token not in added:
            entries.append({"content": token})
    return entries + list(added.values())


def _own_rows(
    merged: Tokens,
    provider: Tokens,
    models: Mapping[str, _Model],
) -> NDArray[np.int64]:
    """(models, tokens): the row that each model has for each merged token; -1 without one."""
    n_tokens = max(merged.ids.values()) + 1
    # Vocabularies have 150,000 tokens and more, so the tables are filled as arrays.
    n_merged = len(merged.ids)
    merged_ids = np.fromiter(merged.ids.values(), np.int64, n_merged)
    provider_rows = np.arange(n_tokens)
    for token, token_id in merged.ids.items():
        if token not in provider.ids:
            provider_rows[token_id] = -1
    all_rows = []
    for model in models.values():
        ids = model.tokens.ids
        # Models of one vocabulary also share the rows of ids without a token (gaps).
        if ids == provider.ids:
            rows = provider_rows.copy()
        else:
            own_ids = (ids.get(token, -1) for token in merged.ids)
            rows = np.full(n_tokens, -1, np.int64)
            rows[merged_ids] = np.fromiter(own_ids, np.int64, n_merged)
        # A tokenizer may have tokens that its model was never resized for.
        rows[rows >= model.n_rows] = -1
        all_rows.append(rows)
    return np.stack(all_rows)


def _row_maps(
    own_rows: NDArray[np.int64],
    size: int,
    models: Sequence[str],
    base: str | None,
    overrides: Mapping[int, _Override],
) -> dict[str, RowMap]:
    """The row map of each model: the default rule, then the overrides by output row."""
    n_tokens = own_rows.shape[1]
    forced_rows = [row for row, override in overrides.items() if override.force]
    # The type is given for an empty list, which would be an array of floats.
    forced = np.array(forced_rows, np.int64)
    has_every_model = (own_rows >= 0).all(axis=0)
    missing_somewhere = np.flatnonzero(~has_every_model)
    wanted = np.union1d(missing_somewhere, forced)
    sources = _default_sources(own_rows, wanted, models, base)
    for row, override in overrides.items():
        if override.sources is not None:
            sources[row] = override.sources
    row_maps = {}
    for index, model in enumerate(models):
        rows = np.full(size, -1, np.int64)
        rows[:n_tokens] = own_rows[index]
        rows[forced] = -1
        is_missing = rows[:n_tokens] < 0
        missing = np.flatnonzero(is_missing).tolist()
        row_maps[model] = RowMap(
            own_rows=rows,
            donor_rows={row: sources[row] for row in missing},
            n_tokens=n_tokens,
        )
    return row_maps


def _default_sources(
    own_rows: NDArray[np.int64],
    wanted: NDArray[np.int64],
    models: Sequence[str],
    base: str | None,
) -> dict[int, RowSources]:
    """The rows that a model takes for a token that it lacks, for the tokens in `wanted`.

    The base's row; else that of the only model that has the token; else those of all that have it.
    """
    has_row = own_rows[:, wanted] >= 0
    n_owners = has_row.sum(axis=0)
    first_owner = has_row.argmax(axis=0)
    donors = np.where(n_owners == 1, first_owner, -1)
    if base is not None:
        base_index = models.index(base)
        donors = np.where(has_row[base_index], base_index, donors)
    donor_rows = own_rows[donors, wanted]
    # Lists are much faster to loop over than arrays.
    choices = zip(wanted.tolist(), donors.tolist(), donor_rows.tolist(), strict=True)
    sources: dict[int, RowSources] = {}
    for row, donor, donor_row in choices:
        if donor >= 0:
            sources[row] = ((models[donor], donor_row),)
        else:  # no model has it (zeros), or several have it (their mean)
            model_rows = own_rows[:, row].tolist()
            sources[row] = _rows_of_all(model_rows, models)
    return sources


def _rows_of_all(rows: Sequence[int], models: Sequence[str]) -> RowSources:
    """The row of every model that has the token."""
    pairs = zip(models, rows, strict=True)
    owners = [(model, row) for model, row in pairs if row >= 0]
    return tuple(owners)


def _check_rule(
    token: str,
    rule: object,
    models: Mapping[str, Path],
) -> None:
    """Check the form of the rule for one token, and the model that it names."""
    where = f"tokenizer.tokens[{token!r}]"
    if not isinstance(rule, Mapping) or not _has_rule_keys(rule):
        raise RecipeError(
            f"{where}: expected `source` and `force: true` or `false`, got {rule!r}"
        )
    source = rule.get("source")
    if source is None or source == _ZERO_SOURCE:
        return
    model = source
    if isinstance(source, Mapping):
        is_model_token = source.get("kind") == "model_token"
        keys = set(source) - {"kind"}
        if not is_model_token or keys not in (
            {"model", "token"},
            {"model", "token_id"},
        ):
            raise RecipeError(
                f"{where}.source: expected a model, {{kind: zero}} or {{kind: model_token, "
                "model: ..., token: ...} (or token_id in place of token), "
                f"got {dict(source)!r}"
            )
        model = source["model"]
    if not isinstance(model, str) or model not in models:
        raise RecipeError(f"{where}.source: {unknown_name('model', model, models)}")


def _has_rule_keys(rule: ReadOnlyJson) -> bool:
    has_unknown_keys = bool(set(rule) - {"source", "force"})
    force = rule.get("force", False)
    return isinstance(force, bool) and not has_unknown_keys


def _resolve_rules(
    rules: Mapping[str, ReadOnlyJson],
    merged: Tokens,
    models: Mapping[str, _Model],
) -> dict[int, _Override]:
    """The overrides by output row, with the rows that their sources mean."""
    overrides: dict[int, _Override] = {}
    for token, rule in rules.items():
        source = rule.get("source")
        sources: RowSources | None = None
        if source == _ZERO_SOURCE:
            sources = ()
        elif source is not None:
            is_mapping = isinstance(source, Mapping)
            entry = source if is_mapping else {"model": source, "token": token}
            model = models[entry["model"]]
            row = _source_row(token, entry, model)
            sources = ((model.name, row),)
        force = rule.get("force", False)
        overrides[merged.ids[token]] = _Override(sources, force)
    return overrides


def _source_row(
    token: str,
    source: ReadOnlyJson,
    model: _Model,
) -> int:
    """The row of a model that `{model, token}` or `{model, token_id}` means."""
    where = f"tokenizer.tokens[{token!r}].source"
    ids = model.tokens.ids
    if "token" in source:
        wanted = source["token"]
        if wanted not in ids:
            raise RecipeError(
                f"{where}: {model.name} has no token {wanted!r}; name one that it has"
            )
        row = ids[wanted]
    else:
        row = source["token_id"]
    if type(row) is not int or not 0 <= row < model.n_rows:
        raise RecipeError(
            f"{where}: expected a token id from 0 to {model.n_rows - 1}, the rows of "
            f"{model.name}'s embedding; got {row!r}"
        )
    return row


def _changed_special_ids(provider: Path, template: Path) -> JsonObject:
    """The special token ids of the provider's config.json that differ from the template's."""
    # The merged config follows the template, whose ids may mean other tokens of the provider.
    new = read_optional_json(provider / "config.json")
    old = read_optional_json(template / "config.json")
    changed = {}
    for key in _SPECIAL_ID_KEYS:
        if new.get(key) != old.get(key):
            changed[key] = new.get(key)
    return changed
