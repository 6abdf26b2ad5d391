"""Models of the Hugging Face Hub: a snapshot in its cache, or no more than the headers of the weights."""

from pathlib import Path

from paretomerge.checkpoint.header import DTYPES, Header
from paretomerge.errors import CheckpointError

_TEXTS = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]


def snapshot(repository: str, revision: str | None, weights: bool = True) -> Path:
    """The folder of a repository's files: text files, and safetensors if `weights` are wanted. Cached."""
    from huggingface_hub import snapshot_download

    patterns = (
        [*_TEXTS, "model*.safetensors", "adapter_model.safetensors"] if weights else _TEXTS
    )  # not other copies of them
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds; the user needs one sentence
        raise _refused(repository, error) from error


def hub_headers(repository: str, revision: str | None, folder: Path) -> dict[str, Header]:
    """What the shards of a repository say of their tensors: a few kilobytes of each are fetched."""
    from huggingface_hub import get_safetensors_metadata

    try:
        told = get_safetensors_metadata(repository, revision=revision)
    except Exception as error:
        raise _refused(repository, error) from error
    headers = {}
    for tensor, file in sorted(told.weight_map.items()):
        entry = told.files_metadata[file].tensors[tensor]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{repository}: {tensor}: expected one of {', '.join(DTYPES)}, got {entry.dtype}; use the full model"
            )
        headers[tensor] = Header(
            folder / file, DTYPES[entry.dtype], tuple(entry.shape), entry.data_offsets[0]
        )
    return headers


def _refused(repository: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{repository}: expected a folder or a model on the Hub; the folder does not exist and the Hub said: "
        f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    )
