"""The tokenizer of a model folder: read as numbered tokens, copied byte for byte, grown, given a chat template.

`tokenizer.json` is read as what it is, JSON: that takes a third of a second for 150 000 tokens, and no transformers.
What the other files add (a padding token in `tokenizer_config.json`) is numbered as transformers would number it.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretomerge.checkpoint.reference import own
from paretomerge.checkpoint.writer import write_json
from paretomerge.errors import CheckpointError, RecipeError, unknown_name

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
# What stays true when tokens are added: the other files repeat the vocabulary as it was.
_UNNUMBERED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_PLAIN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

CHAT_TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}{{ '\\n' }}{{ message['content'] }}<|im_end|>{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% if messages[0]['role'] != 'system' %}Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.{{ '\\n\\n' }}{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}{{ '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}### Instruction:{{ '\\n' }}{{ message['content'] }}{{ '\\n\\n' }}"
        "{% else %}### Response:{{ '\\n' }}{{ message['content'] }}{{ eos_token }}{{ '\\n\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### Response:{{ '\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
        "{{ '\\n\\n' }}{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
    ),
    "mistral": (  # it has no system turn: that text opens the first instruction
        "{{ bos_token }}{% set lead = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set lead.text = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}[INST] {{ lead.text + message['content'] }} [/INST]{% set lead.text = '' %}"
        "{% else %}{{ ' ' + message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "exaone": (
        "{% if messages[0]['role'] != 'system' %}[|system|][|endofturn|]{{ '\\n' }}{% endif %}"
        "{% for message in messages %}[|{{ message['role'] }}|]{{ message['content'] }}"
        "{% if message['role'] != 'user' %}[|endofturn|]{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
}


def copy_tokenizer(source: Path, out: Path, names: Iterable[str] = TOKENIZER_FILES) -> None:
    """Copy what is there of the tokenizer, its chat template and the generation config."""
    for path in tokenizer_files(source, names):
        shutil.copyfile(path, out / path.name)


def tokenizer_files(source: Path, names: Iterable[str] = TOKENIZER_FILES) -> list[Path]:
    """What is there to be copied. A link that leaves the folder is an error."""
    return [own(source / name) for name in names if (source / name).is_file()]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one folder and their numbers, as AutoTokenizer gives them.

    `added` are those that are matched as a whole (special tokens among them), with their flags, in the order of their
    numbers; `model_size` counts the tokens below them, those of the BPE, Unigram, WordPiece or WordLevel model.
    """

    folder: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]]
    model_size: int

    def grown(self, entries: Iterable[Mapping[str, Any]]) -> "Tokens":
        """With these as added tokens: each `content` and flags. Known ones keep their number and flags; special wins."""
        ids, added = dict(self.ids), dict(self.added)
        taken: set[int] | None = None
        top = max((ids[token] for token in added), default=-1)
        for entry in entries:
            token, special = entry["content"], bool(entry.get("special", False))
            if not token:
                continue
            if token in added:
                added[token] = {**added[token], "special": special or added[token]["special"]}
                continue
            if token not in ids:
                taken = set(ids.values()) if taken is None else taken
                # The rule by which the tokenizers library numbers added tokens, whatever `id` the file says.
                ids[token] = max(self.model_size, top + 1)
                if ids[token] in taken:
                    raise CheckpointError(
                        f"{self.folder}: expected tokens numbered without gaps, to add {token!r} behind them; "
                        f"number {ids[token]} is taken; choose another model's tokenizer"
                    )
                taken.add(ids[token])
            top = max(top, ids[token])
            default = _PLAIN if not special else {**_PLAIN, "normalized": False, "special": True}
            added[token] = (
                default
                if len(entry) == 1
                else {flag: bool(entry.get(flag, default[flag])) for flag in _PLAIN}
            )
        return Tokens(
            self.folder,
            ids,
            dict(sorted(added.items(), key=lambda item: ids[item[0]])),
            self.model_size,
        )


