"""The engine: from a recipe, or its plan, to merged tensors in a checkpoint.

Merging is a loop over tensor jobs, and for each over blocks of rows. Arithmetic is in float32 with
one cast at the end. There is no state between tensors, so that several processes can share them.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from paretomerge.arguments import describe, flag, integer, label, optional
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.chat_template import (
    resolve_chat_template,
    write_chat_template,
)
from paretomerge.checkpoint.companions import (
    companion_files,
    copy_files,
    files_besides_tokenizer,
)
from paretomerge.checkpoint.json_file import write_json
from paretomerge.checkpoint.model_config import with_tagged_floats
from paretomerge.checkpoint.writer import (
    SHARD_BYTES,
    TensorSpec,
    WeightsWriter,
    check_out,
    check_replaceable,
    new_folder,
)
from paretomerge.errors import ConfigError
from paretomerge.merging.card import model_card
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.plan.cost import default_workers
from paretomerge.merging.plan.make import RecipeLike, make_plan
from paretomerge.merging.plan.plan import INPUT_CACHE_BYTES, Plan, TensorJob
from paretomerge.merging.processes import merge_with_processes
from paretomerge.merging.tasks import BlockCallback, merge_piece, prepare_process
from paretomerge.merging.worker_start import Workers

_THREADS = 2  # more wait for Python's lock, which each operation on a block takes anew


def merge(  # noqa: PLR0913 - the options of a merge, all with a default
    recipe: RecipeLike,
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    card: str = "",
    workers: int | None = None,
    device: str = "cpu",
    allow_nan: bool = False,
    allow_mismatch: bool = False,
) -> Path:
    """Merge models by a recipe into a new checkpoint folder.

    The folder gets the weights, the config, the tokenizer, the recipe and a model card. It appears
    whole or not at all.

    Args:
        recipe: A `Recipe`, a mapping in mergekit's grammar, the path of a YAML file, or the YAML
            text itself (a string with several lines, or with `merge_method:` in it).
        out: The folder to create; `~` is the home folder.
        overwrite: Whether to replace `out` if it exists. Only a folder with a checkpoint is
            replaced: a file, or a folder with other content, is never removed.
        shard_bytes: The size of the largest file of weights.
        card: Text to add to the model card.
        workers: Processes that merge, this one included; by default one for a small merge, and for
            others as many as torch would use threads. The bytes do not depend on it. On a GPU, one
            process merges.
        device: `cpu`, `cuda` or `cuda:N`.
        allow_nan: Whether to merge NaN and infinite weights like others.
        allow_mismatch: Whether to merge models that do not seem to belong together.

    Returns:
        The folder.

    Raises:
        RecipeError: If the recipe has no meaning; the message lists every problem.
        CheckpointError: If a model cannot be read, or `out` cannot be written or replaced.
        ConfigError: If the device is not available, or an argument has a wrong type.

    Example:
        >>> import paretomerge as pm
        >>> pm.merge(
        ...     {
        ...         "merge_method": "task_arithmetic",
        ...         "base_model": "./base",
        ...         "models": [{"model": "./math"}, {"model": "./code"}],
        ...         "parameters": {"weight": 0.5},
        ...     },
        ...     "merged",
        ... )  # doctest: +SKIP
        PosixPath('merged')
        >>> pm.merge("recipe.yml", "merged", overwrite=True)  # doctest: +SKIP
        PosixPath('merged')
    """
    # Everything is checked before a model is opened.
    folder = Path(read_path("out", out))
    overwrite = flag("overwrite", overwrite)
    shard_bytes = integer(1)("shard_bytes", shard_bytes)
    card = label("card", card)
    workers = optional(integer(1))("workers", workers)
    device = usable_device(device)
    plan = make_plan(
        recipe,
        allow_nan=flag("allow_nan", allow_nan),
        allow_mismatch=flag("allow_mismatch", allow_mismatch),
    )
    return write(
        plan,
        folder,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        card=card,
        workers=workers,
        device=device,
    )


def write(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    card: str = "",
    workers: int | None = None,
    device: str = "cpu",
    started: Workers | None = None,
) -> Path:
    """Write the checkpoint of a plan. See `merge` for the arguments, the result and the errors.

    `started` are workers that have been started for this merge, one fewer than `workers`.
    """
    device = usable_device(device)
    _check_one_gpu_process(workers, device)
    check_out(out, (*plan.recipe.source_models, *plan.weights), overwrite)
    specs = []
    for job in plan.jobs:
        specs.append(TensorSpec(job.name, job.dtype, job.shape))
    with new_folder(out, overwrite, plan.bytes_written()) as folder:
        with WeightsWriter(folder, specs, shard_bytes) as writer:
            _merge_to_disk(plan, writer, workers, device, started)
            checksums = writer.checksums()
        # A source that changed during the merge makes the result worthless.
        plan.check_unchanged()
        write_json(folder / "config.json", with_tagged_floats(plan.config))
        write_companions(plan, folder)
        recipe = plan.recipe.resolve_paths(Path.cwd())
        (folder / "mergekit_config.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        readme = model_card(plan, out.name, card, checksums)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        if overwrite:
            # Others may have put something else there while the merge ran.
            check_replaceable(out)
    return out


def _merge_to_disk(
    plan: Plan,
    writer: WeightsWriter,
    workers: int | None,
    device: str,
    started: Workers | None,
) -> None:
    """Merge every tensor of a plan into its file."""
    if device == "cpu":
        with single_threaded() as torch_threads:
            count = workers or default_workers(plan, torch_threads)
            merge_with_processes(plan, writer, count, started)
        return

    def write_block(job: TensorJob, start: int, block: Tensor) -> None:
        result = cast_block(plan, job, block)
        writer.write(job.name, start, result)

    run(plan, write_block, threads=1, device=device)


def _check_one_gpu_process(workers: int | None, device: str) -> None:
    """Raise ConfigError if several processes should merge on a GPU."""
    if device != "cpu" and workers not in (None, 1):
        raise ConfigError(
            f"workers: one process merges on a GPU, not {workers}; leave `workers` out"
        )


def run(
    plan: Plan,
    on_block: BlockCallback,
    threads: int | None = None,
    device: str = "cpu",
) -> None:
    """Merge every tensor of a plan in this process, in the order of the plan.

    Args:
        plan: What to merge.
        on_block: Receives each merged block. Several threads may call it.
        threads: Tensors merged at a time; by default as many as torch would use, but at most two.
        device: Where to merge. See `merge`.
    """
    device = usable_device(device)
    prepare_process()
    with single_threaded() as torch_threads, torch.inference_mode():
        # One thread keeps a GPU busy, and the blocks of more would fill its memory.
        count = 1
        if device == "cpu":
            count = min(torch_threads, _THREADS)
        count = threads or count
        cache_bytes = INPUT_CACHE_BYTES // count
        if count == 1:
            for job in plan.jobs:
                merge_piece(plan, job, on_block, device=device, cache_bytes=cache_bytes)
            return

        def merge_one(job: TensorJob) -> None:
            # Inference mode belongs to a thread.
            with torch.inference_mode():
                merge_piece(plan, job, on_block, device=device, cache_bytes=cache_bytes)

        with ThreadPoolExecutor(count, thread_name_prefix="merge") as pool:
            pending = [pool.submit(merge_one, job) for job in plan.jobs]
            try:
                for future in pending:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def usable_device(device: str) -> str:
    """The name that torch gives to a device of this machine.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.

    Returns:
        `cpu` or `cuda:N`.

    Raises:
        ConfigError: If there is no such device, or merging on it is not supported.
    """
    # Torch takes numbers of devices, too, and None.
    if not isinstance(device, str):
        raise ConfigError(
            f"device: expected cpu, cuda or cuda:N as text, got {describe(device)}"
        )
    try:
        kind = torch.device(device).type
        if kind == "cpu":
            return kind
        if kind == "cuda":
            return str(torch.empty(1, device=device).device)
        reason = "merging on it is not supported"
    except (RuntimeError, AssertionError) as error:
        # Torch appends advice for developers in further lines.
        reason = str(error).partition("\n")[0]
    raise ConfigError(
        f"device: expected cpu, cuda or cuda:N with such a GPU in this machine, got {device!r}: "
        f"{reason}"
    )


def merged_tensors(
    plan: Plan,
    block: int | None = None,
    only: Iterable[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge tensors in memory, for inspection and for tests.

    Args:
        plan: What to merge.
        block: Elements merged at a time. The results do not depend on it.
        only: The names of the tensors to merge; by default all.

    Yields:
        (name, tensor in its dtype), in the order of the plan.
    """
    names = None if only is None else set(only)
    for job in plan.jobs:
        if names is None or job.name in names:
            yield job.name, _merged_tensor(plan, job, block)


