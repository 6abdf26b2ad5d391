"""What a family's folder says about itself: `pareto_family.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from paretomerge.checkpoint.digest import digest_of_weights
from paretomerge.checkpoint.json_file import read_json, write_json
from paretomerge.errors import CheckpointError

FILE = "pareto_family.json"
"""The file that makes a folder a family."""

BASE_FOLDER = "base"
"""The folder of the checkpoint that updates are added to, inside the family's folder."""

_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The facts of a family.

    Attributes:
        sources: Names of the sources, in the order of gamma.
        licences: Source -> its licence; None where it states none.
        scale: lambda of the targets theta_0 + lambda K tau_k.
        centre: What the factors are added to: `base` for theta_0, `mean` for theta_0 + lambda
            sum_k tau_k.
        rank: The rank that was asked for; None where a share of the energy was.
        energy: The share of the energy that was asked for, or None.
        whole: Names of the tensors whose deltas are stored whole.
        ranks: Tensor -> its rank, for those that are factorised.
        kept: Source -> share of |lambda K tau_k|^2 over all tensors that the closed form keeps;
            None for a source that equals the base.
        kept_in_all: The same share for all sources together.
        base_bytes: Size of the weights in the folder `base`.
        factor_bytes: Size of the factors and of the deltas that are stored whole.
        training: How the factors were trained; None for the closed form.
        notes: What the user should know, such as where the models' configs differ.
        digest: Digest of the base and the factors; "" in families of versions without it.
    """

    sources: tuple[str, ...]
    licences: Mapping[str, str | None]
    scale: float
    centre: str
    rank: int | None
    energy: float | None
    whole: tuple[str, ...]
    ranks: Mapping[str, int]
    kept: Mapping[str, float | None]
    kept_in_all: float
    base_bytes: int
    factor_bytes: int
    training: Mapping[str, Any] | None = None  # Any: numbers and text for people
    notes: tuple[str, ...] = ()
    digest: str = ""

    def trained(self, training: Mapping[str, Any]) -> "Manifest":
        """The manifest after a training."""
        return replace(self, training=training)

    def with_digest(self, folder: Path) -> "Manifest":
        """The manifest with the digest of the weights in a folder."""
        return replace(self, digest=_digest(folder))

    def check_weights(self, folder: Path) -> None:
        """Check that the base and the factors are those that were written together.

        Raises:
            CheckpointError: If one of them has been replaced: their sum would be another model.
        """
        if self.digest and self.digest != _digest(folder):
            raise CheckpointError(
                f"{folder}: the base or the factors have changed since the family was made; make "
                "it again with `paretomerge pareto-merge`"
            )

    def write(self, folder: Path) -> None:
        """Write the file into a family's folder."""
        content = {"version": _VERSION, **asdict(self)}
        write_json(folder / FILE, content)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the file in a family's folder.

        Raises:
            CheckpointError: If there is no such file, or it is not one that `write` wrote.
        """
        file = folder / FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: has no {FILE}; name a study.yaml, or a folder that "
                "`paretomerge pareto-merge` wrote"
            )
        content = read_json(file)
        if content.pop("version", None) != _VERSION:
            raise CheckpointError(
                f"{file}: another version of paretomerge wrote this family; make it again"
            )
        try:
            manifest = cls(**content)
            sources = tuple(str(name) for name in manifest.sources)
            whole = tuple(str(name) for name in manifest.whole)
            notes = tuple(str(note) for note in manifest.notes)
            is_complete = {*manifest.kept} == {*manifest.licences} == {*sources}
        except TypeError as error:
            raise _damaged(file) from error
        if not is_complete or len(sources) < 2 or not isinstance(manifest.ranks, dict):
            raise _damaged(file)
        return replace(manifest, sources=sources, whole=whole, notes=notes)


def is_family(path: Path) -> bool:
    """Whether a path is the folder of a family."""
    return (path / FILE).is_file()


def _digest(folder: Path) -> str:
    return digest_of_weights((folder, folder / BASE_FOLDER))


def _damaged(file: Path) -> CheckpointError:
    return CheckpointError(f"{file}: is damaged; make the family again")
