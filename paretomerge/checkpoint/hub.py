"""Models of the Hugging Face Hub: a snapshot in its cache, or only the headers of the weights."""

from pathlib import Path

from paretomerge.checkpoint.header import (
    SAFETENSORS_DTYPES,
    Header,
    UnsupportedDtypeError,
)
from paretomerge.errors import CheckpointError

_TEXT_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.spm",
    "*.bpe",
    "*.tiktoken",
    "*.vocab",
    "*.py",  # copied, never run
    "README.md",
]
# Not `*.safetensors`: some repositories hold a second copy of the weights in another layout.
_WEIGHT_FILES = [
    "model*.safetensors",
    "adapter_model.safetensors",
    "[0-9]_*/*.safetensors",  # modules of sentence-transformers
]


def download_snapshot(
    repository: str,
    revision: str | None,
    weights: bool = True,
) -> Path:
    """Download a repository into the Hub's cache.

    Args:
        repository: `owner/model`.
        revision: Branch, tag or commit; None for the default branch.
        weights: Whether safetensors files are downloaded, or only the text files.

    Returns:
        The folder of the snapshot.

    Raises:
        CheckpointError: If the download fails.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_TEXT_FILES, *_WEIGHT_FILES] if weights else _TEXT_FILES
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns)
        )
    except (
        Exception
    ) as error:  # the client raises many classes; the user needs one sentence
        raise _download_error(repository, error) from error


def fetch_headers(
    repository: str,
    revision: str | None,
    folder: Path,
) -> dict[str, Header]:
    """Fetch the headers of a repository's weights, a few kilobytes of each file.

    Args:
        repository: `owner/model`.
        revision: Branch, tag or commit; None for the default branch.
        folder: Where the files would be, for the `file` of each header.

    Returns:
        The entry of each tensor, sorted by the tensor's name.

    Raises:
        CheckpointError: If the download fails or a dtype is not supported.
    """
    # Imported here: most commands never need the Hub's client, which takes a while to load.
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(repository, revision=revision)
    except Exception as error:
        raise _download_error(repository, error) from error
    headers = {}
    for name, file in sorted(metadata.weight_map.items()):
        entry = metadata.files_metadata[file].tensors[name]
        if entry.dtype not in SAFETENSORS_DTYPES:
            raise UnsupportedDtypeError(f"{repository}: {name}", entry.dtype)
        # The file is not here, so its header's length and the true offset do not matter.
        headers[name] = Header(
            file=folder / file,
            dtype=SAFETENSORS_DTYPES[entry.dtype],
            shape=tuple(entry.shape),
            offset=entry.data_offsets[0],
        )
    return headers


def _download_error(repository: str, error: Exception) -> CheckpointError:
    first_line = (str(error).splitlines() or [""])[0]
    return CheckpointError(
        f"{repository}: there is no such folder, and the Hugging Face Hub answered: "
        f"{type(error).__name__}: {first_line}"
    )