def _merged_tensor(
    plan: Plan,
    job: TensorJob,
    block_elements: int | None,
) -> Tensor:
    dtype = getattr(torch, job.dtype)
    merged = torch.empty(job.shape, dtype=dtype)
    flat = merged.view(-1)

    def store_block(
        job: TensorJob,
        start: int,
        block: Tensor,
    ) -> None:
        end = start + block.numel()
        cast_block(plan, job, block, out=flat[start:end])

    with single_threaded(), torch.inference_mode():
        merge_piece(
            plan,
            job,
            store_block,
            cache_bytes=INPUT_CACHE_BYTES,
            block_elements=block_elements,
        )
    return merged


@contextmanager
def single_threaded() -> Iterator[int]:
    """Run torch with one thread; yields the number of threads that it had.

    Merging is parallel over tensors. Sums then never depend on a number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def write_companions(plan: Plan, folder: Path) -> None:
    """Write the tokenizer and the other files that belong to the template's model.

    Args:
        plan: What is merged.
        folder: An existing folder.
    """
    source = plan.template.folder
    if plan.vocabulary:
        # A merged vocabulary has its own tokenizer files.
        copy_files(files_besides_tokenizer(source), source, folder)
        plan.vocabulary.write(folder)
    else:
        copy_files(companion_files(source), source, folder)
    if plan.recipe.chat_template:
        folders = {}
        for model, weights in plan.weights.items():
            folders[model] = weights.tokenizer_folder
        template = resolve_chat_template(plan.recipe.chat_template, folders)
        if template:
            write_chat_template(folder, template)
