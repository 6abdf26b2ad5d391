"""What a study needs of memory, of the GPU and of the disk, from the headers of its models.

Nothing is loaded. `docs/scaling.md` says what each part is, and how well the plan was met.
"""

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paretomerge.checkpoint.json_file import ReadOnlyJson
from paretomerge.checkpoint.model_config import text_config
from paretomerge.checkpoint.operand import DTYPE_BYTES, StoredTensor
from paretomerge.config.settings import SourcesSetting
from paretomerge.merging.block import CPU_BLOCK, GPU_BLOCK
from paretomerge.merging.plan.cost import working_bytes
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.one_layout import arrange_like
from paretomerge.merging.plan.plan import Plan, Weights
from paretomerge.recipe import Recipe
from paretomerge.report.recipes import readable_size
from paretomerge.space.space import SearchSpace
from paretomerge.study.placement import Placement

PROCESS_BYTES = 600_000_000
"""A process with the libraries of a study, and nothing loaded (measured: 0.53 GB)."""

CUDA_PROCESS_BYTES = 1_500_000_000
"""What CUDA adds to a process on the host. An assumption: it depends on the driver."""

CUDA_CONTEXT_BYTES = 600_000_000
"""What CUDA takes of the GPU for one process. An assumption, too."""

SCORED_TOKENS = 512
"""Tokens of a sequence that the memory for scoring is planned for."""

_FLOAT32_BYTES = 4
# Of the elements of the largest tensor, as candidates for thresholds and samples of them, on the
# host (merging/methods/top_k.py).
_CANDIDATE_SHARE = 0.06
# The rest is for what the system and other programs ask for meanwhile.
_USABLE = 0.9


@dataclass(frozen=True)
class Machine:
    """What is free on a machine, in bytes.

    Attributes:
        host: Memory of the host that programs can get.
        gpu: Memory of the study's GPU; None without one.
        gpus: Number of GPUs that the study's device names.
        disk: Space in the study's folder.
    """

    host: int
    gpu: int | None
    gpus: int
    disk: int


@dataclass(frozen=True)
class MemoryPlan:
    """Peak memory and disk of a study, in bytes.

    Attributes:
        device: Where merges are made and scored.
        workers: Number of live models.
        sources: Where the base and the sources stay.
        live: One live model.
        kept: Tensors that one worker keeps beside it: sources on the GPU, and models with an
            adapter, which are computed once.
        mapped: Files of the models in the page cache, once for all workers.
        merge: What merging the most demanding tensor takes beside, for the space's methods.
        score: Keys, values and activations of one batch of `SCORED_TOKENS` tokens. Batches are
            halved where memory runs out.
        host: Memory of the host that cannot be given back, of all processes.
        gpu: Memory of each GPU; None without one.
        disk: One merge that is written.
        machine: What is free.
        problems: What does not fit, each with its cure.
    """

    device: str
    workers: int
    sources: SourcesSetting
    live: int
    kept: int
    mapped: int
    merge: int
    score: int
    host: int
    gpu: int | None
    disk: int
    machine: Machine
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Models:
    """Sizes of a study's models, in bytes, and what its merges take beside them.

    Attributes:
        whole: The base and all sources, each as it is read.
        computed: Those of their tensors that are in no file as they are, such as a matrix that an
            adapter changes.
        mapped: The tensors in files, each once.
        live: One live model.
        pool: Merges that a second level keeps.
        written: One merge on disk.
        cpu_work: Working memory of a merge on the CPU.
        gpu_work: Working memory of a merge on a GPU, on the GPU.
        host_work: Working memory of a merge on a GPU, on the host.
        score: One batch.
        routed: Whether live models refer to the layers of the sources instead of copying them.
    """

    whole: int
    computed: int
    mapped: int
    live: int
    pool: int
    written: int
    cpu_work: int
    gpu_work: int
    host_work: int
    score: int
    routed: bool = False

    @classmethod
    def of(
        cls,
        base: str,
        opened: Mapping[str, Weights],
        plans: Iterable[Plan],
        batch_size: int,
        *,
        routed: bool = False,
        pool: int = 0,
    ) -> "Models":
        """Read the sizes from headers.

        Args:
            base: The base.
            opened: The base and the sources.
            plans: A plan of each kind of merge that the study makes.
            batch_size: Sequences of one forward pass.
            routed: Whether the first level searches routes.
            pool: Number of merges that a second level keeps.

        Returns:
            The sizes.
        """
        plans = tuple(plans)
        whole, computed = 0, 0
        files: dict[tuple[Path, int], int] = {}
        for name, weights in opened.items():
            arranged = arrange_like(base, opened[base], name, weights)
            for tensor, header in arranged.headers.items():
                if isinstance(arranged.operand(tensor), StoredTensor):
                    whole += header.bytes
                    files[header.file, header.offset] = header.bytes
                else:
                    # Unrounded, as merges to disk read it.
                    size = _FLOAT32_BYTES * math.prod(header.shape)
                    whole += size
                    computed += size
            for header in weights.headers.values():
                files[header.file, header.offset] = header.bytes
        written = max(plan.bytes_written() for plan in plans)
        largest = max(_largest_tensor(plan) for plan in plans)
        first = plans[0]
        candidates = int(_FLOAT32_BYTES * _CANDIDATE_SHARE * largest * len(opened))
        return cls(
            whole=whole,
            computed=computed,
            mapped=sum(files.values()),
            live=written,
            pool=pool * written,
            written=written,
            cpu_work=candidates + max(working_bytes(plan, CPU_BLOCK) for plan in plans),
            gpu_work=max(working_bytes(plan, GPU_BLOCK) for plan in plans),
            host_work=candidates,
            score=scoring_bytes(first.config, first.dtype, batch_size),
            routed=routed,
        )


