"""The tokenizer of a model folder: its tokens and their ids, copied or written with more tokens.

`tokenizer.json` is read as plain JSON, which takes a third of a second for 150,000 tokens and does
not import transformers. Tokens that only other files name (a padding token in
`tokenizer_config.json`) get the ids that transformers would give them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from paretomerge.checkpoint.companions import copy_files, tokenizer_files
from paretomerge.checkpoint.json_file import (
    JsonObject,
    ReadOnlyJson,
    read_json,
    read_optional_json,
    write_json,
)
from paretomerge.errors import CheckpointError

_CONVERTIBLE_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")
_DEFAULT_FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}
_SPECIAL_TOKEN_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a model folder and their ids, as AutoTokenizer gives them.

    Attributes:
        folder: The folder.
        ids: Token -> id.
        added: Added tokens, which are matched as a whole (special tokens among them), with their
            flags, in the order of their ids.
        base_size: Number of tokens of the BPE, Unigram, WordPiece or WordLevel model, without
            added tokens (`vocab_size` of a transformers tokenizer).
    """

    folder: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]]
    base_size: int

    def with_added(self, entries: Iterable[ReadOnlyJson]) -> "Tokens":
        """Return the tokens with more added tokens.

        Args:
            entries: `content` and optional flags of each token. A token that is an added token
                already keeps its id and flags, but becomes special if an entry says so.

        Raises:
            CheckpointError: If the next free id is taken, because the ids have gaps.
        """
        ids, added = dict(self.ids), dict(self.added)
        # Only made if a token is new: most folders add none to some 150,000.
        used_ids: set[int] | None = None
        last_added_id = max((ids[token] for token in added), default=-1)
        for entry in entries:
            token = entry["content"]
            is_special = bool(entry.get("special", False))
            if not token:
                continue
            if token in added:
                special = is_special or added[token]["special"]
                added[token] = {**added[token], "special": special}
                continue
            if token not in ids:
                used_ids = set(ids.values()) if used_ids is None else used_ids
                # The tokenizers library numbers added tokens like this, whatever `id` a file says.
                ids[token] = max(self.base_size, last_added_id + 1)
                self._check_free(token, ids[token], used_ids)
                used_ids.add(ids[token])
            last_added_id = max(last_added_id, ids[token])
            added[token] = _flags(entry, is_special)
        in_order = sorted(added, key=ids.__getitem__)
        return Tokens(
            folder=self.folder,
            ids=ids,
            added={token: added[token] for token in in_order},
            base_size=self.base_size,
        )

    def _check_free(
        self,
        token: str,
        token_id: int,
        used_ids: set[int],
    ) -> None:
        if token_id in used_ids:
            raise CheckpointError(
                f"{self.folder}: cannot add the token {token!r}: its id {token_id} is taken, "
                "because the ids have gaps; choose another model's tokenizer"
            )


def _flags(entry: ReadOnlyJson, is_special: bool) -> Mapping[str, bool]:
    """The flags of an added token, with the defaults of the tokenizers library."""
    defaults = _DEFAULT_FLAGS
    if is_special:
        defaults = {**_DEFAULT_FLAGS, "normalized": False, "special": True}
    flags = {}
    for flag, default in defaults.items():
        flags[flag] = bool(entry.get(flag, default))
    return flags


def read_tokens(folder: Path, cache: dict[bytes, Tokens] | None = None) -> Tokens:
    """Read the tokens of a model folder.

    Args:
        folder: The folder.
        cache: Content of a tokenizer.json -> its tokens. Most fine-tunes share the file of their
            base, which is then parsed once.

    Raises:
        CheckpointError: If there is no tokenizer or it cannot be read.
    """
    # Older tokenizers consist of several files, so only tokenizer.json is looked up by content.
    path = folder / "tokenizer.json"
    content = path.read_bytes() if path.is_file() else b""
    if cache is None or not content:
        tokens = _parse_tokens(folder)
    else:
        if content not in cache:
            cache[content] = _parse_tokens(folder)
        tokens = replace(cache[content], folder=folder)
    return tokens.with_added(_configured_tokens(folder))


