"""A merge as a LoRA adapter of its base, in peft's format.

Of each matrix the change is factored by its singular values: merged - base = U S V^T is cut to
B = U S^1/2 and A = S^1/2 V^T (Hu et al. 2021, arXiv 2106.09685, section 4.1; the cut is the best
of its rank by Eckart and Young 1936). What is no matrix is stored whole where peft can hold it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor

from paretomerge.arguments import flag, integer, model, number, optional
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.adapter import ADAPTER_WEIGHTS_FILE
from paretomerge.checkpoint.companions import copy_files, tokenizer_files
from paretomerge.checkpoint.json_file import write_json
from paretomerge.checkpoint.operand import (
    FLOAT_DTYPES,
    Operand,
    StoredTensor,
    matrix_shape,
)
from paretomerge.checkpoint.reader import ADAPTER_CONFIG_FILE
from paretomerge.checkpoint.reference import Reference
from paretomerge.checkpoint.writer import (
    TensorSpec,
    WeightsWriter,
    check_out,
    check_replaceable,
    new_folder,
)
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.block import CPU_BLOCK
from paretomerge.merging.engine import usable_device
from paretomerge.merging.plan.belonging import find_mismatch
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.one_layout import arrange_like
from paretomerge.merging.plan.plan import Weights
from paretomerge.systems.factors import Cut, Factors, factor_change
from paretomerge.systems.loaded_model import LoadedModel
from paretomerge.systems.peft_places import AdapterLayout, Kind, find_kind

_NAMES_IN_MESSAGE = 5


@dataclass(frozen=True)
class ExtractedAdapter:
    """What became of a merge in an adapter.

    Attributes:
        folder: The adapter.
        bytes: Size of its tensors.
        merged_bytes: Size of the tensors of the merge.
        ranks: Parameter with factors -> its rank.
        energy: Parameter with factors -> the share of its energy that they keep.
        kept_energy: The share of the energy of all these parameters together.
        whole: Parameters that are stored whole.
        lost: Parameters whose change is not stored -> why.
        notes: What to mind with the adapter.
    """

    folder: Path
    bytes: int
    merged_bytes: int
    ranks: Mapping[str, int]
    energy: Mapping[str, float]
    kept_energy: float
    whole: tuple[str, ...]
    lost: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def mean_rank(self) -> float:
        """The mean rank of the factors."""
        return sum(self.ranks.values()) / len(self.ranks)


def extract_lora(  # noqa: PLR0913 - options, all with a default
    merged: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    drop_others: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    allow_mismatch: bool = False,
) -> ExtractedAdapter:
    """Write what a merge adds to its base as a LoRA adapter in peft's format.

    Matrices are read one at a time. Memory: a few times the largest one in float32.

    Args:
        merged: A checkpoint: a folder or Hub name, also `model+adapter`.
        base: The model that the adapter is for: a folder or Hub name.
        out: The folder to create.
        rank: The largest rank of each matrix.
        energy: Or the share of the energy (squared Frobenius norm) to keep of each matrix.
        dtype: Of the factors; by default that of the base: rounding them costs less than what the
            weights of a merge in that dtype are rounded by themselves.
        drop_others: Whether to leave out changes that an adapter cannot hold, instead of refusing.
        overwrite: Whether to replace `out` if it holds an adapter or checkpoint.
        device: Where to compute singular values: `cpu`, `cuda` or `cuda:N`.
        allow_mismatch: Whether to go on if the models do not seem to belong together.

    Returns:
        What was kept, and what was lost.

    Raises:
        CheckpointError: If a model cannot be read, the models do not fit together, something that
            changed cannot be stored, or `out` cannot be written.
        ConfigError: If an argument is wrong.
    """
    cut = Cut(
        optional(integer(1))("rank", rank),
        optional(number)("energy", energy),
    )
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype: must be one of {', '.join(FLOAT_DTYPES)}")
    folder = Path(read_path("out", out))
    overwrite = flag("overwrite", overwrite)
    merged, base = model("merged", merged), model("base", base)
    device = usable_device(device)
    check_out(folder, (merged, base), overwrite)
    pair = _open_pair(merged, base, flag("allow_mismatch", allow_mismatch))
    lost = pair.lost()
    if lost and not flag("drop_others", drop_others):
        raise _lost_error(pair.merged_name, lost)
    with (
        new_folder(folder, overwrite) as temporary,
        TemporaryFile(dir=temporary) as file,
    ):
        factored = _factor_all(pair, cut, dtype or pair.base_dtype, device, file)
        n_bytes = _write(pair, factored, temporary)
        _copy_new_tokenizer(pair, temporary)
        pair.check_unchanged()
        if overwrite:
            check_replaceable(folder)
    kept = sum(factored.kept.values())
    total = sum(factored.total.values())
    energies = {}
    for name, part in factored.kept.items():
        energies[name] = part / factored.total[name]
    return ExtractedAdapter(
        folder=folder,
        bytes=n_bytes,
        merged_bytes=pair.merged_bytes,
        ranks=factored.layout.ranks,
        energy=energies,
        kept_energy=kept / total,
        whole=tuple(pair.whole(factored.layout)),
        lost=lost,
        notes=(*pair.notes, *pair.tie_notes(factored.layout)),
    )


@dataclass(frozen=True)
class _Pair:
    """A merge and its base, tensor by tensor, under the names in memory.

    Attributes:
        merged_name: The merge, for messages.
        base_name: The base.
        merged: The merge.
        base: The base.
        weights: The opened files of both.
        base_dtype: The dtype of the base.
        merged_bytes: Size of the merge.
        notes: Where the adapter follows the config of the base.
    """

    merged_name: str
    base_name: str
    merged: LoadedModel
    base: LoadedModel
    weights: tuple[Weights, Weights]
    base_dtype: str
    merged_bytes: int
    notes: tuple[str, ...]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if files changed while they were read."""
        for weights in self.weights:
            weights.check_unchanged()

    def kinds(self) -> Iterator[tuple[str, Kind]]:
        """The parameters that both models have, and how an adapter holds their changes."""
        for name in self.base.names.state:
            if name in self.base.operands and name in self.merged.operands:
                yield name, find_kind(self.base.names, name)

    def lost(self) -> dict[str, str]:
        """Tensors whose change an adapter cannot hold -> why."""
        lost = {}
        for name in self.base.names.state:
            in_base = name in self.base.operands
            in_merged = name in self.merged.operands
            if in_base and not in_merged:
                lost[name] = "the merge lacks it"
            elif in_merged and not in_base:
                lost[name] = "the base lacks it"
        for name in self.merged.unused:
            lost[name] = "transformers does not load it"
        for name, kind in self.kinds():
            if kind is Kind.NONE and self.differs(name):
                lost[name] = "peft cannot adapt this parameter"
        return lost

    def changed_whole(self) -> list[str]:
        """Parameters that changed and are stored whole."""
        changed = []
        for name, kind in self.kinds():
            if kind in (Kind.SAVED, Kind.BIAS) and self.differs(name):
                changed.append(name)
        return changed

    def whole(self, layout: AdapterLayout) -> list[str]:
        """Parameters that an adapter stores whole."""
        return [name for name in layout.kinds if name not in layout.ranks]

    def tie_notes(self, layout: AdapterLayout) -> tuple[str, ...]:
        """What to mind where tied tensors have factors."""
        if not any(name in layout.ranks for name in self.base.names.tied):
            return ()
        return (
            "the base ties its embeddings: peft loads the adapter rightly, but its "
            "merge_and_unload would add the change of tied tensors twice; merge the adapter with "
            "`paretomerge merge` instead",
        )

    def differs(self, name: str) -> bool:
        """Whether a tensor has other values in the merge than in the base."""
        base, merged = self.base.operands[name], self.merged.operands[name]
        for first, end in _row_blocks(base.shape):
            if not base.rows(first, end).equal(merged.rows(first, end)):
                return True
        return False


