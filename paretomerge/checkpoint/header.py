"""The header of a safetensors file: 8 bytes with its length (little-endian), then JSON.

A file may come from anywhere, so every value of its header is checked before it is used.
Format: https://huggingface.co/docs/safetensors
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paretomerge.checkpoint.operand import size_in_bytes
from paretomerge.errors import CheckpointError, shorten

SAFETENSORS_DTYPES = {
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
"""Name of a dtype in the format -> its name in torch."""


class UnsupportedDtypeError(CheckpointError):
    """A tensor has a dtype that is none of weights, such as the codes of a quantiser.

    Args:
        where: The file or model, and the tensor.
        code: The dtype in the format's own code.
    """

    def __init__(self, where: str, code: object) -> None:
        known = ", ".join(SAFETENSORS_DTYPES)
        super().__init__(
            f"{where}: the dtype must be one of {known}, got {shorten(code)}; quantised models "
            "cannot be merged, use the full model"
        )


_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 64  # torch's own limit
# A tensor without elements may claim any size along the other dimensions; torch cannot hold all.
_MAX_SIZE = 1 << 48


@dataclass(frozen=True)
class Header:
    """The header entry of one tensor.

    Attributes:
        file: The file that holds the tensor.
        dtype: Dtype of the tensor, as torch names it.
        shape: Shape of the tensor.
        offset: Position of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return size_in_bytes(self.shape, self.dtype)


def read_header(file: Path) -> dict[str, Header]:
    """Read the header of a safetensors file.

    Args:
        file: The file.

    Returns:
        The entry of each tensor, by the tensor's name.

    Raises:
        CheckpointError: If the file is not in the safetensors format, or if the sizes do not fit
            each other and the file without gaps and overlaps.
    """
    try:
        file_size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if (
                not 2
                <= header_size
                <= min(_MAX_HEADER_BYTES, file_size - _LENGTH_BYTES)
            ):
                raise CheckpointError(
                    f"{file}: not a safetensors file: a header of {header_size} bytes "
                    f"in a file of {file_size}"
                )
            entries = json.loads(stream.read(header_size))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{file}: the safetensors header must be a JSON object, got {shorten(entries)}"
        )
    entries.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + header_size
    headers = {}
    for name, entry in entries.items():
        headers[name] = _read_entry(file, name, entry, data_start)
    _check_layout(file, headers, data_start, file_size)
    return headers


def _check_layout(
    file: Path,
    headers: Mapping[str, Header],
    data_start: int,
    file_size: int,
) -> None:
    """Check that the tensors fill the file from `data_start` to its end, one after another."""
    end = data_start
    # Tensors without elements share their offset with the next one, so they must come first.
    in_file_order = sorted(
        headers, key=lambda name: (headers[name].offset, headers[name].bytes)
    )
    for name in in_file_order:
        header = headers[name]
        if header.offset != end:
            raise CheckpointError(
                f"{file}: {name}: expected its data at byte {end}, got {header.offset}; "
                "download the file again"
            )
        end += header.bytes
    if end != file_size:
        raise CheckpointError(
            f"{file}: expected {end} bytes, got {file_size}: the file is damaged; download it again"
        )


def _read_entry(
    file: Path,
    name: str,
    entry: object,
    data_start: int,
) -> Header:
    fields = _unpack_entry(name, entry)
    if fields is None:
        raise CheckpointError(
            f"{file}: {shorten(name)}: expected dtype, shape and data_offsets, got {shorten(entry)}"
        )
    code, shape, first, end = fields
    if not isinstance(code, str) or code not in SAFETENSORS_DTYPES:
        raise UnsupportedDtypeError(f"{file}: {name}", code)
    # `data_offsets` count from the end of the header.
    header = Header(
        file=file,
        dtype=SAFETENSORS_DTYPES[code],
        shape=shape,
        offset=data_start + first,
    )
    if header.bytes != end - first:
        raise CheckpointError(
            f"{file}: {name}: expected {header.bytes} bytes for {list(shape)} {code}, "
            f"got {end - first}"
        )
    return header


def _unpack_entry(
    name: str, entry: object
) -> tuple[object, tuple[int, ...], int, int] | None:
    """(dtype code, shape, first byte, end byte) of an entry; None if it is malformed."""
    if not isinstance(entry, dict):
        return None
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if (
        "dtype" not in entry
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
    ):
        return None
    if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
        return None
    # `type` and not `isinstance`: JSON's `true` is a bool, and bool is a subclass of int.
    if not all(
        type(number) is int and 0 <= number < _MAX_SIZE for number in (*shape, *offsets)
    ):
        return None
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return entry["dtype"], tuple(shape), offsets[0], offsets[1]
