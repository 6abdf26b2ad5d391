"""Writes a Hugging Face checkpoint, which appears as a whole or not at all.

Shapes and dtypes are known before the first weight is computed, so the position of every byte is
known as well: blocks are written in any order, from any thread, and memory holds blocks and not
whole shards.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.checkpoint.checksum import ByteRange, Checksums
from paretomerge.checkpoint.header import SAFETENSORS_DTYPES
from paretomerge.checkpoint.json_file import JsonObject, write_json
from paretomerge.checkpoint.operand import DTYPE_BYTES, size_in_bytes
from paretomerge.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
"""Default size of the largest file, in bytes."""

_DTYPE_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()}
_MAX_PREFIX = 50  # file systems limit names to 255 bytes
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TARGET_EXISTS = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written.

    Attributes:
        name: Name of the tensor.
        dtype: Its dtype, as torch names it.
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return size_in_bytes(self.shape, self.dtype)


@contextmanager
def new_folder(
    out: Path,
    overwrite: bool = False,
    needed: int = 0,
) -> Iterator[Path]:
    """Create a folder as a whole or not at all.

    Args:
        out: The folder to create.
        overwrite: Whether an existing folder is replaced.
        needed: Bytes that are going to be written; too small a disk is an error at once.

    Yields:
        A temporary folder beside `out`, which becomes `out` if the block ends without an error
        and is removed if it does not.

    Raises:
        CheckpointError: If `out` exists, cannot be written or does not fit on the disk.
    """
    temporary: Path | None = None
    created_parents: list[Path] = []
    try:
        _check_target(out, overwrite)
        created_parents = [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_free_space(out, needed)
        # From here on the folder exists, and the `finally` below removes it.
        temporary = _make_temporary(out)
        yield temporary
        _replace(temporary, out, overwrite)
        created_parents = []
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot write: {error.strerror or error}; {_advice(error)}. "
            "Nothing was left behind"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
        # `rmdir` removes only empty folders: what others put there meanwhile stays.
        for parent in created_parents:
            with suppress(OSError):
                parent.rmdir()


def check_out(out: Path, models: Iterable[str], overwrite: bool) -> None:
    """Check a folder that is going to be made from models, before any work is done.

    Args:
        out: The folder that is going to be created or replaced.
        models: The models, as a recipe names them.
        overwrite: Whether `out` may be replaced.

    Raises:
        CheckpointError: If `out` is the current folder, holds one of the models, or has other
            content than a checkpoint.
    """
    check_not_current(out)
    check_holds_no_source(out, models)
    if overwrite:
        check_replaceable(out)


def check_not_current(out: Path) -> None:
    """Check that a new folder would not take the place of the current one.

    Args:
        out: The folder that is going to be created or replaced.

    Raises:
        CheckpointError: If `out` is the current folder or one that holds it.
    """
    if Path.cwd().is_relative_to(out.resolve()):
        raise CheckpointError(
            f"{out}: is the current folder or holds it, and cannot be replaced; "
            "name a new folder"
        )


def check_holds_no_source(out: Path, models: Iterable[str]) -> None:
    """Check that a new folder would not replace one that holds a model it is made from.

    Args:
        out: The folder that is going to be created or replaced.
        models: The models, as a recipe names them.

    Raises:
        CheckpointError: If a model, or the adapter of one, is in `out`.
    """
    for model in models:
        for part in (model, *model.split("+")):
            path = Path(part).expanduser()
            if path.exists() and path.resolve().is_relative_to(out.resolve()):
                raise CheckpointError(
                    f"{out}: the output folder would replace the source {path}; "
                    "choose another folder"
                )


def check_replaceable(out: Path) -> None:
    """Check that replacing a folder would lose nothing but a checkpoint.

    Args:
        out: The folder that is going to be created or replaced.

    Raises:
        CheckpointError: If `out` is a file, or a folder with other content than a checkpoint.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(
            f"{out}: is a file, and only a checkpoint's folder is replaced; name a new folder"
        )
    entries = [entry.name for entry in out.iterdir()]
    for name in entries:
        if name == "config.json" or name.endswith(".safetensors"):
            return
    if entries:
        raise CheckpointError(
            f"{out}: holds no checkpoint (no config.json and no *.safetensors), and would be lost; "
            "name a new folder, or remove this one yourself"
        )


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_symlink():
        raise CheckpointError(f"{out}: is a symbolic link; name the folder itself")
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder and not overwrite:
        raise CheckpointError(
            f"{out}: exists and is not an empty folder; choose another, or replace it with "
            "--overwrite (in Python: overwrite=True)"
        )


