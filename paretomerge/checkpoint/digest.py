"""Digests of files, and of the weights of local models: another one after a training."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

_BLOCK_BYTES = 4096
_BLOCKS_PER_FILE = 256
_DIGEST_LENGTH = 16


def digest_of_weights(folders: Sequence[Path]) -> str:
    """Return a digest of the safetensors files of a model.

    It does not depend on where the folders are or on time stamps. It reads the sizes of the files
    and evenly spaced blocks of each, not whole files: any training changes some of those blocks.

    Args:
        folders: The folder of the model, and that of its adapter if it has one.

    Returns:
        16 hexadecimal digits; "" if there are no files.
    """
    stamps: list[tuple[str, int, int]] = []
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            status = file.stat()
            stamps.append((str(file), status.st_size, status.st_mtime_ns))
    return _digest(tuple(stamps)) if stamps else ""


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a whole file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# A search plans thousands of merges of the same models, and each plan asks again.
@lru_cache(maxsize=256)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    sha256 = hashlib.sha256()
    for name, size, _ in files:
        file = Path(name)
        # Rounded up, so that there are no more blocks than that.
        spacing = -(-size // _BLOCKS_PER_FILE)
        step = max(_BLOCK_BYTES, spacing)
        header = f"{file.name} {size} "
        sha256.update(header.encode())
        with file.open("rb") as stream:
            for offset in range(0, size, step):
                stream.seek(offset)
                block = stream.read(_BLOCK_BYTES)
                sha256.update(block)
    return sha256.hexdigest()[:_DIGEST_LENGTH]
