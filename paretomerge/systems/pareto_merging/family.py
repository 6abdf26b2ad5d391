"""A family of models with a preference as input, read from its folder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import yaml
from torch import Tensor

from paretomerge.arguments import as_float
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.companions import companion_files, copy_files
from paretomerge.checkpoint.header import Header, read_header
from paretomerge.checkpoint.reader import Checkpoint, Shards, shard_path
from paretomerge.checkpoint.writer import (
    SHARD_BYTES,
    TensorSpec,
    WeightsWriter,
    check_out,
    new_folder,
)
from paretomerge.errors import CheckpointError, ConfigError, shorten, unknown_name
from paretomerge.merging.engine import usable_device
from paretomerge.systems.pareto_merging.factors import Factors
from paretomerge.systems.pareto_merging.manifest import BASE_FOLDER, Manifest

FACTOR_FILES = "factors-*.safetensors"
"""The files with the factors and with the deltas that are stored whole."""

PART_NAMES = ("a", "b", "cores")
"""The parts of a factorised tensor, behind its name and a slash in the files."""

WHOLE = "deltas"
"""The part of a tensor that is stored whole: (K, *shape)."""

Weights = Mapping[str, float] | str
"""A preference: source -> weight of 0 or more, or `mean` for equal weights."""

_CARD = """\
---
{front_matter}---
# {title}

Written by `paretomerge pick` from a family of Pareto Merging (arXiv 2408.12105) for the preference
{preference}, without a search and without an evaluation.

| source | share of the preference | licence |
|---|---:|---|
{sources}

A merge is bound by the licences of all its sources.

SHA-256 (`sha256sum --check`):

