"""How a recipe names a model: `path-or-name[@revision][+adapter[@revision]]`."""

from dataclasses import dataclass
from pathlib import Path

from paretomerge.checkpoint.hub import download_snapshot
from paretomerge.errors import CheckpointError

GGUF_SUFFIX = ".gguf"
"""Ending of the files of llama.cpp."""


@dataclass(frozen=True)
class Reference:
    """A model and the adapter that is added to it.

    Attributes:
        model: A folder or a Hub name.
        adapter: A folder or a Hub name; None without an adapter.
    """

    model: str
    adapter: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Reference":
        """Split a name at its last plus sign, unless the name as a whole is an existing path.

        Raises:
            CheckpointError: If one side of the plus sign is empty.
        """
        if "+" not in name or _existing_path(name) is not None:
            return cls(name)
        model, _, adapter = name.rpartition("+")
        if not model or not adapter:
            raise CheckpointError(
                f"{name}: expected model+adapter, but one side of the plus sign is empty"
            )
        return cls(model, adapter)


def resolve_folder(name: str, weights: bool = True) -> Path:
    """Return the folder of a model or adapter, downloading it from the Hub if needed.

    Args:
        name: A local folder, or a Hub name with an optional `@revision`.
        weights: Whether the weights are downloaded, or only the text files.

    Raises:
        CheckpointError: If there is no such folder and no such model on the Hub.
    """
    path = _existing_path(name)
    if path is not None and path.is_dir():
        return path
    if path is not None and path.suffix == GGUF_SUFFIX:
        raise CheckpointError(f"{name}: {conversion_hint(path)}")
    # An "@" in the name of an existing folder was handled above.
    repository, revision = split_revision(name)
    if revision and _existing_path(repository) is not None:
        raise CheckpointError(
            f"{name}: {repository} is a local path, which has no revisions; remove @{revision}"
        )
    if name.startswith(("/", ".", "~")) or repository.count("/") != 1:
        raise CheckpointError(
            f"{name}: expected a folder with a model, or a Hub name like owner/model; "
            "there is no such folder"
        )
    return download_snapshot(repository, revision, weights)


def conversion_hint(path: Path) -> str:
    """The sentence that says how a GGUF file becomes a source.

    Args:
        path: The file.
    """
    return (
        "a GGUF file, which is not merged as it is; convert it with "
        f"`paretomerge convert {path} {path.stem}`, and name the folder {path.stem}"
    )


def split_revision(name: str) -> tuple[str, str | None]:
    """Split a Hub name into (repository, revision)."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def is_folder(name: str) -> bool:
    """Whether a folder of that name exists; False for names that cannot be paths."""
    try:
        return bool(name) and Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, `~nobody`, a NUL
        return False


def model_parts(name: str) -> list[str]:
    """The parts of `model+adapter`; a folder whose own name holds a plus sign is one part."""
    return [name] if is_folder(name) else name.split("+")


def canonical_name(model: str) -> str:
    """Return a name that is the same for every spelling of a model.

    Local folders of models and adapters become absolute paths; Hub names stay.
    """
    parts = []
    for part in model.split("+"):
        if is_folder(part):
            part = str(Path(part).expanduser().resolve())
        parts.append(part)
    return "+".join(parts)


def reject_symlink_escape(path: Path, root: Path | None = None) -> Path:
    """Return `path` unless it is a link that leaves its folder.

    Args:
        path: A file or folder.
        root: The folder that it must not leave, a parent of `path`; by default the one above it.

    The Hub's cache links from `snapshots/<commit>` to `blobs` of the same repository; those links
    are allowed.

    Raises:
        CheckpointError: If it is.
    """
    # The folder itself may be a link: it is what the user named.
    folder = (root or path.parent).resolve()
    target = path.resolve()
    if target.is_relative_to(folder):
        return path
    hub_blobs = folder.parent.parent / "blobs"
    if folder.parent.name == "snapshots" and target.is_relative_to(hub_blobs):
        return path
    raise CheckpointError(
        f"{path}: a link that leaves its folder is not followed; "
        "use the folder that holds the file itself"
    )


def _existing_path(name: str) -> Path | None:
    """The path of that name; None if nothing is there."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except PermissionError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from error
    except (OSError, RuntimeError):  # too long for a path, or `~nobody`
        return None
