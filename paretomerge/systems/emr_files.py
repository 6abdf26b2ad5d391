"""The files of EMR-Merging beside the unified checkpoint: manifest, masks and checksums."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from paretomerge.checkpoint.companions import companion_files, copy_files
from paretomerge.checkpoint.digest import file_sha256
from paretomerge.checkpoint.header import read_header
from paretomerge.checkpoint.json_file import JsonObject, read_json, write_json
from paretomerge.checkpoint.model_config import routed_config, with_tagged_floats
from paretomerge.checkpoint.operand import FLOAT_DTYPES, Operand, matrix_shape
from paretomerge.checkpoint.reader import Checkpoint, Shards, shard_path
from paretomerge.errors import CheckpointError
from paretomerge.merging.block import CPU_BLOCK
from paretomerge.merging.plan.plan import Weights

EMR_FOLDER = "emr"
"""The folder, inside that of the unified checkpoint, with the masks and the manifest.

Engines load every safetensors file beside config.json, so the masks are not there.
"""

MANIFEST = "manifest.json"
"""The file with base, tasks and checksums."""

FORMAT = "paretomerge-emr-1"
"""The format of the manifest and the masks."""

BITS = 8
"""Mask entries in a byte, the first one lowest."""

_ENTRY_KEYS = {"model", "lambda", "density", "masks", "sha256"}


class EmrTask(NamedTuple):
    """One task of a unified checkpoint.

    Attributes:
        model: The model that it was made from.
        scale: lambda, which the masked tau_u is multiplied by.
        density: The share of parameters whose mask is 1.
    """

    model: str
    scale: float
    density: float


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield rows [first, end) of blocks whose sizes are multiples of 8, except for the last."""
    rows, columns = matrix_shape(shape)
    if not columns:
        return
    step = max(1, CPU_BLOCK // (columns * BITS)) * BITS
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def bytes_of(rows: Tensor) -> memoryview:
    """The bytes of rows in float32."""
    return memoryview(rows.contiguous().view(-1).numpy()).cast("B")


def digest_of(operand: Operand) -> str:
    """Return the SHA-256 of a tensor's weights in float32, in whatever dtype they are stored."""
    digest = hashlib.sha256()
    for first, end in row_blocks(operand.shape):
        digest.update(bytes_of(operand.rows(first, end)))
    return digest.hexdigest()


def write_rest(template: Weights, dtype: str, folder: Path) -> None:
    """Write the config, the tokenizer and what else belongs to a model."""
    config = routed_config(template.config, (), dtype)
    write_json(folder / "config.json", with_tagged_floats(config))
    source = template.folder
    copy_files(companion_files(source), source, folder)


def is_unified_folder(path: Path) -> bool:
    """Whether a path is the folder of a unified checkpoint with masks."""
    return (path / EMR_FOLDER / MANIFEST).is_file()


def read_manifest(folder: Path) -> JsonObject:
    """Read the manifest of a unified checkpoint.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    file = folder / EMR_FOLDER / MANIFEST
    if not is_unified_folder(folder):
        raise CheckpointError(
            f"{folder}: holds no {EMR_FOLDER}/{MANIFEST}; `paretomerge emr` writes such folders "
            "(`paretomerge pick` reads those of `pareto-merge`)"
        )
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: has another format than {FORMAT}; was it written by another version?"
        )
    problem = CheckpointError(f"{file}: is damaged; get the folder again")
    if not isinstance(manifest.get("base"), str):
        raise problem
    tasks, tensors = manifest.get("tasks"), manifest.get("tensors")
    if not isinstance(tasks, dict) or not isinstance(tensors, dict):
        raise problem
    for entry in tasks.values():
        is_whole = isinstance(entry, dict) and entry.keys() >= _ENTRY_KEYS
        if not is_whole or not isinstance(entry["lambda"], float):
            raise problem
        if not math.isfinite(entry["lambda"]):
            raise problem
    if not all(isinstance(digests, dict) for digests in tensors.values()):
        raise problem
    return manifest


def open_masks(folder: Path, entry: JsonObject, unified: Checkpoint) -> Shards:
    """Open the masks of one task, and check that they are those of the unified checkpoint."""
    file = shard_path(folder / EMR_FOLDER, str(entry["masks"]))
    if file_sha256(file) != entry["sha256"]:
        raise CheckpointError(
            f"{file}: has changed since it was made; get the folder again"
        )
    headers = read_header(file)
    for name, header in unified.headers.items():
        if header.dtype not in FLOAT_DTYPES:
            continue
        n_bytes = math.ceil(math.prod(header.shape) / BITS)
        mask = headers.get(name)
        if mask is None or (mask.dtype, mask.shape) != ("uint8", (n_bytes,)):
            raise CheckpointError(
                f"{file}: {name}: expected a mask of {n_bytes} bytes; get the folder again"
            )
    return Shards(str(file), headers)