def models_of(
    space: SearchSpace, placement: Placement, batch_size: int = 1, pool: int = 0
) -> Models:
    """Read the sizes of a study's models from their headers; nothing is downloaded.

    Args:
        space: The search space of the first level.
        placement: What all merges have in common.
        batch_size: Sequences of one forward pass.
        pool: Number of merges that a second level keeps.

    Returns:
        The sizes.

    Raises:
        ParetoMergeError: The models cannot be read or merged.
    """
    opened = open_weights((space.base, *space.sources.values()), download=False)
    recipes: dict[str, Recipe] = {}
    # The last baseline of each method merges all sources.
    for params in space.baselines().values():
        recipe = placement.apply(space.recipe(params))
        recipes[recipe.merge_method] = recipe
    plans = []
    for recipe in recipes.values():
        plan = make_plan(
            recipe, opened, download=False, allow_mismatch=placement.allow_mismatch
        )
        plans.append(plan)
    return Models.of(
        space.base, opened, plans, batch_size, routed=space.routed, pool=pool
    )


def plan_memory(
    models: Models,
    machine: Machine,
    device: str = "cpu",
    sources: SourcesSetting | None = None,
    workers: int = 1,
) -> MemoryPlan:
    """Plan the peak memory of a study.

    Args:
        models: Sizes of its models.
        machine: What is free.
        device: `cpu`, `cuda` or `cuda:N`.
        sources: Where sources stay; None for `device` where that fits, else `mmap`.
        workers: Number of live models, spread evenly over the GPUs if there are several.

    Returns:
        The plan, with all that does not fit.
    """
    plan = _planned(models, machine, device, sources or "device", workers)
    if sources is None and (plan.problems or not _is_worth_keeping(models, device)):
        # Routes have their layers on the device in any case.
        return _planned(models, machine, device, "mmap", workers)
    return plan


def _is_worth_keeping(models: Models, device: str) -> bool:
    # On the CPU plain tensors are mapped in any case, and only computed ones would be kept.
    return device != "cpu" or models.computed > 0


def _planned(
    models: Models,
    machine: Machine,
    device: str,
    sources: SourcesSetting,
    workers: int,
) -> MemoryPlan:
    on_gpu = device != "cpu"
    live = models.live
    kept = models.pool
    if models.routed and on_gpu:
        kept += models.whole
    elif models.routed:
        kept += models.computed
    elif sources == "device":
        kept += models.whole if on_gpu else models.computed
    merge = models.gpu_work if on_gpu else models.cpu_work
    # A merge is finished before it is scored.
    at_work = max(merge, models.score)
    # One process asks, records and, with one worker, also merges.
    processes = 1 if workers == 1 else workers + 1
    host = processes * PROCESS_BYTES
    gpu = None
    if on_gpu:
        # A model is loaded on the host and then moved.
        per_worker = CUDA_PROCESS_BYTES + models.host_work + live
        host += workers * per_worker
        per_gpu = math.ceil(workers / max(machine.gpus, 1))
        gpu = per_gpu * (CUDA_CONTEXT_BYTES + live + kept + at_work)
    else:
        host += workers * (live + kept + at_work)
    plan = MemoryPlan(
        device=device,
        workers=workers,
        sources=sources,
        live=live,
        kept=kept,
        mapped=models.mapped,
        merge=merge,
        score=models.score,
        host=host,
        gpu=gpu,
        disk=models.written,
        machine=machine,
        problems=(),
    )
    problems = tuple(_problems(plan, models))
    return MemoryPlan(**{**vars(plan), "problems": problems})


