"""Makes a family: the closed form, tensor by tensor, and its training where there is data.

Chen & Kwok 2024 (Pareto Merging, arXiv 2408.12105). Without data, the targets are
theta_0 + lambda K tau_k, one for each source. For a preference gamma the weighted sum of squared
distances to them is least at theta_0 + lambda K sum_k gamma_k tau_k, which is linear in gamma. So
the low-rank structure needs no optimiser: see `factors`. D_k is the difference of target k to the
part that does not depend on the preference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paretomerge.arguments import (
    flag,
    instance_of,
    integer,
    mapping_of,
    number,
    optional,
)
from paretomerge.arguments import model as read_model
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.json_file import write_json
from paretomerge.checkpoint.model_config import with_tagged_floats
from paretomerge.checkpoint.operand import Operand, matrix_shape, read_tensor
from paretomerge.checkpoint.writer import (
    TensorSpec,
    WeightsWriter,
    check_out,
    new_folder,
)
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.card import licences_of
from paretomerge.merging.engine import usable_device, write_companions
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.plan.plan import Plan, TensorJob
from paretomerge.space.sources import read_sources
from paretomerge.systems.notes import plan_notes
from paretomerge.systems.pareto_merging.factors import Factors, energies, factorise
from paretomerge.systems.pareto_merging.family import (
    PART_NAMES,
    WHOLE,
    ParetoFamily,
)
from paretomerge.systems.pareto_merging.manifest import BASE_FOLDER, Manifest

if TYPE_CHECKING:
    from paretomerge.systems.pareto_merging.training import TrainingSettings

WHOLE_BYTES = 64_000_000
"""The most bytes of an embedding's or a head's K deltas that are stored whole."""

_SHARD_BYTES = 1_000_000_000  # of factors that wait in memory for their file
_FLOAT32_BYTES = 4
_CENTRES = ("base", "mean")


@dataclass(frozen=True)
class _Targets:
    """What the closed form approximates.

    Attributes:
        paths: Source -> path, in the order of gamma.
        scale: lambda.
        centre: `base` or `mean`; see `Manifest.centre`.
        rank: The rank, or None.
        energy: The share of the energy to keep, or None.
    """

    paths: Mapping[str, str]
    scale: float
    centre: str
    rank: int | None
    energy: float | None

    def recipe(self, base: str, dtype: str | None) -> dict[str, Any]:
        """Task arithmetic with lambda: the target at equal shares of the preference."""
        models = [{"model": path} for path in self.paths.values()]
        recipe: dict[str, Any] = {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": models,
            "parameters": {"weight": self.scale},
        }
        if dtype is not None:
            recipe["dtype"] = dtype
        return recipe


def pareto_merge(  # noqa: PLR0913 - the options of a family, all with a default
    base: str,
    models: Sequence[str] | Mapping[str, str],
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    scale: float | None = None,
    centre: str = "mean",
    dtype: str | None = None,
    data: Mapping[str, str | Path] | None = None,
    training: "TrainingSettings | None" = None,
    overwrite: bool = False,
    device: str = "cpu",
    allow_mismatch: bool = False,
) -> ParetoFamily:
    """Make a family of models with a preference over the sources as input.

    The folder holds a checkpoint (`base`), the factors and a manifest, and needs no other file. It
    appears whole or not at all. Memory: K + 2 times the largest tensor in float32.

    Args:
        base: The base model theta_0.
        models: Two or more fine-tunes of it, or name -> fine-tune. Names are the last parts of the
            paths by default.
        out: A new folder.
        rank: The rank r of the factors.
        energy: In place of the rank: the share of the energy of its deltas to the centre that each
            matrix keeps.
        scale: lambda of the targets theta_0 + lambda K tau_k. By default 1 / K: then the whole
            preference for one source gives that source, and equal shares give the average.
        centre: What the factors are added to, at full rank without a difference: `base`, or `mean`
            for theta_0 + lambda sum_k tau_k, where equal shares lose nothing to the rank. Around
            the mean, rank 8 loses less than rank 16 around the base (docs/lab/pareto-merging.md).
        dtype: The dtype of the models; by default the base's.
        data: Source -> a file of unlabelled texts, to train the factors on; see `training`.
        training: How to train; see `TrainingSettings`.
        overwrite: Whether to replace a family or a checkpoint that is there.
        device: `cpu`, `cuda` or `cuda:N`.
        allow_mismatch: Whether to take models that do not seem to belong together.

    Returns:
        The family.

    Raises:
        ConfigError: If an argument has no meaning, or a file of texts is of no use.
        RecipeError, CheckpointError: If the models do not belong together or cannot be read, or the
            folder cannot be written.

    Example:
        >>> family = pareto_merge("base", ["math", "code"], "family", rank=16)  # doctest: +SKIP
        >>> family.write({"math": 0.7, "code": 0.3}, "merged")  # doctest: +SKIP
        PosixPath('merged')
    """
    from paretomerge.systems.pareto_merging.texts import read_all
    from paretomerge.systems.pareto_merging.training import TrainingSettings, train

    target = Path(read_path("out", out))
    base, paths = read_model("base", base), read_sources(models)
    targets = _checked_targets(paths, rank, energy, scale, centre)
    overwrite = flag("overwrite", overwrite)
    device = usable_device(device)
    training = optional(instance_of(TrainingSettings, "TrainingSettings(steps=400)"))(
        "training", training
    )
    if training is not None and data is None:
        raise ConfigError("training: needs `data`, a file of texts for every source")
    files = optional(mapping_of(read_path, '{"math": "math.jsonl"}'))("data", data)
    texts = None if files is None else read_all(files, tuple(paths))
    plan = make_plan(
        targets.recipe(base, dtype),
        allow_mismatch=flag("allow_mismatch", allow_mismatch),
    )
    models = (*plan.recipe.source_models, *plan.weights)
    check_out(target, models, overwrite)
    needed = plan.bytes_written() + _most_factor_bytes(plan, targets)
    with new_folder(target, overwrite, needed) as folder:
        _write_closed_form(plan, targets, folder, device)
        if texts is not None:
            family = ParetoFamily.load(folder)
            experts = [_Expert(plan, path) for path in paths.values()]
            settings = training or TrainingSettings()
            trained, report = train(family, experts, texts, settings, device)
            _replace_factors(family, trained, folder)
            family.manifest.trained(report).write(folder)
        Manifest.read(folder).with_digest(folder).write(folder)
        _write_readme(folder)
        for weights in plan.weights.values():
            weights.check_unchanged()
    return ParetoFamily.load(target)


def _checked_targets(
    paths: Mapping[str, str],
    rank: int | None,
    energy: float | None,
    scale: float | None,
    centre: str,
) -> _Targets:
    if len(paths) < 2:
        raise ConfigError(
            "models: a family needs two sources or more; a single fine-tune has no preference"
        )
    names: dict[str, str] = {}
    for name, path in paths.items():
        if path in names:
            raise ConfigError(
                f"models: {names[path]} and {name} are the same model, {path}; list it once"
            )
        names[path] = name
    if (rank is None) == (energy is None):
        raise ConfigError(
            "pareto-merge: set either a rank (--rank 16) or a share of the energy (--energy 0.9)"
        )
    if rank is not None:
        rank = integer(1)("rank", rank)
    if energy is not None:
        energy = number("energy", energy)
        if not 0 < energy <= 1:
            raise ConfigError(f"energy: must be above 0 and up to 1, not {energy:g}")
    # The default makes the corners of the simplex the sources themselves.
    scale = 1 / len(paths) if scale is None else number("scale", scale)
    if scale <= 0:
        raise ConfigError(f"scale: must be above 0, not {scale:g}")
    if centre not in _CENTRES:
        raise ConfigError(f"centre: use base or mean, not {centre!r}")
    return _Targets(paths, scale, centre, rank, energy)


def _most_factor_bytes(plan: Plan, targets: _Targets) -> int:
    """The most bytes that the factors can take; 0 where only an energy is given."""
    if targets.rank is None:
        return 0
    k = len(targets.paths)
    elements = 0
    for job in plan.jobs:
        rows, columns = matrix_shape(job.shape)
        a, b = min(rows, targets.rank), min(columns, targets.rank)
        factors = a * rows + b * columns + k * a * b
        elements += min(factors, k * rows * columns)
    return elements * _FLOAT32_BYTES


class _Expert:
    """The tensors of one source, by the names of the result."""

    def __init__(self, plan: Plan, path: str) -> None:
        self._plan = plan
        self._path = path
        self._jobs = {job.name: job for job in plan.jobs}

    def __call__(self, name: str) -> Tensor:
        """Read a tensor in float32."""
        job = self._jobs[name]
        operand = _operand_of(self._plan, job, self._path)
        assert operand is not None
        rows = matrix_shape(operand.shape)[0]
        return operand.rows(0, rows).reshape(job.shape)


def _operand_of(plan: Plan, job: TensorJob, model: str) -> Operand | None:
    """A model's tensor for a job; that of the base where the model is the base, or lacks it."""
    assert model in plan.weights, f"{model!r} is not a name of the plan"
    for ref in job.sources:
        if ref.model == model:
            return plan.operand(ref)
    return None if job.base is None else plan.operand(job.base)