def _check_free_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise CheckpointError(
            f"{out}: needs {needed / 1e9:.3g} GB of free disk space, "
            f"only {free / 1e9:.3g} GB are free; choose another disk"
        )


def _make_temporary(out: Path) -> Path:
    # On the same disk as `out`, as a rename cannot cross disks; a dot hides it while it grows.
    prefix = f".{out.name[:_MAX_PREFIX]}."
    temporary = Path(tempfile.mkdtemp(".partial", prefix, out.parent))
    # mkdtemp gives access to the owner alone; a model folder is like any other folder.
    temporary.chmod(0o755)
    return temporary


def _advice(error: OSError) -> str:
    # The target was free when the merge began; `_replace` found something there.
    if error.errno in _TARGET_EXISTS:
        return "another program created it meanwhile; choose another folder"
    if error.errno in _DISK_FULL:
        return "free some space or choose another disk"
    return "check whether the folder is writable"


def _replace(
    temporary: Path,
    out: Path,
    overwrite: bool,
) -> None:
    """Move the new folder to `out`; an old one stays there until the very end.

    A plain rename replaces nothing but an empty folder, whatever another program put there.
    """
    if not overwrite or not out.exists():
        temporary.rename(out)
        return
    old = temporary.with_suffix(".old")
    out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:  # a KeyboardInterrupt must not lose the old folder
        old.rename(out)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


@dataclass(frozen=True)
class Destination:
    """Where a tensor is written.

    Attributes:
        file: The file, which has its full size already.
        offset: Position of the first byte of the tensor.
        spec: The tensor.
    """

    file: Path
    offset: int
    spec: TensorSpec


class BlockWriter:
    """Writes blocks of tensors into files that another process made with a `WeightsWriter`.

    Args:
        destinations: Tensor name -> where it is written.
    """

    def __init__(self, destinations: Mapping[str, Destination]) -> None:
        self._destinations = destinations
        self._descriptors: dict[Path, int] = {}

    def write(
        self,
        name: str,
        element: int,
        block: "torch.Tensor",
    ) -> int:
        """Write a part of a tensor and return its bytes; see `WeightsWriter.write`."""
        target = self._destinations[name]
        if target.file not in self._descriptors:
            flags = os.O_WRONLY | os.O_CLOEXEC
            self._descriptors[target.file] = os.open(target.file, flags)
        return _write_block(self._descriptors[target.file], target, element, block)


