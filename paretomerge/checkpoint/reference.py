"""How a recipe names a model: `path-or-name[@revision][+adapter[@revision]]`."""

from dataclasses import dataclass
from pathlib import Path

from paretomerge.checkpoint.hub import snapshot
from paretomerge.errors import CheckpointError


@dataclass(frozen=True)
class Reference:
    """A model and the adapter, if any, that is added to it."""

    model: str
    adapter: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Reference":
        """A plus sign that belongs to an existing path separates nothing."""
        if "+" not in name or _path(name) is not None:
            return cls(name)
        model, _, adapter = name.rpartition("+")
        if not model or not adapter:
            raise CheckpointError(
                f"{name}: expected model+adapter, got an empty side of the plus sign"
            )
        return cls(model, adapter)


def locate(name: str, weights: bool = True) -> Path:
    """The folder of a model or adapter: a local one, or a snapshot from the Hub, on request without its weights."""
    path = _path(name)
    if path is not None and path.is_dir():
        return path
    repository, revision = on_hub(name)
    if revision and _path(repository) is not None:
        raise CheckpointError(
            f"{name}: expected a Hub name before @{revision}, got a local folder, which has no revisions"
        )
    if name.startswith(("/", ".", "~")) or repository.count("/") != 1:
        raise CheckpointError(
            f"{name}: expected a folder with a model, or a Hub name like owner/model; there is no such folder"
        )
    return snapshot(repository, revision, weights)


def on_hub(name: str) -> tuple[str, str | None]:
    """(repository, revision) of a name that is no folder."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def is_folder(name: str) -> bool:
    """Whether there is a folder of that name; False for what can be no path."""
    try:
        return bool(name) and Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, `~nobody`, a NUL
        return False


def place(model: str) -> str:
    """A model by where it is, however a recipe spells that: local folders and adapters by their absolute paths."""
    return "+".join(
        str(Path(part).resolve()) if is_folder(part) else part for part in model.split("+")
    )


def own(path: Path) -> Path:
    """`path`, if it does not link out of its folder. The Hub's cache links from its snapshots to its blobs, which is as good."""
    home, real = path.parent.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if not real.is_relative_to(home) and not (
        home.parent.name == "snapshots" and real.is_relative_to(blobs)
    ):
        raise CheckpointError(
            f"{path}: expected a file of the folder, got a link that leaves it; name the folder where the file lies"
        )
    return path


def _path(name: str) -> Path | None:
    """What is there under that path; None if nothing is."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except PermissionError as error:
        raise CheckpointError(
            f"{name}: expected a folder that may be read, got: {error.strerror}"
        ) from error
    except (OSError, RuntimeError):  # too long for a path, or `~nobody`
        return None
