"""Reading a Hugging Face checkpoint one tensor at a time; safetensors only.

Opening a `Checkpoint` reads headers, never weights. Tensors are memory-mapped: reading one costs its own pages.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "U8": "uint8"}
_LARGEST_HEADER = 100_000_000  # bytes: the format's own limit


@dataclass(frozen=True)
class Header:
    """What a shard says of one tensor: its file, its dtype as torch names it, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """A folder with config.json and safetensors shards, opened for reading.

    `name` is what the recipe calls it: a local folder, or a Hub repository with an optional `@revision`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = locate(name)
        self.config: dict[str, Any] = _json(self.folder / "config.json", f"{name}: config.json")
        self.headers: Mapping[str, Header] = _headers(self.folder, name)
        self._open: dict[Path, Any] = {}

    @cached_property
    def architecture(self) -> Architecture:
        try:
            return Architecture.infer(self.headers, self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error

    @property
    def dtype(self) -> str:
        """The dtype of most of the weights."""
        counts: dict[str, int] = {}
        for header in self.headers.values():
            counts[header.dtype] = counts.get(header.dtype, 0) + 1
        return max(sorted(counts), key=counts.__getitem__)

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor as it is stored, on the CPU."""
        from safetensors import SafetensorError, safe_open

        file = self.headers[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read {name!r}: {error}") from error
        return tensor


def locate(name: str) -> Path:
    """The folder of a model: a local one, or a snapshot from the Hub (cached, safetensors and text files only)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: expected a folder with a model, or a Hub name like owner/model; there is no such folder")
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
            )
        )
    except Exception as error:  # the hub raises many kinds; the user needs one sentence
        raise CheckpointError(
            f"{name}: expected a folder or a model on the Hub; the folder does not exist and the Hub said: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _headers(folder: Path, name: str) -> dict[str, Header]:
    weight_map: Any = {}
    if (folder / INDEX).is_file():
        weight_map = _json(folder / INDEX, f"{name}: {INDEX}").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{name}: {INDEX}: expected a `weight_map` from tensors to files")
        files = sorted({_inside(folder, str(file)) for file in weight_map.values()})
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        got = f"{pickles[0]} (a pickle can run code when it is opened)" if pickles else "no weights"
        cure = (
            '; convert it in a sandbox: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained({str(folder)!r} + '-safe')\""
        )
        raise CheckpointError(f"{name}: expected {SINGLE} or {INDEX}, got {got}{cure if pickles else ''}")
    headers = {tensor: header for file in files for tensor, header in _shard_headers(file).items()}
    if missing := sorted(set(weight_map) - set(headers)):
        raise CheckpointError(f"{name}: the index promises {missing[0]!r} and {len(missing) - 1} more; no shard has them")
    return headers


def _shard_headers(file: Path) -> dict[str, Header]:
    """Parse a safetensors header: 8 bytes little-endian length, then JSON; offsets must fit the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{file}: expected a safetensors file, got a header of {length} bytes in a file of {size}")
            entries = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: expected a safetensors file; {error}") from error
    entries.pop("__metadata__", None)
    end = max((e["data_offsets"][1] for e in entries.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{file}: expected {8 + length + end} bytes, got {size}: the file is torn; download it again")
    for tensor, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {tensor}: expected one of {', '.join(DTYPES)}, got {entry['dtype']}")
    return {t: Header(file, DTYPES[e["dtype"]], tuple(e["shape"])) for t, e in sorted(entries.items())}


def _inside(folder: Path, file: str) -> Path:
    if Path(file).name != file:
        raise CheckpointError(f"{folder}: {INDEX}: expected names of files in the same folder, got {file!r}")
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder}: the index names {file}, which is missing; download the model again")
    return folder / file


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{what}: not found in {path.parent}; is this a Hugging Face model folder?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: expected JSON, got {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{what}: expected a JSON object, got {type(data).__name__}")
    return data