```
{checksums}
```
"""


@dataclass(frozen=True)
class ParetoFamily:
    """Models theta(gamma) for every point gamma of the simplex over the sources.

    A matrix is W + A (sum_k gamma_k G_k) B^T; a tensor that is stored whole is
    w + sum_k gamma_k d_k. W and w are those of the checkpoint in the folder `base`.

    Attributes:
        folder: The family's folder.
        manifest: What the folder says about the family.
        base: The opened checkpoint in the folder `base`.
        shards: The opened files with the factors.

    Example:
        >>> family = ParetoFamily.load("family")  # doctest: +SKIP
        >>> family.write({"math": 0.7, "code": 0.3}, "merged")  # doctest: +SKIP
        PosixPath('merged')
    """

    folder: Path
    manifest: Manifest
    base: Checkpoint
    shards: Shards

    @classmethod
    def load(cls, folder: str | Path) -> "ParetoFamily":
        """Open a family; tensors are read when they are needed.

        Args:
            folder: What `pareto_merge` wrote.

        Raises:
            CheckpointError: If the folder holds no family, or a damaged one.
        """
        path = Path(read_path("folder", folder))
        manifest = Manifest.read(path)
        manifest.check_weights(path)
        base = Checkpoint(str(path / BASE_FOLDER))
        headers: dict[str, Header] = {}
        for file in sorted(path.glob(FACTOR_FILES)):
            headers |= read_header(shard_path(path, file.name))
        family = cls(path, manifest, base, Shards(str(path), headers))
        family._check_shapes()
        return family

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources, in the order of gamma."""
        return self.manifest.sources

    @cached_property
    def varying(self) -> tuple[str, ...]:
        """Names of the tensors that depend on the preference."""
        return tuple(sorted((*self.manifest.whole, *self.manifest.ranks)))

    def gamma(self, weights: Weights) -> Tensor:
        """Turn a preference into a point of the simplex.

        Args:
            weights: Source -> weight, scaled to a sum of 1 here; sources that are not named get 0.
                Or `mean`.

        Returns:
            (K,) in float32.

        Raises:
            ConfigError: If a name is unknown, a weight is negative or not finite, or all are 0.
        """
        if weights == "mean":
            weights = dict.fromkeys(self.names, 1.0)
        if not isinstance(weights, Mapping):
            raise ConfigError(
                f"prefer: write mean or {{source: weight}}, not {shorten(weights)}"
            )
        values = dict.fromkeys(self.names, 0.0)
        for name, weight in weights.items():
            if name not in values:
                raise ConfigError(f"prefer: {unknown_name('source', name, self.names)}")
            value = as_float(weight)
            if value is None or not 0 <= value < math.inf:
                raise ConfigError(
                    f"prefer: weights must be numbers of 0 or more, not {name}={shorten(weight)}"
                )
            values[name] = value
        total = math.fsum(values.values())
        if not 0 < total < math.inf:
            raise ConfigError("prefer: at least one weight must be above 0")
        shares = [value / total for value in values.values()]
        return torch.tensor(shares, dtype=torch.float32)

    def part(self, name: str, part: str) -> Tensor:
        """Read a part of a tensor, one of `PART_NAMES` or `WHOLE`, in float32."""
        return self.shards.stored(f"{name}/{part}").read()

    def factors(self, name: str) -> Factors:
        """Read the factors of a tensor that is factorised."""
        a, b, cores = (self.part(name, part) for part in PART_NAMES)
        return Factors(a, b, cores)

    def tensor(self, name: str, weights: Weights, device: str = "cpu") -> Tensor:
        """Merge one tensor.

        Args:
            name: A tensor of the base.
            weights: The preference.
            device: Where to compute.

        Returns:
            The tensor in the base's dtype.
        """
        return self._merged(name, self.gamma(weights).to(device))

    def tensors(
        self, weights: Weights, device: str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Merge one tensor after another.

        Args:
            weights: The preference.
            device: Where to compute.

        Yields:
            (name, tensor in the base's dtype) for every tensor of the base, by name.
        """
        gamma = self.gamma(weights).to(device)
        for name in sorted(self.base.headers):
            yield name, self._merged(name, gamma)

    def merge(self, weights: Weights, device: str = "cpu") -> dict[str, Tensor]:
        """Merge all tensors into memory.

        Args:
            weights: The preference.
            device: Where to compute.

        Returns:
            Name -> tensor in the base's dtype.
        """
        return dict(self.tensors(weights, device))

    def write(
        self,
        weights: Weights,
        out: str | Path,
        *,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        device: str = "cpu",
    ) -> Path:
        """Write the model for a preference as a checkpoint, whole or not at all.

        Args:
            weights: The preference.
            out: A new folder.
            overwrite: Whether to replace a checkpoint that is there.
            shard_bytes: Size of the largest file.
            device: Where to compute.

        Returns:
            The folder.

        Raises:
            ConfigError: If the preference is none of this family.
            CheckpointError: If the folder cannot be written or replaced.
        """
        gamma = self.gamma(weights)
        device = usable_device(device)
        target = Path(out).expanduser()
        check_out(target, (str(self.folder), str(self.base.folder)), overwrite)
        specs = []
        for name, header in sorted(self.base.headers.items()):
            specs.append(TensorSpec(name, header.dtype, header.shape))
        source = self.base.folder
        with new_folder(target, overwrite, sum(spec.bytes for spec in specs)) as folder:
            with WeightsWriter(folder, specs, shard_bytes) as writer:
                for spec in specs:
                    writer.write(
                        spec.name, 0, self._merged(spec.name, gamma.to(device))
                    )
                checksums = writer.checksums()
            self.check_unchanged()
            files = [source / "config.json", *companion_files(source)]
            copy_files(files, source, folder)
            card = self._card(target.name, gamma, checksums)
            (folder / "README.md").write_text(card, encoding="utf-8")
        return target

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed since the family was opened."""
        self.base.check_unchanged()
        self.shards.check_unchanged()

    def preference_text(self, gamma: Tensor) -> str:
        """Write a point of the simplex for people: `a=0.7,b=0.3`."""
        parts = []
        for name, share in zip(self.names, gamma.tolist(), strict=True):
            parts.append(f"{name}={share:.4g}")
        return ",".join(parts)

    def _merged(self, name: str, gamma: Tensor) -> Tensor:
        stored = self.base.tensor(name)
        if name in self.manifest.ranks:
            factors = self.factors(name)
            a, b, cores = (
                t.to(gamma.device) for t in (factors.a, factors.b, factors.cores)
            )
            return added(stored.to(gamma.device), Factors(a, b, cores), gamma, name)
        if name in self.manifest.whole:
            deltas = self.part(name, WHOLE).to(gamma.device)
            return added(stored.to(gamma.device), deltas, gamma, name)
        return stored

    def _card(self, title: str, gamma: Tensor, checksums: Mapping[str, str]) -> str:
        rows = []
        for name, share in zip(self.names, gamma.tolist(), strict=True):
            stated = self.manifest.licences[name] or "not stated"
            rows.append(f"| {name} | {share:.4g} | {stated} |")
        front: dict[str, object] = {"library_name": "transformers"}
        front["tags"] = ["merge", "paretomerge", "pareto-merging"]
        licences = set(self.manifest.licences.values())
        if len(licences) == 1 and None not in licences:
            front["license"] = licences.pop()
        lines = [f"{checksum}  {name}" for name, checksum in checksums.items()]
        return _CARD.format(
            front_matter=yaml.safe_dump(front, sort_keys=False),
            title=title,
            preference=self.preference_text(gamma),
            sources="\n".join(rows),
            checksums="\n".join(lines),
        )

    def _check_shapes(self) -> None:
        """Raise CheckpointError if the factors do not fit the base."""
        k = len(self.names)
        for name in self.varying:
            header = self.base.headers.get(name)
            if header is None:
                raise CheckpointError(
                    f"{self.folder}: {name}: the base lacks this tensor; make the family again"
                )
            if name in self.manifest.whole:
                fits = self._shape(name, WHOLE) == (k, *header.shape)
            else:
                parts = [self._shape(name, part) for part in PART_NAMES]
                fits = _fit(parts, k, header.shape)
            if not fits:
                raise CheckpointError(
                    f"{self.folder}: {name}: the factors do not fit the base; make the family again"
                )

    def _shape(self, name: str, part: str) -> tuple[int, ...]:
        header = self.shards.headers.get(f"{name}/{part}")
        return () if header is None else tuple(header.shape)


def _fit(parts: Sequence[tuple[int, ...]], k: int, shape: tuple[int, ...]) -> bool:
    """Whether the shapes of A, B and the cores make deltas of a shape."""
    a, b, cores = parts
    if (len(a), len(b), len(cores)) != (2, 2, 3):
        return False
    return cores == (k, a[1], b[1]) and (a[0], b[0]) == (
        math.prod(shape[:-1]),
        shape[-1],
    )


def added(
    stored: Tensor, update: Factors | Tensor, gamma: Tensor, label: str
) -> Tensor:
    """Add the update for a preference to a tensor.

    Args:
        stored: The tensor of the base.
        update: Its factors, or its deltas (K, *shape).
        gamma: (K,), a point of the simplex.
        label: The tensor's name, for the error message.

    Returns:
        The sum in the dtype of `stored`, computed in float32.

    Raises:
        CheckpointError: If the dtype cannot hold an entry of the sum.
    """
    if isinstance(update, Factors):
        delta = update.update(gamma)
    else:
        delta = torch.tensordot(gamma, update, dims=1)
    # Not in place: `float` copies nothing where the tensor is in float32 already.
    total = stored.float() + delta.reshape(stored.shape)
    result = total.to(stored.dtype)
    if not bool(result.isfinite().all()):
        dtype = str(stored.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{label}: the merge for this preference is too large for {dtype}; make the family "
            "with a smaller --scale, or with --dtype float32"
        )
    return result