def read_tokens(folder: Path, parsed: dict[bytes, Tokens] | None = None) -> Tokens:
    """The tokens of a model folder. `parsed` remembers files by content, as fine-tunes mostly share their base's."""
    path = folder / "tokenizer.json"
    text = path.read_bytes() if path.is_file() else b""
    parsed = {} if parsed is None else parsed
    if not text or text not in parsed:
        data = _tokenizer_json(folder)
        try:
            vocabulary = data["model"]["vocab"]
            ids = (
                vocabulary
                if isinstance(vocabulary, dict)
                else {entry[0]: i for i, entry in enumerate(vocabulary)}
            )
            tokens = Tokens(folder, ids, {}, len(vocabulary)).grown(data.get("added_tokens") or [])
        except (KeyError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"{path}: expected `model.vocab` and `added_tokens`, got a file without ({error!r})"
            ) from error
        if not text:
            return tokens.grown(_configured(folder))
        parsed[text] = tokens
    seen = parsed[text]
    return Tokens(folder, seen.ids, seen.added, seen.model_size).grown(_configured(folder))


def write_tokens(tokens: Tokens, out: Path) -> None:
    """Write the folder's tokenizer with all of `tokens.added` into `out`."""
    copy_tokenizer(tokens.folder, out, _UNNUMBERED)
    data = _tokenizer_json(tokens.folder)
    present = {entry["content"] for entry in data.get("added_tokens") or []}
    more = [
        {"id": tokens.ids[t], "content": t, **flags}
        for t, flags in tokens.added.items()
        if t not in present
    ]
    data["added_tokens"] = [*(data.get("added_tokens") or []), *more]
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    config = read_json(out / "tokenizer_config.json")
    if (
        "added_tokens_decoder" in config
    ):  # classes that build their own backend take added tokens from here alone
        config["added_tokens_decoder"] = {
            str(tokens.ids[t]): {"content": t, **flags} for t, flags in tokens.added.items()
        }
        write_json(out / "tokenizer_config.json", config)


def chat_template(value: str, folders: Mapping[str, Path]) -> str | None:
    """The jinja text that a recipe's `chat_template` means.

    value: jinja, a name of CHAT_TEMPLATES, or "auto": the most frequent one among the models of `folders`, the
    first of them where there are several; None where no model has one.
    """
    if value == "auto":
        found = [
            template.strip() for folder in folders.values() if (template := _own_template(folder))
        ]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{{" in value or "{%" in value:
        return value
    if value not in CHAT_TEMPLATES:
        raise RecipeError(
            f"chat_template: {unknown_name('template', value, ('auto', *CHAT_TEMPLATES))}; or write jinja, with {{{{ and {{%"
        )
    return CHAT_TEMPLATES[value]


def write_chat_template(folder: Path, template: str) -> None:
    """Make `template` the one chat template of the tokenizer in `folder`."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if (
        config.pop("chat_template", None) is not None
    ):  # an older reader would prefer what stands here
        write_json(path, config)


def _own_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8") or None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    """tokenizer.json; where there is only an older kind of file, what transformers makes of it."""
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json")
    if not any(
        (folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise CheckpointError(
            f"{folder}: expected a tokenizer, got no tokenizer.json (nor tokenizer.model, vocab.json, vocab.txt); "
            "copy the files of the model that it was trained from into the folder"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # converters raise many kinds; the user needs one sentence
        raise CheckpointError(
            f"{folder}: expected tokenizer.json, or files that convert to one; transformers said: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}; save a fast tokenizer there with AutoTokenizer...save_pretrained"
        ) from error
    return data


def _configured(folder: Path) -> list[dict[str, Any]]:
    """What the files beside tokenizer.json call tokens, in the order in which transformers adds those that are new."""
    config = read_json(folder / "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        config |= read_json(folder / "special_tokens_map.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = [config.get(name) for name in _NAMED] + (
        list(extra.values()) if isinstance(extra, dict) else list(extra)
    )
    special = [
        {**(t if isinstance(t, dict) else {"content": t}), "special": True} for t in listed if t
    ]
    if decoder is not None:
        return [decoder[i] for i in sorted(decoder, key=int)] + special
    names = {token["content"] for token in special}
    older = sorted(read_json(folder / "added_tokens.json").items(), key=lambda item: int(item[1]))
    return [{"content": token, "special": token in names} for token, _ in older] + special


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is no file."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected JSON, got {error}; download the model again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(data).__name__}; download the model again"
        )
    return data
