"""The one loop: jobs -> blocks of merged tensors. Float32 inside, one cast at the end, no state between tensors."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from paretomerge.checkpoint.chat_template import resolve_chat_template, write_chat_template
from paretomerge.checkpoint.json_file import write_json
from paretomerge.checkpoint.operand import FLOAT_DTYPES, StoredTensor, matrix_shape, read_tensor
from paretomerge.checkpoint.tokenizer import copy_tokenizer
from paretomerge.checkpoint.writer import SHARD_BYTES, TensorSpec, WeightsWriter, new_folder
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.card import model_card
from paretomerge.merging.job_io import cast_block, job_inputs
from paretomerge.merging.methods.inputs import BLOCK
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.plan.plan import INPUT_CACHE_BYTES, Plan, TensorJob
from paretomerge.recipe import Recipe

_WARM_HEAP = 31 << 20
"""Bytes allocated and freed at once: glibc then keeps blocks of this size on its heap, and does not give them back to the
kernel after every operation only to fetch, and clear, them again."""

_THREADS = 2  # more wait for Python's lock, which each operation on a block takes anew

Emit = Callable[[TensorJob, int, torch.Tensor], None]
"""(job, flat position of the block's first element, block as (rows, columns) in float32 or, for a copy, as stored)."""


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    card: str = "",
    threads: int | None = None,
    device: str = "cpu",
    allow_nan: bool = False,
) -> Path:
    """Merge `recipe` into the new folder `out`: weights, config, tokenizer, recipe and model card.

    The folder appears whole or not at all. card: text added to the model card. shard_bytes: of the largest file. threads:
    tensors merged at a time, by default as many as torch would use, but two; the bytes do not depend on it. device: cpu,
    cuda or cuda:N. allow_nan: weights that are NaN or infinite are merged like others. Returns the folder.
    """
    return write(
        make_plan(recipe, allow_nan=allow_nan),
        Path(out),
        overwrite,
        shard_bytes,
        card,
        threads,
        device,
    )


def write(
    plan: Plan,
    out: Path,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    card: str = "",
    threads: int | None = None,
    device: str = "cpu",
) -> Path:
    """Carry out `plan`, as `merge` does."""
    _keep_sources(plan, out)
    specs = [TensorSpec(job.name, job.dtype, job.shape) for job in plan.jobs]
    with new_folder(out, overwrite, plan.bytes_written()) as folder:
        with WeightsWriter(folder, specs, shard_bytes) as writer:
            run(
                plan,
                lambda job, start, block: writer.write(
                    job.name, start, cast_block(plan, job, block)
                ),
                threads,
                device,
            )
            checksums = writer.checksums()
        for weights in plan.weights.values():
            weights.check_unchanged()
        write_json(folder / "config.json", plan.config)
        _write_tokenizer(plan, folder)
        (folder / "mergekit_config.yml").write_text(
            plan.recipe.resolve_paths(Path.cwd()).to_yaml(), encoding="utf-8"
        )
        (folder / "README.md").write_text(
            model_card(plan, out.name, card, checksums), encoding="utf-8"
        )
    return out


def run(
    plan: Plan,
    emit: Emit,
    threads: int | None = None,
    device: str = "cpu",
    block: int | None = None,
) -> None:
    """Merge every tensor, in the plan's order, and hand each block to `emit`, which may be called from several threads.

    block: elements at a time; results do not depend on it.
    """
    device = usable_device(device)
    torch.empty(_WARM_HEAP, dtype=torch.uint8)
    with _single_threaded() as before, torch.inference_mode():
        count = threads or (
            min(before, _THREADS) if device == "cpu" else 1
        )  # a GPU is kept busy by one, and blocks fill its memory
        if count == 1:
            for job in plan.jobs:
                _merge_job(plan, job, emit, device, block, count)
            return

        def work(job: TensorJob) -> None:
            with torch.inference_mode():  # the mode is a thread's own
                _merge_job(plan, job, emit, device, block, count)

        with ThreadPoolExecutor(count, thread_name_prefix="merge") as pool:
            pending = [pool.submit(work, job) for job in plan.jobs]
            try:
                for result in pending:
                    result.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def usable_device(device: str) -> str:
    """`device` as torch calls it, once it is known to be there."""
    try:
        kind = torch.device(device).type
        if kind == "cpu":
            return kind
        if kind == "cuda":
            return str(torch.empty(1, device=device).device)
        reason = "merging there was never tried"
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
    raise ConfigError(
        f"device: expected cpu, cuda or cuda:N with such a GPU in this machine, got {device!r}: {reason}"
    )