def _open_pair(merged: str, base: str, allow_mismatch: bool) -> _Pair:
    if Reference.parse(base).adapter is not None:
        raise CheckpointError(
            f"{base}: an adapter is for a plain checkpoint; write this base as one with "
            "`paretomerge merge` first"
        )
    opened = open_weights((base, merged))
    base_weights = opened[base]
    merged_weights = arrange_like(base, base_weights, merged, opened[merged])
    mismatch = find_mismatch(base, base_weights, merged, opened[merged])
    if not allow_mismatch:
        mismatch.raise_if_any()
    pair = _Pair(
        merged_name=merged,
        base_name=base,
        merged=LoadedModel.of(merged, merged_weights, like=base_weights),
        base=LoadedModel.of(base, base_weights),
        weights=(base_weights, opened[merged]),
        base_dtype=base_weights.dtype,
        merged_bytes=sum(header.bytes for header in opened[merged].headers.values()),
        notes=mismatch.notes,
    )
    for name, _ in pair.kinds():
        shape = pair.base.operands[name].shape
        merged_shape = pair.merged.operands[name].shape
        if shape != merged_shape:
            raise CheckpointError(
                f"{merged}: {name}: has shape {list(merged_shape)}, but {list(shape)} in {base}; "
                "an adapter changes no shapes, so resize the base first (resize_token_embeddings "
                "for another vocabulary) and extract against that"
            )
    return pair


def _lost_error(merged: str, lost: Mapping[str, str]) -> CheckpointError:
    named = [f"{name} ({why})" for name, why in lost.items()]
    listed = ", ".join(named[:_NAMES_IN_MESSAGE])
    if len(named) > _NAMES_IN_MESSAGE:
        listed += f" and {len(named) - _NAMES_IN_MESSAGE} more"
    return CheckpointError(
        f"{merged}: an adapter cannot hold what changed in {listed}; --drop-others leaves it out "
        "(in Python: drop_others=True)"
    )


