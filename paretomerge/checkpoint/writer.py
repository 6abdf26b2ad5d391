"""Writing a Hugging Face checkpoint tensor by tensor; it appears whole or not at all.

Shapes and dtypes are known before the first weight, so a shard's header is written first and its tensors after it:
memory holds one tensor, not one shard.
"""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.reader import DTYPES, INDEX, SINGLE
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_CODES = {name: code for code, name in DTYPES.items()}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        n = _BYTES[self.dtype]
        for side in self.shape:
            n *= side
        return n


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well and vanishes when it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise CheckpointError(f"{out}: expected a new or empty folder, got an existing one; choose another or pass --overwrite")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        temporary.chmod(0o755)  # mkdtemp keeps others out; a model folder is like any other
        yield temporary
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free some space or choose another disk" if full else "is the folder writable?"
        raise CheckpointError(f"{out}: cannot write: {error.strerror or error}; {cure}. Nothing was left behind") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_weights(
    folder: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, "torch.Tensor"]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors`, which come in the order of `specs`, as shards of at most `shard_bytes` (or one tensor each)."""
    shards = _cut(specs, shard_bytes)
    stream = iter(tensors)
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        _write_shard(folder / file, shard, stream)
    if len(shards) > 1:
        weight_map = {spec.name: file for file, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.bytes for spec in specs)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _cut(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for spec in specs:
        if shards[-1] and held + spec.bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += spec.bytes
    return shards


def _write_shard(file: Path, specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, "torch.Tensor"]]) -> None:
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, start + spec.bytes]}
        start += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on 8 bytes, as the format's own writer aligns them
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for spec in specs:
            name, tensor = next(tensors)
            if (name, tuple(tensor.shape), str(tensor.dtype)) != (spec.name, spec.shape, f"torch.{spec.dtype}"):
                raise AssertionError(f"planned {spec}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