def write_tokens(tokens: Tokens, out: Path) -> None:
    """Write the folder's tokenizer with all of `tokens.added` into the folder `out`."""
    files = tokenizer_files(tokens.folder, with_vocabulary=False)
    copy_files(files, tokens.folder, out)
    data = _read_tokenizer_json(tokens.folder)
    entries = list(data.get("added_tokens") or [])
    present = {entry["content"] for entry in entries}
    for token, flags in tokens.added.items():
        if token not in present:
            entries.append({"id": tokens.ids[token], "content": token, **flags})
    data["added_tokens"] = entries
    (out / "tokenizer.json").write_text(
        json.dumps(data, ensure_ascii=False), encoding="utf-8"
    )
    config = read_optional_json(out / "tokenizer_config.json")
    # Some tokenizer classes build their own backend and take added tokens from here alone.
    if "added_tokens_decoder" in config:
        decoder = {}
        for token, flags in tokens.added.items():
            decoder[str(tokens.ids[token])] = {"content": token, **flags}
        config["added_tokens_decoder"] = decoder
        write_json(out / "tokenizer_config.json", config)


def _parse_tokens(folder: Path) -> Tokens:
    """The tokens of tokenizer.json."""
    data = _read_tokenizer_json(folder)
    try:
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, dict):
            ids = vocabulary
        else:  # Unigram lists [token, score] in the order of the ids
            ids = {entry[0]: index for index, entry in enumerate(vocabulary)}
        tokens = Tokens(
            folder=folder,
            ids=ids,
            added={},
            base_size=len(vocabulary),
        )
        return tokens.with_added(data.get("added_tokens") or [])
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: `model.vocab` or `added_tokens` is missing or malformed "
            f"({error!r})"
        ) from error


def _read_tokenizer_json(folder: Path) -> JsonObject:
    """Read tokenizer.json; transformers converts older files if there is none."""
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json")
    if not any((folder / name).is_file() for name in _CONVERTIBLE_FILES):
        raise CheckpointError(
            f"{folder}: the folder has no tokenizer.json (nor {', '.join(_CONVERTIBLE_FILES)}); "
            "copy the files of the model that it was trained from into the folder"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        data: JsonObject = json.loads(tokenizer.backend_tokenizer.to_str())
    except (
        Exception
    ) as error:  # converters raise many classes; the user needs one sentence
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: cannot convert the tokenizer files to tokenizer.json; transformers raised "
            f"{type(error).__name__}: {first_line}; save a fast tokenizer there with "
            "AutoTokenizer...save_pretrained"
        ) from error
    return data


def _configured_tokens(folder: Path) -> list[JsonObject]:
    """The added tokens that other files name, in the order in which transformers adds them."""
    config = read_optional_json(folder / "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    # Transformers reads the older files only if the config has no decoder.
    if decoder is None:
        config |= read_optional_json(folder / "special_tokens_map.json")
    special = _special_tokens(config)
    if decoder is not None:
        return [decoder[number] for number in sorted(decoder, key=int)] + special
    special_names = {token["content"] for token in special}
    ids = read_optional_json(folder / "added_tokens.json")
    in_order = sorted(ids, key=lambda token: int(ids[token]))
    older = [
        {"content": token, "special": token in special_names} for token in in_order
    ]
    return older + special


def _special_tokens(config: ReadOnlyJson) -> list[JsonObject]:
    extra = (
        config.get("extra_special_tokens")
        or config.get("additional_special_tokens")
        or []
    )
    tokens = [config.get(key) for key in _SPECIAL_TOKEN_KEYS]
    tokens += list(extra.values()) if isinstance(extra, dict) else list(extra)
    entries = []
    for token in tokens:
        if token:
            entry = token if isinstance(token, dict) else {"content": token}
            entries.append({**entry, "special": True})
    return entries
