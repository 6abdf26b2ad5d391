"""EMR-Merging: one checkpoint, with a mask of one bit per parameter and a number for each task.

Huang et al. 2024 (EMR-Merging: tuning-free high-performance model merging), arXiv 2405.17461,
section 3.2. With tau_i = theta_i - theta_0, entry by entry:

    elect    s = 1 where the mean of the tau_i is positive, else -1
             tau_u = s max |tau_i|, over the tasks whose tau_i has the sign s
    mask     M_i = 1 where tau_i s > 0, else 0
    rescale  lambda_i = sum mean |tau_i| / sum mean |M_i tau_u|, means of tensors, sums over tensors
    theta_i  = theta_0 + lambda_i M_i tau_u

lambda is that of the authors' program, in which every tensor counts alike.

theta_0 + tau_u has in each entry the weight of one of the models, or that of the base where none
differs from it. So a checkpoint in the models' own dtype holds it exactly, and tau_u is found again
without loss as its difference to the base. The base itself is not stored: its name is, and a
SHA-256 of each of its tensors.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paretomerge.arguments import flag, integer, mapping_of, model
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.json_file import JsonObject, write_json
from paretomerge.checkpoint.operand import (
    FLOAT_DTYPES,
    Operand,
    matrix_shape,
    read_tensor,
)
from paretomerge.checkpoint.reference import canonical_name
from paretomerge.checkpoint.writer import (
    SHARD_BYTES,
    TensorSpec,
    WeightsWriter,
    check_out,
    check_replaceable,
    new_folder,
)
from paretomerge.errors import CheckpointError, ConfigError, ErrorCollector
from paretomerge.merging.card import licence
from paretomerge.merging.engine import single_threaded
from paretomerge.merging.plan.belonging import ONE_VOCABULARY, find_mismatch
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.one_layout import arrange_like
from paretomerge.merging.plan.plan import Weights
from paretomerge.systems.emr_files import (
    BITS,
    EMR_FOLDER,
    FORMAT,
    MANIFEST,
    EmrTask,
    bytes_of,
    row_blocks,
    write_rest,
)
from paretomerge.systems.emr_vote import Totals, elect
from paretomerge.systems.notes import chat_template_notes
from paretomerge.systems.task_models import NO_TASK_NAME, is_task_name

_THREADS = 2  # more wait for Python's lock


@dataclass(frozen=True)
class EmrSummary:
    """What `emr` wrote.

    Attributes:
        folder: The unified checkpoint.
        tasks: Task -> its model, scale and density.
        unified_bytes: Size of the unified checkpoint's tensors.
        mask_bytes: Size of all masks.
        model_bytes: Size of the tensors of all models that it replaces.
        notes: What the user should know, such as where the models' configs differ.
    """

    folder: Path
    tasks: Mapping[str, EmrTask]
    unified_bytes: int
    mask_bytes: int
    model_bytes: int
    notes: tuple[str, ...] = ()


def emr(
    base: str | Path,
    models: Mapping[str, str | Path],
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    allow_mismatch: bool = False,
) -> EmrSummary:
    """Write several fine-tunes as one unified checkpoint with a mask and a scale for each task.

    Tensors are read block by block, each model once. Memory: some megabytes per model.

    Args:
        base: theta_0: a folder or Hub name, also `model+adapter`.
        models: Task -> theta_i, likewise. An adapter's sum is rounded to the unified dtype.
        out: The folder to create: a checkpoint of theta_0 + tau_u, with the masks in `emr/`.
        dtype: Of the unified checkpoint; by default the widest of the base and the models, which
            loses nothing. `float32` keeps adapters unrounded.
        overwrite: Whether to replace `out` if it holds a checkpoint.
        shard_bytes: The size of the largest file of weights.
        allow_mismatch: Whether to go on if the models do not seem to belong together.

    Returns:
        Sizes, scales and densities.

    Raises:
        CheckpointError: If a model cannot be read, does not fit the base or equals it, or `out`
            cannot be written.
        ConfigError: If an argument is wrong.

    Example:
        >>> emr("./base", {"math": "./math", "code": "./code"}, "unified")  # doctest: +SKIP
        >>> expand("unified", "math", "math-again")  # doctest: +SKIP
    """
    base = model("base", base)
    sources = mapping_of(model, '{"math": "./math"}')("models", models)
    folder = Path(read_path("out", out))
    overwrite = flag("overwrite", overwrite)
    shard_bytes = integer(1)("shard_bytes", shard_bytes)
    if not sources:
        raise ConfigError("emr: name at least one model besides the base")
    _check_tasks(sources)
    check_out(folder, (base, *sources.values()), overwrite)
    inputs = _Inputs.open(base, sources, dtype, flag("allow_mismatch", allow_mismatch))
    needed = sum(spec.bytes for spec in inputs.specs)
    needed += len(sources) * sum(spec.bytes for spec in inputs.mask_specs)
    with new_folder(folder, overwrite, needed) as temporary:
        result = _write_unified(inputs, temporary, shard_bytes)
        inputs.check_unchanged()
        if overwrite:
            check_replaceable(folder)
    return EmrSummary(
        folder=folder,
        tasks=result,
        unified_bytes=sum(spec.bytes for spec in inputs.specs),
        mask_bytes=len(sources) * sum(spec.bytes for spec in inputs.mask_specs),
        model_bytes=inputs.model_bytes,
        notes=inputs.notes,
    )


def _check_tasks(sources: Mapping[str, str]) -> None:
    """Check the names of the tasks, which become names of files, and their models."""
    known: dict[str, str] = {}
    for task, name in sources.items():
        if not is_task_name(task):
            raise ConfigError(f"models: {task!r} {NO_TASK_NAME}")
        first = known.setdefault(name, task)
        if first != task:
            raise ConfigError(
                f"models: {first} and {task} are the same model, {name}; list it once"
            )


@dataclass(frozen=True)
class _Inputs:
    """The base and the models, opened and compared.

    Attributes:
        base_name: The base.
        base: Its tensors.
        models: Task -> model.
        operands: Tensor of the base -> (its operand, those of the models).
        specs: The tensors of the unified checkpoint.
        opened: All opened models.
        notes: Where the tasks' models follow the base and not their fine-tunes.
    """

    base_name: str
    base: Weights
    models: Mapping[str, str]
    operands: Mapping[str, tuple[Operand, Sequence[Operand]]]
    specs: tuple[TensorSpec, ...]
    opened: Mapping[str, Weights]
    notes: tuple[str, ...]

    @classmethod
    def open(
        cls,
        base_name: str,
        models: Mapping[str, str],
        dtype: str | None,
        allow_mismatch: bool,
    ) -> "_Inputs":
        """Open the models and check that each has the tensors of the base.

        Raises:
            CheckpointError: If one does not fit. One error reports all of them.
        """
        opened = open_weights((base_name, *models.values()))
        base = opened[base_name]
        arranged = {}
        notes: list[str] = []
        problems = ErrorCollector()
        for name in models.values():
            with problems.collect():
                weights = opened[name]
                mismatch = find_mismatch(base_name, base, name, weights)
                if not allow_mismatch:
                    mismatch.raise_if_any()
                notes += [*mismatch.notes, *mismatch.errors]
                weights = arrange_like(base_name, base, name, weights)
                _check_covered(base_name, base, name, weights)
                arranged[name] = weights
        problems.raise_if_any()
        notes += chat_template_notes(base_name, base, arranged)
        operands: dict[str, tuple[Operand, Sequence[Operand]]] = {}
        specs = []
        for name in sorted(base.headers):
            parts = []
            for weights in arranged.values():
                found = weights.architecture.find_equivalent(name)
                # What a model computes without stays as it is in the base.
                parts.append(weights.operand(found) if found else base.operand(name))
            operand = base.operand(name)
            operands[name] = (operand, parts)
            unified_dtype = _unified_dtype(name, (operand, *parts), dtype)
            specs.append(TensorSpec(name, unified_dtype, operand.shape))
        return cls(
            base_name, base, models, operands, tuple(specs), opened, tuple(notes)
        )

    @property
    def mask_specs(self) -> list[TensorSpec]:
        """The tensors of each file of masks: the bits of a flat tensor, the first one lowest."""
        specs = []
        for spec in self.specs:
            if spec.dtype in FLOAT_DTYPES:
                n_bytes = math.ceil(math.prod(spec.shape) / BITS)
                specs.append(TensorSpec(spec.name, "uint8", (n_bytes,)))
        return specs

    @property
    def model_bytes(self) -> int:
        """Size of all models."""
        total = 0
        for name in self.models.values():
            total += sum(header.bytes for header in self.opened[name].headers.values())
        return total

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file changed while it was read."""
        for weights in self.opened.values():
            weights.check_unchanged()


