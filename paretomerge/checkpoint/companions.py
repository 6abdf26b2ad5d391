"""The files beside the weights: processors, templates, code of the model, modules around it.

They are copied and never run or opened by a library that would run them.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from paretomerge.checkpoint.reference import reject_symlink_escape
from paretomerge.errors import CheckpointError

_SUFFIXES = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".spm",
    ".bpe",
    ".tiktoken",
    ".vocab",
)
# What the merge writes itself, what lists or describes weights that are not in the result, and
# what training left behind.
_NOT_COPIED = re.compile(
    r"^(\..*|config\.json|.*\.index\.json|adapter_config\.json|params\.json|model_index\.json"
    r"|(hf_)?quant(ize|ization)?_config\.json|recipe\.yaml|trainer_state\.json"
    r"|(all|train|eval|predict)_results\.json|requirements.*\.txt)$"
)
_TOKENIZER = re.compile(
    r"^((tokenizer|vocab|merges|special_tokens_map|added_tokens|tekken|chat_template)\b.*"
    r"|tokenizer_config\.json|.*\.(model|spm|bpe|tiktoken|vocab))$"
)
# These stay valid when tokens are added; the other files list the vocabulary as it was.
_WITHOUT_VOCABULARY = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_MODULES_FILE = "modules.json"
_TEMPLATES_FOLDER = "additional_chat_templates"
_WEIGHTS = (".safetensors", ".bin")


def companion_files(source: Path) -> list[Path]:
    """Return the files of a model folder that belong to its model besides config and weights.

    Args:
        source: Folder of the model.

    Returns:
        Paths in the folder, also in its folders of sentence-transformers' modules; code only if a
        file says that the model needs it.

    Raises:
        CheckpointError: If a file is a link that leaves `source`, or a module is outside of it.
    """
    suffixes: tuple[str, ...] = _SUFFIXES
    if _has_own_code(source):
        suffixes = (*_SUFFIXES, ".py")
    files = []
    for path in sorted(source.iterdir()):
        if path.suffix in suffixes and not _NOT_COPIED.match(path.name):
            files.append(path)
    for folder in _companion_folders(source):
        # A model from elsewhere could link to a private folder, which a merge would then publish.
        reject_symlink_escape(folder, source)
        files += sorted(folder.rglob("*"))
    # Links to folders have no suffix of a file, and broken links are no files.
    existing = [path for path in files if path.is_file()]
    return [reject_symlink_escape(path, source) for path in existing]


def tokenizer_files(source: Path, with_vocabulary: bool = True) -> list[Path]:
    """Return the files of a folder's tokenizer, its chat templates among them.

    Args:
        source: Folder of the model.
        with_vocabulary: Whether files that list the vocabulary are among them.

    Raises:
        CheckpointError: If a file is a link that leaves `source`.
    """
    files = []
    for path in companion_files(source):
        lists_vocabulary = path.name not in _WITHOUT_VOCABULARY
        if path.parent.name == _TEMPLATES_FOLDER:
            lists_vocabulary = False
        if _is_tokenizer(source, path) and (with_vocabulary or not lists_vocabulary):
            files.append(path)
    return files


def files_besides_tokenizer(source: Path) -> list[Path]:
    """Return `companion_files` without those of the tokenizer.

    Raises:
        CheckpointError: If a file is a link that leaves `source`.
    """
    files = companion_files(source)
    return [path for path in files if not _is_tokenizer(source, path)]


def weights_in(files: Iterable[Path]) -> list[Path]:
    """Return those of `companion_files` that are weights of modules around the model."""
    return [path for path in files if path.suffix in _WEIGHTS]


def copy_files(files: Iterable[Path], source: Path, out: Path) -> None:
    """Copy files of the folder `source` to the same places in the folder `out`."""
    for path in files:
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _is_tokenizer(source: Path, path: Path) -> bool:
    if path.parent.name == _TEMPLATES_FOLDER:
        return True
    return path.parent == source and bool(_TOKENIZER.match(path.name))


def _has_own_code(source: Path) -> bool:
    """Whether a file of the folder names classes of the folder's own Python files."""
    candidates = [*source.glob("*config.json"), source / _MODULES_FILE]
    for path in candidates:
        if not path.is_file():
            continue
        text = reject_symlink_escape(path, source).read_text(errors="replace")
        if '"auto_map"' in text:
            return True
        if path.name == _MODULES_FILE and _has_own_module(source):
            return True
    return False


def _has_own_module(source: Path) -> bool:
    types = [str(entry.get("type")) for entry in _modules(source)]
    return any(not kind.startswith("sentence_transformers.") for kind in types)


def _companion_folders(source: Path) -> list[Path]:
    folders = []
    for entry in _modules(source):
        path = str(entry.get("path") or "")
        # The model itself is the module with an empty path.
        if not path or path == ".":
            continue
        parts = Path(path).parts
        if Path(path).is_absolute() or ".." in parts:
            raise CheckpointError(
                f"{source / _MODULES_FILE}: modules must be folders inside {source}, got {path!r}"
            )
        folders.append(source / path)
    folders.append(source / _TEMPLATES_FOLDER)
    return [folder for folder in folders if folder.is_dir()]


def _modules(source: Path) -> list[dict[str, object]]:
    """The entries of sentence-transformers' list of modules; [] without one."""
    path = source / _MODULES_FILE
    if not path.is_file():
        return []
    try:
        entries = json.loads(reject_symlink_escape(path, source).read_bytes())
    except (ValueError, RecursionError):
        return []
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]