class _Factored:
    """The factors of all matrices, in a temporary file until their sizes are known.

    Args:
        layout: What the adapter holds.
        dtype: The dtype of the factors.
        file: The temporary file, empty.

    Attributes:
        layout: What the adapter holds.
        factors: Parameter -> its factors A and B.
        kept: Parameter -> energy that its factors keep.
        total: Parameter -> its energy.
    """

    def __init__(self, layout: AdapterLayout, dtype: str, file: IO[bytes]) -> None:
        self.layout = layout
        self.factors: dict[str, tuple[StoredTensor, StoredTensor]] = {}
        self.kept: dict[str, float] = {}
        self.total: dict[str, float] = {}
        self._dtype = dtype
        self._file = file
        self._end = 0

    def add(self, parameter: str, kind: Kind, factors: "Factors") -> None:
        """Store the factors of a parameter."""
        self.layout.add_factors(parameter, kind, factors.rank)
        stored = []
        for factor in (factors.a, factors.b):
            stored.append(self._store(parameter, factor))
        self.factors[parameter] = (stored[0], stored[1])
        self.kept[parameter] = factors.kept
        self.total[parameter] = factors.total

    def _store(self, parameter: str, factor: Tensor) -> StoredTensor:
        rounded = factor.to("cpu", getattr(torch, self._dtype)).contiguous()
        if not rounded.isfinite().all():
            raise CheckpointError(
                f"{parameter}: its factors are too large for {self._dtype}; set --dtype float32"
            )
        raw = rounded.view(-1).view(torch.uint8).numpy()
        self._file.write(memoryview(raw))
        stored = StoredTensor(
            descriptor=self._file.fileno,
            offset=self._end,
            shape=tuple(rounded.shape),
            dtype=self._dtype,
            label=parameter,
        )
        self._end += len(raw)
        return stored

    def tensors(self) -> dict[str, StoredTensor]:
        """Key of the adapter -> the factor."""
        self._file.flush()
        tensors = {}
        for parameter, factors in self.factors.items():
            for key, factor in zip(self.layout.keys(parameter), factors, strict=True):
                tensors[key] = factor
        return tensors


def _factor_all(
    pair: _Pair, cut: Cut, dtype: str, device: str, file: IO[bytes]
) -> _Factored:
    """Factor the changes of all matrices; those without a change have no factors."""
    factored = _Factored(AdapterLayout(pair.base.names), dtype, file)
    # Tied tensors have the same change, and must have the same factors to stay tied.
    shared: dict[tuple[int, int], tuple[Kind, Factors]] = {}
    tied = {*pair.base.names.tied, *pair.base.names.tied.values()}
    for name, kind in pair.kinds():
        if not kind.has_factors:
            continue
        operands = (pair.base.operands[name], pair.merged.operands[name])
        identity = (id(operands[0]), id(operands[1]))
        if identity in shared:
            first_kind, factors = shared[identity]
            if first_kind.is_transposed != kind.is_transposed:
                factors = factors.transposed
        else:
            factors = factor_change(*operands, kind, cut, device)
        if factors.rank:
            factored.add(name, kind, factors)
            if name in tied:
                shared[identity] = (kind, factors)
    if not factored.factors:
        raise CheckpointError(
            f"{pair.merged_name}: no matrix differs from {pair.base_name}, so there is nothing to "
            "put into an adapter"
        )
    factored.layout.add_whole(pair.changed_whole())
    return factored


def _write(pair: _Pair, factored: _Factored, folder: Path) -> int:
    """Write the files of the adapter; returns the bytes of its tensors."""
    layout = factored.layout
    tensors: dict[str, Operand] = dict(factored.tensors())
    for name in pair.whole(layout):
        (key,) = layout.keys(name)
        tensors[key] = pair.merged.operands[name]
    specs = []
    for key, tensor in sorted(tensors.items()):
        specs.append(TensorSpec(key, tensor.dtype, tensor.shape))
    with WeightsWriter(folder, specs, file=ADAPTER_WEIGHTS_FILE) as writer:
        for spec in specs:
            tensor = tensors[spec.name]
            columns = matrix_shape(spec.shape)[1]
            for first, end in _row_blocks(spec.shape):
                block = tensor.rows(first, end).to(getattr(torch, spec.dtype))
                writer.write(spec.name, first * columns, block)
    write_json(folder / ADAPTER_CONFIG_FILE, layout.config(pair.base_name))
    return sum(spec.bytes for spec in specs)


def _copy_new_tokenizer(pair: _Pair, folder: Path) -> None:
    """Copy the tokenizer of the merge if it is not that of the base (a chat template)."""
    base, merged = (weights.tokenizer_folder for weights in pair.weights)
    files = tokenizer_files(merged)
    for file in files:
        known = base / file.relative_to(merged)
        if not known.is_file() or known.read_bytes() != file.read_bytes():
            copy_files(files, merged, folder)
            return


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows [first, end) of each block of a tensor."""
    rows, columns = matrix_shape(shape)
    step = max(1, CPU_BLOCK // max(1, columns))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