class WeightsWriter:
    """Writes safetensors files, which get their full size when the object is made.

    Use it as a context manager: the files are closed at its end. Other processes may write a part
    of the blocks with a `BlockWriter` of the same destinations.

    Args:
        folder: Where the files are created.
        specs: The tensors, in the order in which the files hold them.
        shard_bytes: Size of the largest file; a tensor that is larger gets a file of its own.
        file: Name of the one file that holds all tensors, whatever their size; by default the
            shards have the names that transformers gives them.

    Attributes:
        destinations: Tensor name -> where it is written.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        shard_bytes: int = SHARD_BYTES,
        file: str | None = None,
    ) -> None:
        self.destinations: dict[str, Destination] = {}
        self._descriptors: dict[Path, int] = {}
        shards: Mapping[str, Sequence[TensorSpec]]
        shards = {file: specs} if file else _split_into_shards(specs, shard_bytes)
        files = {}
        try:
            for name, shard in shards.items():
                files[name] = self._create_file(folder / name, shard)
        except OSError:
            self.close()
            raise
        if len(shards) > 1:
            _write_index(folder, shards)
        self._checksums = Checksums(files)

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._checksums.stop()
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            os.close(descriptor)

    def write(
        self,
        name: str,
        element: int,
        block: "torch.Tensor",
    ) -> None:
        """Write a part of a tensor; may be called from several threads.

        Args:
            name: Name of the tensor.
            element: Flat index in the tensor of the block's first element.
            block: The elements, in the tensor's dtype.
        """
        target = self.destinations[name]
        n_bytes = _write_block(self._descriptors[target.file], target, element, block)
        self.add_written(name, n_bytes)

    def add_written(self, name: str, n_bytes: int) -> None:
        """Report that another process has written so many bytes of a tensor."""
        if n_bytes:
            self._checksums.add_written(name, n_bytes)

    def checksums(self) -> dict[str, str]:
        """Return the SHA-256 of each file; every tensor must have been written."""
        return self._checksums.hex_digests()

    def _create_file(
        self, file: Path, specs: Sequence[TensorSpec]
    ) -> tuple[int, list[ByteRange]]:
        """Write the header, reserve the rest and return (descriptor, byte ranges)."""
        header = _header_bytes(specs)
        # O_RDWR, as `Checksums` reads through the same descriptor.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o644)
        self._descriptors[file] = descriptor
        _write_all(descriptor, memoryview(header), 0)
        # The full size at once: blocks are written at their positions, in any order.
        data_size = sum(spec.bytes for spec in specs)
        os.ftruncate(descriptor, len(header) + data_size)
        ranges = [ByteRange("", 0, len(header))]
        for spec in specs:
            start = ranges[-1].end
            end = start + spec.bytes
            ranges.append(ByteRange(spec.name, start, end))
            self.destinations[spec.name] = Destination(file, start, spec)
        return descriptor, ranges


def _header_bytes(specs: Sequence[TensorSpec]) -> bytes:
    """The length and the JSON of a header; see `header.py` for the format."""
    # Some readers, transformers 4 among them, refuse files whose metadata names no framework.
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _DTYPE_CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.bytes],
        }
        start += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Tensors start at a multiple of 8 bytes, as in files of the safetensors library.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _split_into_shards(
    specs: Sequence[TensorSpec], shard_bytes: int
) -> dict[str, list[TensorSpec]]:
    """The tensors of each file, by the file's name."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.bytes
    count = len(shards)
    if count == 1:
        return {SINGLE_FILE: shards[0]}
    # The names that transformers gives; other tools look for this pattern.
    files = {}
    for number, shard in enumerate(shards, start=1):
        files[f"model-{number:05d}-of-{count:05d}.safetensors"] = shard
    return files


def _write_index(folder: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    weight_map: dict[str, str] = {}
    total_size = 0
    for file, specs in shards.items():
        weight_map |= {spec.name: file for spec in specs}
        total_size += sum(spec.bytes for spec in specs)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)


def _write_block(
    descriptor: int,
    target: Destination,
    element: int,
    block: "torch.Tensor",
) -> int:
    """Write a block, whose first element is `element` of its tensor; return its bytes."""
    import torch

    dtype = target.spec.dtype
    if str(block.dtype) != f"torch.{dtype}":
        raise AssertionError(f"planned {target.spec}, got {block.dtype}")
    if block.numel() == 0:
        return 0
    # As bytes, because numpy has no bfloat16.
    flat = block.detach().cpu().contiguous().reshape(-1)
    raw = memoryview(flat.view(torch.uint8).numpy())
    position = target.offset + element * DTYPE_BYTES[dtype]
    _write_all(descriptor, raw, position)
    return len(raw)


def _write_all(
    descriptor: int,
    raw: memoryview,
    offset: int,
) -> None:
    # A nearly full disk takes only a part of the data; the next call then raises ENOSPC.
    while raw:
        count = os.pwrite(descriptor, raw, offset)
        raw = raw[count:]
        offset += count