def _check_covered(base_name: str, base: Weights, name: str, weights: Weights) -> None:
    """Check that a model has the tensors of the base, in their shapes, and no others."""
    depth, base_depth = weights.architecture.depth, base.architecture.depth
    if depth != base_depth:
        raise CheckpointError(
            f"{name}: has {depth} layers, but {base_name} has {base_depth}"
        )
    matched = set()
    for tensor, header in base.headers.items():
        found = weights.architecture.find_equivalent(tensor)
        if found is None and base.architecture.is_auxiliary(tensor):
            continue
        if found is None:
            raise CheckpointError(f"{name}: lacks {tensor}, which {base_name} has")
        shape = weights.headers[found].shape
        if shape != header.shape:
            is_per_token = base.architecture.vocabulary_axis(tensor, header.shape)
            cure = "do they come from one base?"
            if is_per_token is not None:
                cure = f"they have other vocabularies: {ONE_VOCABULARY}"
            raise CheckpointError(
                f"{name}: {tensor}: has shape {list(shape)}, but {list(header.shape)} in "
                f"{base_name}; {cure}"
            )
        matched.add(found)
    for tensor in weights.headers:
        if tensor in matched or base.architecture.is_auxiliary(tensor):
            continue
        # A head that is stored although it is tied says nothing new.
        twin = base.architecture.find_equivalent(tensor)
        own_twin = twin and weights.architecture.find_equivalent(twin)
        if own_twin and _is_equal(weights.operand(tensor), weights.operand(own_twin)):
            continue
        raise CheckpointError(
            f"{name}: has {tensor}, which {base_name} lacks or ties; give the base a tensor of its "
            "own there (tie_word_embeddings: false) or leave the model out"
        )


