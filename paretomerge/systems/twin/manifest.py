"""twin.json: what a Twin-Merging folder holds."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from paretomerge.checkpoint.digest import file_sha256
from paretomerge.checkpoint.json_file import JsonObject, read_json, write_json
from paretomerge.errors import CheckpointError, unknown_name

MANIFEST_FILE = "twin.json"
"""Its name in the folder."""

KIND = "twin-merging"
"""What `kind` says in it."""

SHARED_FOLDER = "shared"
"""The folder of theta*, an ordinary checkpoint."""

ROUTER_FILE = "router.safetensors"
"""The router's weights."""

_VERSION = 1


@dataclass(frozen=True)
class FileFacts:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a Twin-Merging folder holds.

    Attributes:
        tasks: Names of the tasks, in the order of the router's outputs.
        base: The base that was merged on; of a local path the last part.
        sources: Name of a task -> its source, likewise.
        weight: The weight of each source in theta*.
        rank_share: Directions of each matrix that are stored, as a share of its rank.
        seed: The router's seed.
        router_accuracy: Share of the validation prompts whose task the router found.
        training_prompts: How many prompts it was trained on.
        validation_prompts: How many it was selected on.
        files: Path in the folder -> size and checksum.
        notes: What the user should know, such as where the models' configs differ.
    """

    tasks: tuple[str, ...]
    base: str
    sources: Mapping[str, str]
    weight: float
    rank_share: float
    seed: int
    router_accuracy: float
    training_prompts: int
    validation_prompts: int
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(facts.bytes for facts in self.files.values())

    def index(self, task: str) -> int:
        """The place of a task.

        Raises:
            CheckpointError: There is no such task.
        """
        if task not in self.tasks:
            raise CheckpointError(unknown_name("task", task, self.tasks))
        return self.tasks.index(task)

    def exclusive_file(self, task: str) -> str:
        """The file of a task's exclusive part. Numbered, since a name may be no file name."""
        return f"exclusive-{self.index(task) + 1}.safetensors"

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        content: JsonObject = {"kind": KIND, "version": _VERSION}
        content |= asdict(self)
        write_json(folder / MANIFEST_FILE, content)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder.

        Args:
            folder: A Twin-Merging folder.

        Returns:
            The manifest.

        Raises:
            CheckpointError: The folder is something else, or of a later version.
        """
        if not is_twin_folder(folder):
            raise CheckpointError(
                f"{folder}: not a Twin-Merging folder (no {MANIFEST_FILE}); make one with "
                "`paretomerge twin`"
            )
        content = read_json(folder / MANIFEST_FILE)
        if (content.pop("kind", None), content.pop("version", None)) != (
            KIND,
            _VERSION,
        ):
            raise CheckpointError(
                f"{folder}: {MANIFEST_FILE} is not of a version that this paretomerge reads; make "
                "the folder again"
            )
        try:
            files = {}
            for name, facts in content.pop("files").items():
                files[name] = FileFacts(**facts)
            tasks = tuple(content.pop("tasks"))
            notes = tuple(content.pop("notes", ()))
            return cls(tasks=tasks, files=files, notes=notes, **content)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: {MANIFEST_FILE} is damaged ({error}); make the folder again"
            ) from error

    def check_files(self, folder: Path, *, contents: Iterable[str] = ()) -> None:
        """Check that the files of a folder are those that were written.

        Args:
            folder: The folder.
            contents: Files whose checksums are compared; of all others only the size is.

        Raises:
            CheckpointError: A file is missing or differs.
        """
        for name, facts in self.files.items():
            file = folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts.bytes:
                raise CheckpointError(
                    f"{file}: missing, or changed since it was written; make the Twin-Merging "
                    "folder again"
                )
        for name in contents:
            if name not in self.files or file_sha256(folder / name) != (
                self.files[name].sha256
            ):
                raise CheckpointError(
                    f"{folder / name}: its content changed since it was written; make the "
                    "Twin-Merging folder again"
                )


def is_twin_folder(model: str | Path) -> bool:
    """Whether a path is a Twin-Merging folder."""
    try:
        return (Path(model).expanduser() / MANIFEST_FILE).is_file()
    except OSError:  # a name that is too long for a path
        return False


def file_facts(folder: Path) -> dict[str, FileFacts]:
    """Size and checksum of each file of a folder, sorted by path."""
    facts = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            facts[name] = FileFacts(file.stat().st_size, file_sha256(file))
    return facts
