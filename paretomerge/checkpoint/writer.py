"""Writing a Hugging Face checkpoint; it appears whole or not at all.

Shapes and dtypes are known before the first weight, so every byte of the output has its place beforehand: blocks are
written where they belong, in any order, from any thread, and memory holds blocks, not shards.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.checksum import Checksums, Extent
from paretomerge.checkpoint.header import DTYPES
from paretomerge.checkpoint.operand import BYTES, size_in_bytes
from paretomerge.checkpoint.reader import INDEX, SINGLE
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_CODES = {name: code for code, name in DTYPES.items()}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return size_in_bytes(self.shape, self.dtype)


@contextmanager
def new_folder(out: Path, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well and vanishes when it does not.

    needed: bytes that are going to be written; a disk that has not as many is refused at once.
    """
    temporary, made = None, []
    try:
        if out.is_symlink():
            raise CheckpointError(
                f"{out}: expected a new or empty folder, got a symbolic link; name the folder itself"
            )
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
            raise CheckpointError(
                f"{out}: expected a new or empty folder, got an existing one; choose another or pass --overwrite"
            )
        made = [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise CheckpointError(
                f"{out}: expected {needed / 1e9:.3g} GB of free disk, got {free / 1e9:.3g}; choose another disk"
            )
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{out.name[:50]}.", suffix=".partial", dir=out.parent)
        )
        temporary.chmod(0o755)  # mkdtemp keeps others out; a model folder is like any other
        yield temporary
        _replace(temporary, out, overwrite)
        made = []
    except OSError as error:
        full, there = (
            error.errno in (errno.ENOSPC, errno.EDQUOT),
            error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR),
        )
        cure = "free some space or choose another disk" if full else "is the folder writable?"
        cure = "something else is there by now; choose another folder" if there else cure
        raise CheckpointError(
            f"{out}: cannot write: {error.strerror or error}; {cure}. Nothing was left behind"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _replace(temporary: Path, out: Path, overwrite: bool) -> None:
    """Put the new folder in place of the old one, which is there until the very end.

    A plain rename takes the place of nothing or of an empty folder, and of nothing else, whatever came there meanwhile.
    """
    if not overwrite or not out.exists():
        temporary.rename(out)
        return
    old = temporary.with_suffix(".old")
    out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:
        old.rename(out)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


class WeightsWriter:
    """Shards of at most `shard_bytes` (or one tensor each) in `folder`, laid out when the object is made."""

    def __init__(
        self, folder: Path, specs: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES
    ) -> None:
        shards = _cut(specs, shard_bytes)
        count = len(shards)
        names = (
            [SINGLE]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self._place: dict[str, tuple[int, int, TensorSpec]] = {}
        self._open: list[int] = []
        laid_out: dict[str, tuple[int, list[Extent]]] = {}
        try:
            for name, shard in zip(names, shards, strict=True):
                laid_out[name] = self._lay_out(folder / name, shard)
        except OSError:
            self.close()
            raise
        if count > 1:
            weight_map = {
                spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard
            }
            write_json(
                folder / INDEX,
                {"metadata": {"total_size": sum(s.bytes for s in specs)}, "weight_map": weight_map},
            )
        self._checksums = Checksums(laid_out)

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._checksums.stop()
        self.close()

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def write(self, name: str, element: int, block: "torch.Tensor") -> None:
        """Write a block in the tensor's dtype, its first entry at flat position `element` of the tensor."""
        import torch

        descriptor, start, spec = self._place[name]
        if str(block.dtype) != f"torch.{spec.dtype}":
            raise AssertionError(f"planned {spec}, got {block.dtype}")
        if block.numel() == 0:
            return
        raw = memoryview(block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        _write_all(descriptor, raw, start + element * BYTES[spec.dtype])
        self._checksums.wrote(name, block.numel() * BYTES[spec.dtype])

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each shard, when all has been written."""
        return self._checksums.sums()

    def _lay_out(self, file: Path, specs: Sequence[TensorSpec]) -> tuple[int, list[Extent]]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, start + spec.bytes],
            }
            start += spec.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (
            -len(text) % 8
        )  # tensors start on 8 bytes, as the format's own writer aligns them
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._open.append(descriptor)
        _write_all(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.ftruncate(descriptor, 8 + len(text) + start)
        extents = [Extent("", 0, 8 + len(text))]
        for spec in specs:
            first = extents[-1].end
            extents.append(Extent(spec.name, first, first + spec.bytes))
            self._place[spec.name] = (descriptor, first, spec)
        return descriptor, extents


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


def _write_all(descriptor: int, raw: memoryview, offset: int) -> None:
    """A disk that is nearly full takes a part of what it is given; the next call then says that it is full."""
    while raw:
        done = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[done:], offset + done


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