def _is_equal(one: Operand, other: Operand) -> bool:
    if one.shape != other.shape:
        return False
    for first, end in row_blocks(one.shape):
        if not one.rows(first, end).equal(other.rows(first, end)):
            return False
    return True


def _unified_dtype(name: str, operands: Sequence[Operand], wanted: str | None) -> str:
    """The dtype that holds the weights of all models exactly."""
    dtypes = {operand.dtype for operand in operands}
    if not dtypes <= set(FLOAT_DTYPES):
        for operand in operands[1:]:
            if not read_tensor(operand).equal(read_tensor(operands[0])):
                raise CheckpointError(
                    f"{name}: is of whole numbers, which EMR cannot merge, and differs among the "
                    "models"
                )
        return operands[0].dtype
    widest = torch.float16 if dtypes == {"float16"} else torch.bfloat16
    if dtypes - {"bfloat16"} and dtypes != {"float16"}:
        # All arithmetic is in float32, so float64 is no wider.
        widest = torch.float32
    if wanted is None:
        return str(widest).removeprefix("torch.")
    chosen = getattr(torch, wanted) if wanted in FLOAT_DTYPES else None
    if chosen is None or torch.promote_types(widest, chosen) != chosen:
        raise ConfigError(
            f"dtype: {wanted} cannot hold the weights of all models exactly; "
            f"leave it out or set float32"
        )
    return wanted


def _write_unified(
    inputs: _Inputs, folder: Path, shard_bytes: int
) -> dict[str, EmrTask]:
    """Write all files; returns the tasks."""
    masks_folder = folder / EMR_FOLDER
    masks_folder.mkdir()
    totals = [Totals() for _ in inputs.models]
    digests: dict[str, JsonObject] = {}
    with ExitStack() as stack:
        writer = stack.enter_context(WeightsWriter(folder, inputs.specs, shard_bytes))
        mask_writers = []
        for task in inputs.models:
            file = f"{task}.safetensors"
            mask_writer = WeightsWriter(masks_folder, inputs.mask_specs, file=file)
            mask_writers.append(stack.enter_context(mask_writer))
        writers = (writer, mask_writers)
        for name, part in _unify_all(inputs, writers):
            digests[name] = part.digests
            for total, addition in zip(totals, part.totals, strict=True):
                total.add(addition)
        checksums: dict[str, str] = {}
        for mask_writer in mask_writers:
            checksums |= mask_writer.checksums()
    tasks = {}
    entries = {}
    for (task, name), total in zip(inputs.models.items(), totals, strict=True):
        tasks[task] = EmrTask(name, total.scale(name), total.density)
        masks = masks_folder / f"{task}.safetensors"
        entries[task] = {
            "model": canonical_name(name),
            "lambda": tasks[task].scale,
            "density": total.density,
            "masks": masks.name,
            "sha256": checksums[masks.name],
        }
    manifest = {
        "format": FORMAT,
        "base": canonical_name(inputs.base_name),
        "tasks": entries,
        "tensors": digests,
    }
    write_json(masks_folder / MANIFEST, manifest)
    dtypes = [spec.dtype for spec in inputs.specs if spec.dtype in FLOAT_DTYPES]
    write_rest(inputs.base, max(sorted(set(dtypes)), key=dtypes.count), folder)
    (folder / "README.md").write_text(_card(inputs, tasks), encoding="utf-8")
    return tasks