# ----- the closed form


def _write_closed_form(
    plan: Plan, targets: _Targets, folder: Path, device: str
) -> None:
    """Write the base, the factors and the manifest into an empty folder."""
    base_folder = folder / BASE_FOLDER
    base_folder.mkdir()
    specs = [TensorSpec(job.name, job.dtype, job.shape) for job in plan.jobs]
    closed_form = _ClosedForm(plan, targets, _FactorWriter(folder), device)
    with WeightsWriter(base_folder, specs) as writer, torch.inference_mode():
        for job in plan.jobs:
            writer.write(job.name, 0, closed_form.add(job))
    closed_form.files.flush()
    if not closed_form.files.bytes:
        raise CheckpointError(
            "the models are equal to the base in every tensor; there is nothing to merge"
        )
    write_json(base_folder / "config.json", with_tagged_floats(plan.config))
    write_companions(plan, base_folder)
    closed_form.manifest().write(folder)


class _ClosedForm:
    """Goes through the tensors of a plan and sums up what the rank costs."""

    def __init__(
        self, plan: Plan, targets: _Targets, files: "_FactorWriter", device: str
    ) -> None:
        self.files = files
        self._plan = plan
        self._targets = targets
        self._device = device
        self._whole: list[str] = []
        self._ranks: dict[str, int] = {}
        k = len(targets.paths)
        self._energies = torch.zeros(k, dtype=torch.float64)
        self._lost = torch.zeros(k, dtype=torch.float64)

    def add(self, job: TensorJob) -> Tensor:
        """Store what varies in one tensor; return the constant part, in the job's dtype."""
        if job.copy:
            block = read_tensor(self._plan.operand(job.sources[0]))
            return cast_block(self._plan, job, block)
        assert job.base is not None
        rows, columns = matrix_shape(job.shape)
        base = self._plan.operand(job.base).rows(0, rows, self._device)
        k = len(self._targets.paths)
        deltas = torch.empty(k, rows, columns, device=self._device)
        for i, path in enumerate(self._targets.paths.values()):
            operand = _operand_of(self._plan, job, path)
            assert operand is not None
            deltas[i] = operand.rows(0, rows, self._device)
            deltas[i] -= base
        deltas *= self._targets.scale * k
        energy = energies(deltas).cpu()
        self._energies += energy
        if self._targets.centre == "mean":
            mean = deltas.mean(0)
            base += mean
            deltas -= mean
        stored = cast_block(self._plan, job, base)
        if float(energy.sum()) > 0:
            self._store(job, deltas, base - stored.view(base.shape))
        return stored

    def _store(self, job: TensorJob, deltas: Tensor, rounding: Tensor) -> None:
        """Store deltas; `rounding` is what the constant part loses to its dtype."""
        whole_bytes = deltas.numel() * _FLOAT32_BYTES
        if self._is_whole(job, whole_bytes):
            self._store_whole(job, deltas + rounding)
            return
        factors = factorise(deltas, self._targets.rank, self._targets.energy)
        # At a high rank the factors of a small matrix are larger than its deltas.
        if factors.elements() >= deltas.numel():
            self._store_whole(job, deltas + rounding)
            return
        # With orthonormal A and B: |D_k - A G_k B^T|^2 = |D_k|^2 - |G_k|^2.
        lost = energies(deltas) - energies(factors.cores)
        self._lost += lost.clamp(min=0).cpu()
        self._ranks[job.name] = max(factors.cores.shape[1:])
        self.files.add(job.name, factors)

    def _store_whole(self, job: TensorJob, deltas: Tensor) -> None:
        self._whole.append(job.name)
        self.files.add(job.name, deltas.reshape(-1, *job.shape))

    def _is_whole(self, job: TensorJob, whole_bytes: int) -> bool:
        if len(job.shape) < 2 or not math.prod(job.shape):
            return True
        architecture = self._plan.template.architecture
        is_per_token = architecture.vocabulary_axis(job.name, job.shape) is not None
        return is_per_token and whole_bytes <= WHOLE_BYTES

    def manifest(self) -> Manifest:
        """What the tensors added up to."""
        targets = self._targets
        kept: dict[str, float | None] = {}
        for i, name in enumerate(targets.paths):
            # A source that equals the base has no energy of which a share could be lost.
            energy = float(self._energies[i])
            kept[name] = 1 - float(self._lost[i]) / energy if energy > 0 else None
        of_path = licences_of(self._plan)
        return Manifest(
            sources=tuple(targets.paths),
            licences={name: of_path.get(path) for name, path in targets.paths.items()},
            scale=targets.scale,
            centre=targets.centre,
            rank=targets.rank,
            energy=targets.energy,
            whole=tuple(self._whole),
            ranks=self._ranks,
            kept=kept,
            kept_in_all=1 - float(self._lost.sum() / self._energies.sum()),
            base_bytes=self._plan.bytes_written(),
            factor_bytes=self.files.bytes,
            notes=plan_notes(self._plan),
        )


