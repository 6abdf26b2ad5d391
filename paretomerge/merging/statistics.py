"""Statistics of sources on calibration text, in a folder, as methods that need data read them.

`paretomerge.calibration` computes and writes them. The folder holds a manifest and, for each source
and kind of statistic, a safetensors file:

- `regmean`: G = mean of x x^T over the tokens, (d, d), at the input x of each linear layer. Layers
  with one input, such as q, k and v, share one G.
- `regmean_pp`: the same on inputs that came through the merged lower layers, with its off-diagonal
  entries multiplied by alpha.
- `fisher`: the mean over the examples of the squared gradient, of the shape of each tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from paretomerge.checkpoint.header import read_header
from paretomerge.checkpoint.json_file import JsonObject, read_json, write_json
from paretomerge.checkpoint.operand import Operand
from paretomerge.checkpoint.reader import Shards
from paretomerge.checkpoint.reference import reject_symlink_escape
from paretomerge.errors import CheckpointError, RecipeError

StatisticKind = Literal["regmean", "regmean_pp", "fisher"]
"""What is measured; the names of the methods that use it."""

STATISTIC_KINDS: tuple[StatisticKind, ...] = get_args(StatisticKind)

MANIFEST_FILE = "calibration.json"
"""Says of which models and texts the statistics in a folder are."""

_FORMAT = 1


@dataclass(frozen=True)
class Statistic:
    """What calibration text says about one tensor of a source.

    Attributes:
        operand: G, (d, d), or the squared gradients, of the shape of the tensor.
        of_rows: For G: whether the tensor has its inputs along the rows, (d, outputs), as GPT-2's
            layers, and not along the columns.
        norm: For squared gradients: the L2 norm of those of all tensors of the source.
    """

    operand: Operand
    of_rows: bool = False
    norm: float = 1.0


@dataclass(frozen=True)
class TensorEntry:
    """Where the statistic of a tensor is.

    Attributes:
        key: Its name in the file.
        of_rows: See `Statistic`.
    """

    key: str
    of_rows: bool = False


@dataclass(frozen=True)
class StatisticFile:
    """The statistics of one kind of a source.

    Attributes:
        file: The name of the file.
        tensors: Name of a tensor in the source's checkpoint -> its statistic.
        norm: See `Statistic`.
    """

    file: str
    tensors: Mapping[str, TensorEntry]
    norm: float = 1.0


@dataclass(frozen=True)
class SourceEntry:
    """A source in the manifest.

    Attributes:
        name: The name that was given, for messages.
        digest: Digest of its weights.
        data: Digest of the tokens that it read.
        examples: How many examples these are.
        tokens: How many tokens.
        statistics: Kind -> its file.
    """

    name: str
    digest: str
    data: str
    examples: int
    tokens: int
    statistics: Mapping[str, StatisticFile]


@dataclass(frozen=True)
class ThroughMerge:
    """The merge whose layers the statistics `regmean_pp` came through.

    Attributes:
        alpha: The factor of the off-diagonal entries.
        base: Digest of the base.
    """

    alpha: float
    base: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of statistics holds.

    Attributes:
        sources: The sources.
        through_merge: The merge of the statistics `regmean_pp`, if there are any.
        origin: What the caller calls the text that they were made of.
    """

    sources: tuple[SourceEntry, ...]
    through_merge: ThroughMerge | None = None
    origin: str = ""

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        write_json(folder / MANIFEST_FILE, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder.

        Raises:
            CheckpointError: It is missing or damaged, or of another version.
        """
        file = reject_symlink_escape(folder / MANIFEST_FILE)
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: no statistics there (no {MANIFEST_FILE}); make them with "
                "`paretomerge calibrate`"
            )
        data = read_json(file)
        if data.get("format") != _FORMAT:
            raise CheckpointError(
                f"{file}: of another version; make the statistics again with "
                "`paretomerge calibrate`"
            )
        try:
            return cls(
                tuple(_source_entry(entry) for entry in data["sources"]),
                _through_merge(data["through_merge"]),
                str(data["origin"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: damaged ({error!r}); make the statistics again with "
                "`paretomerge calibrate`"
            ) from error


def _source_entry(data: JsonObject) -> SourceEntry:
    statistics = {}
    for kind, content in data["statistics"].items():
        tensors = {}
        for name, entry in content["tensors"].items():
            tensors[str(name)] = TensorEntry(str(entry["key"]), bool(entry["of_rows"]))
        file = str(content["file"])
        statistics[str(kind)] = StatisticFile(file, tensors, float(content["norm"]))
    return SourceEntry(
        name=str(data["name"]),
        digest=str(data["digest"]),
        data=str(data["data"]),
        examples=int(data["examples"]),
        tokens=int(data["tokens"]),
        statistics=statistics,
    )


def _through_merge(data: JsonObject | None) -> ThroughMerge | None:
    if data is None:
        return None
    return ThroughMerge(float(data["alpha"]), str(data["base"]))


@dataclass(frozen=True)
class SourceStatistics:
    """The statistics of one kind of one source.

    Attributes:
        tensors: Name of a tensor -> where its statistic is.
        shards: The file.
        norm: See `Statistic`.
    """

    tensors: Mapping[str, TensorEntry]
    shards: Shards
    norm: float

    def find(self, tensor: str) -> Statistic | None:
        """The statistic of a tensor; None if it has none."""
        entry = self.tensors.get(tensor)
        if entry is None:
            return None
        return Statistic(self.shards.stored(entry.key), entry.of_rows, self.norm)


@dataclass(frozen=True)
class StatisticsFolder:
    """An opened folder of statistics.

    Attributes:
        folder: The folder.
        manifest: What it holds.
        files: Name of a file -> its tensors.
    """

    folder: Path
    manifest: Manifest
    files: Mapping[str, Shards] = field(repr=False)

    def of(self, model: str, digest: str, kind: str) -> SourceStatistics:
        """The statistics of a source.

        Args:
            model: The source, for messages.
            digest: Digest of its weights.
            kind: Which statistics.

        Returns:
            The statistics.

        Raises:
            RecipeError: The folder has none of that source, or not of that kind.
        """
        for source in self.manifest.sources:
            if source.digest != digest:
                continue
            stored = source.statistics.get(kind)
            if stored is None:
                available = ", ".join(source.statistics)
                raise RecipeError(
                    f"calibration: {self.folder} has no statistics `{kind}` of {model}, only "
                    f"{available}; make them with `paretomerge calibrate`"
                )
            return SourceStatistics(
                stored.tensors, self.files[stored.file], stored.norm
            )
        names = ", ".join(source.name for source in self.manifest.sources)
        raise RecipeError(
            f"calibration: {self.folder} has no statistics of {model} as it is now, only of "
            f"{names}; make them again with `paretomerge calibrate`"
        )


def open_statistics(folder: str) -> StatisticsFolder:
    """Open a folder of statistics. Only headers are read.

    Args:
        folder: The folder; `~` is the home folder.

    Returns:
        The opened folder.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    path = Path(folder).expanduser()
    stamps: list[tuple[str, int, int]] = []
    for file in (path / MANIFEST_FILE, *sorted(path.glob("*.safetensors"))):
        if file.is_file():
            status = file.stat()
            stamps.append((file.name, status.st_mtime_ns, status.st_ino))
    return _opened(path, tuple(stamps))


# A search plans thousands of merges with one folder. A folder that was made again is opened again.
@lru_cache(maxsize=8)
def _opened(
    folder: Path, _stamps: tuple[tuple[str, int, int], ...]
) -> StatisticsFolder:
    manifest = Manifest.read(folder)
    files: dict[str, Shards] = {}
    for name, entries in _files(manifest):
        if Path(name).name != name:
            raise CheckpointError(
                f"{folder}: {MANIFEST_FILE}: expected files of the folder, got {name!r}"
            )
        file = reject_symlink_escape(folder / name)
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: {name} is missing; make the statistics again with "
                "`paretomerge calibrate`"
            )
        headers = read_header(file)
        for tensor, entry in entries.items():
            if entry.key not in headers:
                raise CheckpointError(
                    f"{file}: has no statistic of {tensor}; make the statistics again with "
                    "`paretomerge calibrate`"
                )
        files[name] = Shards(str(file), headers)
    return StatisticsFolder(folder, manifest, files)


def _files(manifest: Manifest) -> Iterator[tuple[str, Mapping[str, TensorEntry]]]:
    for source in manifest.sources:
        for stored in source.statistics.values():
            yield stored.file, stored.tensors


@dataclass(frozen=True)
class MergeStatistics:
    """The statistics that one merge uses.

    Attributes:
        folder: Where they are.
        by_model: Source, as the recipe names it -> its statistics.
    """

    folder: StatisticsFolder
    by_model: Mapping[str, SourceStatistics]

    def find(self, model: str, tensor: str) -> Statistic | None:
        """The statistic of a tensor of a source; None if it has none."""
        return self.by_model[model].find(tensor)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed since it was opened."""
        for statistics in self.by_model.values():
            statistics.shards.check_unchanged()
