"""Reading a Hugging Face checkpoint: headers when it is opened, tensors when they are asked for; safetensors only."""

import json
import os
import shlex
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header, read_header
from paretomerge.checkpoint.hub import hub_headers
from paretomerge.checkpoint.model_config import text_config
from paretomerge.checkpoint.operand import FLOATS, Stored
from paretomerge.checkpoint.reference import locate, on_hub, own
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class _Stamp:
    """What tells that a file is still the one whose header was read."""

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> "_Stamp":
        told = file.stat()
        return cls(told.st_size, told.st_mtime_ns, told.st_ino)


class Shards:
    """The tensors of some safetensors files, which are opened when the first of theirs is read. `name` is for errors."""

    def __init__(self, name: str, headers: Mapping[str, Header], allow_nan: bool = False) -> None:
        self.name = name
        self.headers = headers
        self.allow_nan = allow_nan
        self._stamps = {
            file: _Stamp.of(file) for file in {h.file for h in headers.values()} if file.exists()
        }
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(
            self, _close, self._open
        )  # unlike __del__, before the interpreter takes `os` away at its end

    def operand(self, name: str) -> Stored:
        header = self.headers[name]
        label = f"{self.name}: {name}"
        return Stored(
            lambda: self._descriptor(header.file),
            header.offset,
            header.shape,
            header.dtype,
            label,
            self.allow_nan,
        )

    def check_unchanged(self) -> None:
        for file, stamp in self._stamps.items():
            if not file.exists() or _Stamp.of(file) != stamp:
                raise CheckpointError(
                    f"{file}: the file changed while it was read; merge again when it is complete"
                )

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be opened: {error.strerror}") from error
            return self._open[file]


def _close(descriptors: Mapping[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class Checkpoint:
    """A folder with config.json and safetensors shards, opened for reading.

    name: what the recipe calls it: a local folder, or a Hub repository with an optional `@revision`.
    allow_nan: whether weights that are NaN or infinite are read like others, or are an error that names them.
    download: whether weights that are not here are fetched; without them no tensor can be read, but a merge be planned.
    """

    def __init__(self, name: str, allow_nan: bool = False, download: bool = True) -> None:
        self.name = name
        self.folder = locate(name, download)
        self.config: dict[str, Any] = read_json(
            own(self.folder / "config.json"), f"{name}: config.json"
        )
        if any("quantization_config" in part for part in (self.config, text_config(self.config))):
            raise CheckpointError(
                f"{name}: expected full weights, got quantised ones; merge the model that they were made from"
            )
        here = download or Path(name).expanduser().is_dir()
        self.shards = Shards(
            name,
            _headers(self.folder, name) if here else hub_headers(*on_hub(name), self.folder),
            allow_nan,
        )

    @property
    def headers(self) -> Mapping[str, Header]:
        return self.shards.headers

    @cached_property
    def architecture(self) -> Architecture:
        try:
            return Architecture.infer(self.headers, self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error

    @property
    def dtype(self) -> str:
        """The dtype of most of the weights, by number of tensors."""
        counts: dict[str, int] = {}
        for header in self.headers.values():
            if header.dtype in FLOATS:
                counts[header.dtype] = counts.get(header.dtype, 0) + 1
        return max(sorted(counts), key=counts.__getitem__, default="float32")

    def operand(self, name: str) -> Stored:
        """The tensor, to be read a few rows at a time."""
        return self.shards.operand(name)

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor as it is stored, on the CPU."""
        return self.operand(name).whole()

    def check_unchanged(self) -> None:
        """An error if a shard is no longer the file whose header was read."""
        self.shards.check_unchanged()


def _headers(folder: Path, name: str) -> dict[str, Header]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, f"{name}: {INDEX}").get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise CheckpointError(f"{name}: {INDEX}: expected a `weight_map` from tensors to files")
        shards = {
            file: read_header(inside(folder, file)) for file in sorted(set(weight_map.values()))
        }
        if missing := sorted(t for t, file in weight_map.items() if t not in shards[file]):
            raise CheckpointError(
                f"{name}: the index promises {missing[0]!r} and {len(missing) - 1} more tensors that their shards lack; download it again"
            )
        return {tensor: shards[file][tensor] for tensor, file in sorted(weight_map.items())}
    if (folder / SINGLE).is_file():
        if headers := dict(sorted(read_header(inside(folder, SINGLE)).items())):
            return headers
        raise CheckpointError(
            f"{name}: expected tensors in {SINGLE}, got none; download the model again"
        )
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    got = f"{pickles[0]} (a pickle can run code when it is opened)" if pickles else "no weights"
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained({str(folder)!r} + '-safe')"
    )
    cure = f"; convert it in a sandbox: python -c {shlex.quote(code)}"
    raise CheckpointError(
        f"{name}: expected {SINGLE} or {INDEX}, got {got}{cure if pickles else ''}"
    )


def inside(folder: Path, file: str) -> Path:
    """A shard that an index names: a file of the folder itself."""
    if Path(file).name != file:
        raise CheckpointError(
            f"{folder}: {INDEX}: expected names of files in the same folder, got {file!r}"
        )
    path = folder / file
    try:
        there = path.is_file()
    except OSError:  # a name too long to be one
        there = False
    if not there:
        raise CheckpointError(
            f"{folder}: the index names {file[:100]!r}, which is missing; download the model again"
        )
    return own(path)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; `what` names it in errors."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{what}: not found in {path.parent}; is this a Hugging Face model folder?"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: expected JSON, got {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{what}: expected a JSON object, got {type(data).__name__}")
    return data