def _keep_sources(plan: Plan, out: Path) -> None:
    """An error if the new folder would take the place of one that holds a source."""
    parts = [
        Path(part).expanduser()
        for model in (*plan.recipe.source_models, *plan.weights)
        for part in (model, *model.split("+"))
    ]
    if held := [
        part for part in parts if part.exists() and part.resolve().is_relative_to(out.resolve())
    ]:
        raise CheckpointError(
            f"{out}: expected a folder without sources in it, got one that holds {held[0]}; choose another"
        )


def _merge_job(
    plan: Plan, job: TensorJob, emit: Emit, device: str, block: int | None, threads: int = 1
) -> None:
    if job.copy:
        _copy(plan, job, emit)
        return
    if not torch.Size(job.shape).numel():
        return  # nothing to merge, and nothing that a method could measure
    inputs = job_inputs(plan, job, device, INPUT_CACHE_BYTES // threads)
    combine = plan.method.combine(inputs)
    for piece in inputs.blocks(block):
        emit(job, piece.start, combine(piece))


def _copy(plan: Plan, job: TensorJob, emit: Emit) -> None:
    """The one source as it is; a few rows at a time, but for whole numbers, which no float32 holds."""
    operand = plan.operand(job.sources[0])
    if operand.dtype not in FLOAT_DTYPES:
        emit(job, 0, read_tensor(operand))
        return
    rows, columns = matrix_shape(job.shape)
    step = max(1, BLOCK // max(columns, 1))
    for first in range(0, rows, step):
        end = min(first + step, rows)
        emit(
            job,
            first * columns,
            operand.rows_as_stored(first, end) if isinstance(operand, StoredTensor) else operand.rows(first, end),
        )


def merged_tensors(
    plan: Plan, block: int | None = None, only: Iterable[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every output tensor in the order of the plan, cast to its dtype: for looking at, and for tests."""
    wanted = None if only is None else set(only)
    for job in plan.jobs:
        if wanted is None or job.name in wanted:
            yield job.name, _merged(plan, job, block)


def _merged(plan: Plan, job: TensorJob, block: int | None) -> torch.Tensor:
    merged = torch.empty(job.shape, dtype=getattr(torch, job.dtype))
    flat = merged.view(-1)

    def keep(job: TensorJob, start: int, piece: torch.Tensor) -> None:
        cast_block(plan, job, piece, flat[start : start + piece.numel()])

    with _single_threaded(), torch.inference_mode():
        _merge_job(plan, job, keep, "cpu", block)
    return merged


@contextmanager
def _single_threaded() -> Iterator[int]:
    """One thread inside torch: merging is parallel over tensors, and sums then never depend on a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _write_tokenizer(plan: Plan, folder: Path) -> None:
    if plan.vocabulary:
        copy_tokenizer(plan.template.folder, folder, ["generation_config.json"])
        plan.vocabulary.write(folder)
    else:
        copy_tokenizer(plan.template.folder, folder)
    if plan.recipe.chat_template:
        folders = {model: weights.folder for model, weights in plan.weights.items()}
        if text := resolve_chat_template(plan.recipe.chat_template, folders):
            write_chat_template(folder, text)