class _UnifiedTensor(NamedTuple):
    """What writing one tensor has shown.

    Attributes:
        digests: SHA-256 of the base's tensor and of the unified one.
        totals: The sums of each task, over this tensor alone.
    """

    digests: JsonObject
    totals: list[Totals]


_Writers = tuple[WeightsWriter, Sequence[WeightsWriter]]
"""Of the unified checkpoint, and of each task's masks."""


def _unify_all(
    inputs: _Inputs, writers: _Writers
) -> Iterator[tuple[str, _UnifiedTensor]]:
    """Write all tensors; yields those of floats, in the order of their names."""
    specs = []
    for spec in inputs.specs:
        if spec.dtype in FLOAT_DTYPES:
            specs.append(spec)
        else:
            tensor = read_tensor(inputs.operands[spec.name][0])
            writers[0].write(spec.name, 0, tensor)
    # Parallel over tensors, and each with one thread: sums never depend on a number of threads.
    with (
        single_threaded() as threads,
        ThreadPoolExecutor(min(threads, _THREADS), thread_name_prefix="emr") as pool,
    ):
        results = pool.map(partial(_unify, inputs, writers), specs)
        for spec, result in zip(specs, results, strict=True):
            yield spec.name, result


@torch.inference_mode()
def _unify(inputs: _Inputs, writers: _Writers, spec: TensorSpec) -> _UnifiedTensor:
    """Write one tensor and its masks, block by block."""
    base, sources = inputs.operands[spec.name]
    dtype = getattr(torch, spec.dtype)
    columns = matrix_shape(spec.shape)[1]
    n = math.prod(spec.shape)
    base_digest, unified_digest = hashlib.sha256(), hashlib.sha256()
    totals = [Totals() for _ in sources]
    writer, mask_writers = writers
    for first, end in row_blocks(spec.shape):
        base_rows = base.rows(first, end)
        rows = []
        for source in sources:
            # A model with an adapter is what its checkpoint in this dtype would be.
            rounded = source.rows(first, end).to(dtype)
            rows.append(rounded.float())
        elected = elect(base_rows, rows)
        writer.write(spec.name, first * columns, elected.unified.to(dtype))
        for index, votes in enumerate(elected.votes):
            mask = votes > 0
            # Blocks have a multiple of 8 elements, except for the last one.
            start = first * columns // BITS
            mask_writers[index].write(spec.name, start, _packed(mask))
            kept = elected.size * mask
            addition = Totals(
                of_delta=votes.abs_().sum().item() / n,
                of_masked=kept.sum().item() / n,
                n_masked=int(mask.count_nonzero()),
                n_parameters=mask.numel(),
            )
            totals[index].add(addition)
        base_digest.update(bytes_of(base_rows))
        unified_digest.update(bytes_of(elected.unified))
    digests = {"base": base_digest.hexdigest(), "unified": unified_digest.hexdigest()}
    return _UnifiedTensor(digests, totals)


def _packed(mask: Tensor) -> Tensor:
    bits = np.packbits(mask.reshape(-1).numpy(), bitorder="little")
    return torch.from_numpy(bits)


_CARD = """\
---
library_name: transformers
tags: [merge, paretomerge]
---
# Unified checkpoint of EMR-Merging

Several fine-tunes in one (Huang et al. 2024, arXiv 2405.17461). These weights are the unified
model; `emr/` holds a mask and a scale for each task. `paretomerge expand . --task TASK OUT` writes
the checkpoint of one task, and needs the base {base}.

| task | model | licence | lambda | parameters of its mask |
|---|---|---|---:|---:|
{rows}

The result is bound by the licences of all its sources.
"""


def _card(inputs: _Inputs, tasks: Mapping[str, EmrTask]) -> str:
    rows = []
    for task, entry in tasks.items():
        stated = licence(inputs.opened[entry.model].folder) or "not stated"
        shown = Path(entry.model).name if Path(entry.model).exists() else entry.model
        rows.append(
            f"| {task} | {shown} | {stated} | {entry.scale:.3f} | {entry.density:.0%} |"
        )
    name = inputs.base_name
    base = Path(name).name if Path(name).exists() else name
    return _CARD.format(base=f"`{base}`", rows="\n".join(rows))