class _FactorWriter:
    """Writes factors into files of about a gigabyte.

    Attributes:
        bytes: Size of all tensors so far.
    """

    def __init__(self, folder: Path) -> None:
        self.bytes = 0
        self._folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._n_files = 0

    def add(self, name: str, update: Factors | Tensor) -> None:
        """Add the factors or the whole deltas of a tensor, in float32."""
        parts = {WHOLE: update} if isinstance(update, Tensor) else _parts(update)
        for part, tensor in parts.items():
            stored = tensor.to("cpu", torch.float32).contiguous()
            self._waiting[f"{name}/{part}"] = stored
            self._waiting_bytes += stored.numel() * _FLOAT32_BYTES
        if self._waiting_bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        from safetensors.torch import save_file

        self._n_files += 1
        file = self._folder / f"factors-{self._n_files:05d}.safetensors"
        save_file(self._waiting, file, metadata={"format": "pt"})
        self.bytes += self._waiting_bytes
        self._waiting = {}
        self._waiting_bytes = 0


def _parts(factors: Factors) -> dict[str, Tensor]:
    parts = (factors.a, factors.b, factors.cores)
    return dict(zip(PART_NAMES, parts, strict=True))


def _replace_factors(
    family: ParetoFamily, trained: Mapping[str, Factors], folder: Path
) -> None:
    """Write a family's factors anew, with those that were trained in place of the old ones."""
    old = {header.file for header in family.shards.headers.values()}
    files = _FactorWriter(folder / "trained")
    (folder / "trained").mkdir()
    for name in family.varying:
        if name in trained:
            files.add(name, trained[name])
        elif name in family.manifest.whole:
            files.add(name, family.part(name, WHOLE))
        else:
            files.add(name, family.factors(name))
    files.flush()
    for file in old:
        file.unlink()
    for file in sorted((folder / "trained").iterdir()):
        file.rename(folder / file.name)
    (folder / "trained").rmdir()


_README = """\
# A family of merges

Made by `paretomerge pareto-merge` (Pareto Merging, arXiv 2408.12105) from {sources}. It answers any
preference over them without a search:

    paretomerge pick {folder} --prefer {example} --out merged

`base` is a checkpoint; `factors-*.safetensors` hold what is added to it for a preference;
`pareto_family.json` says how they were made, and what share of the fine-tunes' deltas they keep.
A merge is bound by the licences of all its sources: {licences}.
"""


def _write_readme(folder: Path) -> None:
    manifest = Manifest.read(folder)
    stated = []
    for name, licence in manifest.licences.items():
        stated.append(f"{name} {licence or 'not stated'}")
    first, second = manifest.sources[:2]
    text = _README.format(
        sources=", ".join(manifest.sources),
        folder="THIS_FOLDER",
        example=f"{first}=0.7,{second}=0.3",
        licences=", ".join(stated),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