def _problems(plan: MemoryPlan, models: Models) -> Iterable[str]:
    """What does not fit, each with its cure."""
    machine = plan.machine
    size = readable_size
    if plan.gpu is not None and machine.gpu is not None:
        usable = int(_USABLE * machine.gpu)
        if plan.gpu > usable:
            cures = []
            if plan.sources == "device" and not models.routed:
                cures.append("set `sources: mmap`")
            if plan.workers > machine.gpus:
                cures.append("set fewer `workers`")
            cures.append("set a smaller `dtype` or `evaluate.batch_size`")
            cures.append("score with `evaluate.backend: vllm` over several GPUs")
            yield (
                f"The GPU is too small: {size(plan.gpu)} are needed, {size(machine.gpu)} are "
                f"free. Try one of: {', '.join(cures)}."
            )
    usable = int(_USABLE * machine.host)
    if plan.host > usable:
        cures = []
        if plan.workers > 1:
            cures.append("set fewer `workers`")
        if plan.kept and plan.sources == "device" and plan.device == "cpu":
            cures.append("set `sources: mmap`")
        cures.append("set `dtype: bfloat16` or a smaller `evaluate.batch_size`")
        yield (
            f"The memory is too small: {size(plan.host)} are needed, {size(machine.host)} are "
            f"free. Try one of: {', '.join(cures)}."
        )
    elif plan.host + plan.mapped > usable and not _is_read_once(plan, models):
        yield (
            f"The models' files ({size(plan.mapped)}) do not fit into the memory beside the rest "
            f"({size(plan.host)} of {size(machine.host)}). Each merge will read them from the "
            "disk again. Free memory, or take fewer `models`."
        )
    if plan.disk > machine.disk:
        yield (
            f"The disk is too full: one merge takes {size(plan.disk)}, {size(machine.disk)} are "
            "free. Set another `out`, or delete something."
        )


def _is_read_once(plan: MemoryPlan, models: Models) -> bool:
    """Whether the files are not read again once everything is loaded."""
    return plan.gpu is not None and (plan.sources == "device" or models.routed)


def scoring_bytes(config: ReadOnlyJson, dtype: str, batch_size: int) -> int:
    """Estimate what scoring one batch takes beside the weights.

    Args:
        config: The config of the merges.
        dtype: Their dtype, as torch names it.
        batch_size: Sequences of a forward pass.

    Returns:
        Bytes of keys and values of `SCORED_TOKENS` tokens, of the activations of one layer, and of
        the logits of one token of each sequence.
    """
    text = text_config(config)

    def number(key: str, default: int) -> int:
        value = text.get(key)
        return value if isinstance(value, int) else default

    hidden = number("hidden_size", 1_024)
    heads = max(number("num_attention_heads", 16), 1)
    head_size = number("head_dim", hidden // heads)
    key_value_heads = number("num_key_value_heads", heads)
    layers = number("num_hidden_layers", 24)
    inner = number("intermediate_size", 4 * hidden)
    length = min(SCORED_TOKENS, number("max_position_embeddings", SCORED_TOKENS))
    tokens = batch_size * length
    cache = 2 * layers * key_value_heads * head_size
    # The stream, queries, keys, values and the MLP's two inner states of one layer.
    activations = 4 * hidden + 2 * inner
    logits = 2 * _FLOAT32_BYTES * batch_size * number("vocab_size", 32_000)
    return tokens * DTYPE_BYTES[dtype] * (cache + activations) + logits


def _largest_tensor(plan: Plan) -> int:
    return max(math.prod(job.shape) for job in plan.jobs)


def this_machine(folder: Path, device: str = "cpu") -> Machine:
    """Measure what is free here.

    Args:
        folder: The study's folder; it need not exist.
        device: The study's device.

    Returns:
        What is free.
    """
    gpu, gpus = _free_gpu(device)
    return Machine(_free_host(), gpu, gpus, free_disk(folder))


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    for place in (folder, *folder.parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return shutil.disk_usage("/").free


def _free_gpu(device: str) -> tuple[int | None, int]:
    if device == "cpu":
        return None, 0
    import torch

    if not torch.cuda.is_available():
        return None, 0
    free, _ = torch.cuda.mem_get_info(device)
    # `cuda:1` names one GPU, `cuda` stands for all that workers may use.
    return free, 1 if ":" in device else torch.cuda.device_count()


def _free_host() -> int:
    """Memory that programs can get, without swapping."""
    import psutil

    free: int = psutil.virtual_memory().available
    # A container may have less than its machine.
    limit = _cgroup_number("memory.max")
    used = _cgroup_number("memory.current")
    if limit is not None and used is not None:
        # Pages of files count as used, and are given back when memory is asked for.
        free = min(free, limit - used + _reclaimable())
    return max(free, 0)


_CGROUP = Path("/sys/fs/cgroup")


def _cgroup_number(name: str) -> int | None:
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    total = 0
    for line in lines:
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "active_file"):
            total += int(value)
    return total
