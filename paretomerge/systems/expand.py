"""The models of the tasks of an EMR-merged checkpoint, computed from masks or written to disk.

Huang et al. 2024 (EMR-Merging), arXiv 2405.17461, section 3.2: theta_i = theta_0 + lambda_i M_i
tau_u. `emr` says what is stored.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paretomerge.arguments import flag, integer, label, model, optional
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header
from paretomerge.checkpoint.json_file import JsonObject
from paretomerge.checkpoint.operand import (
    FLOAT_DTYPES,
    Operand,
    StoredTensor,
    matrix_shape,
    read_tensor,
)
from paretomerge.checkpoint.reader import Checkpoint, Shards
from paretomerge.checkpoint.writer import (
    SHARD_BYTES,
    TensorSpec,
    WeightsWriter,
    check_out,
    check_replaceable,
    new_folder,
)
from paretomerge.errors import CheckpointError, ConfigError, unknown_name
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.one_layout import arrange_like
from paretomerge.merging.plan.plan import ModelConfig, Weights
from paretomerge.systems.emr_files import (
    BITS,
    EMR_FOLDER,
    EmrTask,
    digest_of,
    open_masks,
    read_manifest,
    row_blocks,
    write_rest,
)


@dataclass(frozen=True)
class EmrModel:
    """A unified checkpoint with its base, opened to be expanded.

    Attributes:
        folder: The unified checkpoint.
        unified: Its tensors.
        base: theta_0.
        tasks: Task -> its model, scale and density.
        masks: Task -> its masks.
    """

    folder: Path
    unified: Checkpoint
    base: Weights
    tasks: Mapping[str, EmrTask]
    masks: Mapping[str, Shards]

    @classmethod
    def open(cls, folder: str | Path, base: str | Path | None = None) -> "EmrModel":
        """Open a unified checkpoint, and check that it and its base are what they were.

        Both are read once for their checksums.

        Args:
            folder: What `emr` wrote.
            base: theta_0, if it is no longer where it was.

        Raises:
            CheckpointError: If the folder holds no masks, or a file is not the one it was.
        """
        path = Path(read_path("model", folder))
        manifest = read_manifest(path)
        base_name = model("base", manifest["base"] if base is None else base)
        unified = Checkpoint(str(path))
        (opened,) = open_weights((base_name,)).values()
        arranged = arrange_like(str(path), unified, base_name, opened)
        tasks, masks = {}, {}
        for task, entry in manifest["tasks"].items():
            tasks[task] = EmrTask(entry["model"], entry["lambda"], entry["density"])
            masks[task] = open_masks(path, entry, unified)
        checked = cls(path, unified, arranged, tasks, masks)
        checked._check_digests(base_name, manifest["tensors"])
        return checked

    def _check_digests(self, base_name: str, tensors: Mapping[str, JsonObject]) -> None:
        for name, header in self.unified.headers.items():
            if header.dtype not in FLOAT_DTYPES:
                continue
            digests = tensors.get(name, {})
            if digest_of(self.unified.operand(name)) != digests.get("unified"):
                raise CheckpointError(
                    f"{self.folder}: {name}: has changed since the masks were made; run "
                    "`paretomerge emr` again"
                )
            found = self.base.architecture.find_equivalent(name)
            if not found or digest_of(self.base.operand(found)) != digests.get("base"):
                raise CheckpointError(
                    f"{base_name}: {name}: is not that of the base which {self.folder} was made "
                    "from; name that base with --base (in Python: base=...)"
                )

    def weights(self, task: str) -> "ExpandedWeights":
        """Return the model of one task, whose tensors are computed when they are read.

        Args:
            task: Name of the task.

        Raises:
            ConfigError: If there is no such task.
        """
        if task not in self.tasks:
            message = unknown_name("task", task, self.tasks)
            raise ConfigError(f"{self.folder}: {message}")
        return ExpandedWeights(self, task)

    def tensors(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """Compute the tensors of one task, for a model in memory.

        Args:
            task: Name of the task.

        Yields:
            (name, tensor in the unified checkpoint's dtype).
        """
        weights = self.weights(task)
        for name, header in weights.headers.items():
            tensor = read_tensor(weights.operand(name))
            yield name, tensor.to(getattr(torch, header.dtype))


class ExpandedWeights:
    """The model of one task as opened weights (`Weights`): theta_0 + lambda M tau_u.

    Recipes and plans read it like a checkpoint, without a file on disk.

    Args:
        emr_model: The unified checkpoint.
        task: One of its tasks.
    """

    def __init__(self, emr_model: EmrModel, task: str) -> None:
        self.emr = emr_model
        self.task = task
        self.folder = emr_model.folder
        # Its weights are in no file: they are computed from three.
        self.weight_folders: tuple[Path, ...] = ()
        self.tokenizer_folder = emr_model.folder
        self.config: ModelConfig = emr_model.unified.config
        self.headers: Mapping[str, Header] = emr_model.unified.headers
        self.dtype = emr_model.unified.dtype

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of the unified checkpoint."""
        return self.emr.unified.architecture

    def operand(self, name: str) -> Operand:
        """Return a tensor of the task's model."""
        unified = self.emr.unified.operand(name)
        masks = self.emr.masks[self.task]
        if name not in masks.headers:
            return unified
        found = self.emr.base.architecture.find_equivalent(name)
        assert found is not None
        return ExpandedTensor(
            unified=unified,
            base=self.emr.base.operand(found),
            mask=masks.stored(name),
            scale=self.emr.tasks[self.task].scale,
        )

    def check_unchanged(self) -> None:
        """Raise CheckpointError if files changed since they were opened."""
        self.emr.unified.check_unchanged()
        self.emr.base.check_unchanged()
        self.emr.masks[self.task].check_unchanged()


@dataclass(frozen=True)
class ExpandedTensor:
    """One tensor of a task's model.

    Attributes:
        unified: theta_0 + tau_u.
        base: theta_0.
        mask: The bits of M, packed.
        scale: lambda.
    """

    unified: Operand
    base: Operand
    mask: StoredTensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.unified.shape

    @property
    def dtype(self) -> str:
        """Dtype of the unified tensor."""
        return self.unified.dtype

    def rows(self, first: int, end: int, device: str = "cpu") -> Tensor:
        """Compute rows [first, end) in float32; see `Operand.rows`."""
        columns = matrix_shape(self.shape)[1]
        mask = self._bits(first * columns, end * columns)
        base = self.base.rows(first, end, device)
        delta = self.unified.rows(first, end, device).sub_(base)
        delta.mul_(self.scale)
        # Not a product with the mask, which would make -0 of a weight.
        is_kept = mask.view(end - first, columns).to(device)
        return torch.where(is_kept, base + delta, base)

    def _bits(self, start: int, end: int) -> Tensor:
        """The mask of elements [start, end) of the flat tensor."""
        first = start // BITS
        packed = self.mask.part(first, math.ceil(end / BITS)).numpy()
        bits = np.unpackbits(packed, bitorder="little")
        inside = bits[start - first * BITS : end - first * BITS]
        return torch.from_numpy(inside.astype(bool))


def expand(
    folder: str | Path,
    task: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the plain checkpoint of one task: theta_0 + lambda M tau_u.

    Args:
        folder: A unified checkpoint, as `emr` writes it.
        task: One of its tasks.
        out: The folder to create.
        base: theta_0, if it is no longer where it was.
        overwrite: Whether to replace `out` if it holds a checkpoint.
        shard_bytes: The size of the largest file of weights.

    Returns:
        The folder.

    Raises:
        CheckpointError: If a model cannot be read or is not what it was, or `out` cannot be
            written.
        ConfigError: If there is no such task.
    """
    path = Path(read_path("out", out))
    overwrite = flag("overwrite", overwrite)
    shard_bytes = integer(1)("shard_bytes", shard_bytes)
    source = Path(read_path("model", folder))
    base_name = optional(model)("base", base)
    # The masks are a folder with safetensors files, which looks like a checkpoint.
    parts = [str(source), str(source / EMR_FOLDER)]
    if base_name is not None:
        parts.append(base_name)
    check_out(path, parts, overwrite)
    weights = EmrModel.open(source, base_name).weights(label("task", task))
    specs = []
    for name, header in weights.headers.items():
        specs.append(TensorSpec(name, header.dtype, header.shape))
    with new_folder(path, overwrite, sum(spec.bytes for spec in specs)) as temporary:
        with WeightsWriter(temporary, specs, shard_bytes) as writer:
            for spec in specs:
                _write_tensor(weights.operand(spec.name), spec, writer)
        weights.check_unchanged()
        write_rest(weights, weights.dtype, temporary)
        if overwrite:
            check_replaceable(path)
    return path


def _write_tensor(operand: Operand, spec: TensorSpec, writer: WeightsWriter) -> None:
    if spec.dtype not in FLOAT_DTYPES:
        writer.write(spec.name, 0, read_tensor(operand))
        return
    columns = matrix_shape(spec.shape)[1]
    for first, end in row_blocks(spec.shape):
        block = operand.rows(first, end).to(getattr(torch, spec.dtype))
        if not block.isfinite().all():
            raise CheckpointError(
                f"{spec.name}: the weights of the task are too large for {spec.dtype}; run "
                "`paretomerge emr` with --dtype float32"
            )
        writer.write(spec.name, first * columns, block)
