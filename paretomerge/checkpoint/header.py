"""The header of a safetensors file: 8 bytes of length, little-endian, then JSON. Nothing in it is taken on trust."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretomerge.checkpoint.operand import size_in_bytes
from paretomerge.errors import CheckpointError, shorten

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LARGEST = 100_000_000  # bytes: the format's own limit
_MOST_SIDES = 64  # torch's own limit
_LONGEST = (
    1 << 48
)  # entries along one side; only a tensor without entries could claim more than a file can hold


@dataclass(frozen=True)
class Header:
    """What a shard says of one tensor: its file, its dtype as torch names it, its shape, its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return size_in_bytes(self.shape, self.dtype)


def read_header(file: Path) -> dict[str, Header]:
    """Every tensor of a shard. The sizes must fit each other and the file, without holes or overlaps."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LARGEST, size - 8):
                raise CheckpointError(
                    f"{file}: expected a safetensors file, got a header of {length} bytes in a file of {size}"
                )
            entries = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a safetensors file; {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{file}: expected a safetensors header that is an object, got {shorten(entries)}"
        )
    entries.pop("__metadata__", None)
    headers = {name: _entry(file, name, entry, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for name, header in sorted(headers.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if header.offset != end:
            raise CheckpointError(
                f"{file}: {name}: expected its data at byte {end}, got {header.offset}; download the file again"
            )
        end += header.bytes
    if end != size:
        raise CheckpointError(
            f"{file}: expected {end} bytes, got {size}: the file is torn; download it again"
        )
    return headers


def _entry(file: Path, name: str, entry: Any, start: int) -> Header:
    try:
        code, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = type(shape) is list and len(shape) <= _MOST_SIDES
        sound = sound and all(type(n) is int and 0 <= n < _LONGEST for n in (*shape, first, end))
        name.encode()
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{file}: {shorten(name)}: expected dtype, shape and data_offsets, got {shorten(entry)}"
        )
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{file}: {name}: expected one of {', '.join(DTYPES)}, got {shorten(code)}; quantised models can't be merged, use the full one"
        )
    header = Header(file, DTYPES[code], tuple(shape), start + first)
    if header.bytes != end - first:
        raise CheckpointError(
            f"{file}: {name}: expected {header.bytes} bytes for {list(shape)} {code}, got {end - first}"
        )
    return header
