"""docs/scaling.md and docs/lab/scaling.md: what a study takes with more workers and larger models.

    python -m benchmarks.scaling run [--parts ask,sources,driver,study]    # a quarter of an hour
    python -m benchmarks.scaling table

`ask`: processor time of a proposal by the number of trials. `sources`: processor time of merges
of tensors that were copied into memory, mapped, or read from their files each time. `driver`: a
sampler and a record that are real, and workers that sleep as long as their trials last, against
the forecast. `study`: processor time of searches in one process, against the forecast from their
baselines, and the memory plan. The tables of large models and many workers are forecasts; what they
assume stands in `ASSUMED`, and is printed with them.
"""

import argparse
import heapq
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.reporting import (
    REPOSITORY,
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from paretomerge.examples import SPECIALISTS
from paretomerge.study.forecast import (
    TrialCosts,
    forecast,
    mmmo_ask_seconds,
)
from paretomerge.study.memory import CUDA_CONTEXT_BYTES, Models, plan_memory
from paretomerge.study.memory import Machine as Free

FILE = RESULTS / "scaling.jsonl"
PARTS = ("ask", "sources", "driver", "study")
SMOLLM = REPOSITORY / "examples" / "smollm" / "study.yaml"
OBSERVATIONS = (20, 50, 100, 200, 400, 600, 800, 1000)
SPACES = ((7, 2), (7, 3), (30, 3))
TRIALS = 300
WORKERS = (1, 8, 64, 512)
SPEEDS = [1 + 2 * i / 7 for i in range(8)]
"""Eight workers of which the fastest is three times as fast as the slowest."""


@dataclass(frozen=True)
class Assumed:
    """What was not measured here, for there is no GPU.

    Attributes:
        tokens: Tokens that one trial reads and writes: 600 examples of 300.
        gpu_flops: Operations per second of one GPU while it scores: a quarter of the peak of an
            H100 in bfloat16. One forward pass takes two operations per parameter and token.
        bus: Bytes per second from the host to a GPU.
        gpu_bytes: Memory of one GPU.
        spread: Of the times of trials.
        load: Bytes per second at which a worker reads its model at the start.
    """

    tokens: float = 180_000
    gpu_flops: float = 250e12
    bus: float = 20e9
    gpu_bytes: float = 80e9
    spread: float = 0.2
    load: float = 1e9


ASSUMED = Assumed()
PARAMETERS = (0.5, 7, 70, 405)
"""Billions."""

SOURCES = 3
KB_PER_TRIAL = 20
"""Of the record, generously."""


# ----- measurements


def measure_asks() -> Iterator[Entry]:
    """Processor seconds of a proposal."""
    import torch

    from benchmarks.search import ask_seconds

    torch.set_num_threads(1)
    for parameters, objectives in SPACES:
        for n in OBSERVATIONS:
            seconds = ask_seconds(n, parameters, objectives, time.process_time)
            yield {
                "part": "ask",
                "observations": n,
                "parameters": parameters,
                "objectives": objectives,
                "seconds": seconds,
            }


def measure_sources(rounds: int = 5) -> Iterator[Entry]:
    """Merge four models of 63 million parameters in bfloat16, by where their tensors are."""
    import torch
    from safetensors.torch import save_file

    from paretomerge.checkpoint.header import read_header
    from paretomerge.checkpoint.operand import InMemoryTensor, Operand
    from paretomerge.checkpoint.reader import Shards

    torch.set_num_threads(1)
    names = [f"w{i}" for i in range(30)]
    shape = (2048, 1024)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for k in range(SOURCES + 1):
            generator = torch.Generator().manual_seed(k)
            tensors = {}
            for name in names:
                values = torch.randn(shape, generator=generator)
                tensors[name] = values.to(torch.bfloat16)
            files.append(Path(folder) / f"{k}.safetensors")
            save_file(tensors, files[-1])
        for place in ("memory", "mapped", "read"):
            models: list[dict[str, Operand]] = []
            for file in files:
                shards = Shards(file.stem, read_header(file), mapped=place == "mapped")
                operands: dict[str, Operand] = {}
                for name in names:
                    operands[name] = shards.operand(name)
                    if place == "memory":
                        operands[name] = InMemoryTensor(shards.stored(name).read())
                models.append(operands)
            for method in ("task_arithmetic", "ties"):
                seconds = []
                for _ in range(rounds):
                    since = time.process_time()
                    _merge_all(models, method, names, shape)
                    seconds.append(time.process_time() - since)
                yield {
                    "part": "sources",
                    "place": place,
                    "method": method,
                    "seconds": statistics.median(seconds),
                }


def _merge_all(
    models: Sequence[Mapping[str, Any]],
    method: str,
    names: Sequence[str],
    shape: tuple[int, int],
) -> None:
    import torch

    from paretomerge.merging.block import Inputs
    from paretomerge.merging.methods import METHODS

    options = {"lambda": 1.0, "normalize": False, "rescale": False}
    parameters = [{"weight": 0.4, "density": 0.3}] * SOURCES
    result = torch.empty(shape, dtype=torch.bfloat16).view(-1)
    with torch.inference_mode():
        for name in names:
            base, *sources = (model[name] for model in models)
            inputs = Inputs(name, shape, base, sources, parameters, options)
            merge_block = METHODS[method].function(inputs)
            for block in inputs.blocks():
                end = block.start + block.numel
                result[block.start : end].copy_(merge_block(block).reshape(-1))


def measure_driver(
    trials: int = 64, work: float = 8.0, spread: float = 0.3
) -> Iterator[Entry]:
    """Search with workers that sleep, and compare with the forecast."""
    import optuna
    import torch
    from optuna.distributions import BaseDistribution, FloatDistribution

    from paretomerge.search.mmmo.sampler import MMMOSampler

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, BaseDistribution] = {}
    for i in range(7):
        space[f"x{i}"] = FloatDistribution(0.0, 1.0)
    for speeds in ([1.0] * 8, SPEEDS):
        with tempfile.TemporaryDirectory() as folder:
            study = optuna.create_study(
                storage=f"sqlite:///{folder}/study.db",
                directions=["maximize"] * 2,
                sampler=MMMOSampler(seed=0, space=dict(space)),
            )
            yield _drive(study, space, speeds, trials, work, spread)


def _drive(
    study: Any,
    space: Mapping[str, Any],
    speeds: Sequence[float],
    trials: int,
    work: float,
    spread: float,
) -> Entry:
    rng = random.Random(0)
    asks, tells = [], []
    running: list[tuple[float, int, Any]] = []
    free = list(range(len(speeds)))
    started, busy = 0, 0.0
    begun = time.perf_counter()
    finished = 0
    while finished < trials:
        if free and started < trials:
            since = time.perf_counter()
            trial = study.ask(space)
            now = time.perf_counter()
            asks.append(now - since)
            worker = free.pop()
            seconds = rng.gauss(work, spread * work) / speeds[worker]
            seconds = max(seconds, 0.1)
            busy += seconds
            heapq.heappush(running, (now + seconds, worker, trial))
            started += 1
            continue
        end, worker, trial = heapq.heappop(running)
        time.sleep(max(end - time.perf_counter(), 0))
        since = time.perf_counter()
        x = list(trial.params.values())
        study.tell(trial, [1 - sum(x) / 7, x[0] - x[1] ** 2])
        tells.append(time.perf_counter() - since)
        free.append(worker)
        finished += 1
    wall = time.perf_counter() - begun
    costs = TrialCosts(
        0, work, statistics.mean(asks), statistics.mean(tells), spread=spread
    )
    predicted = forecast(costs, trials, len(speeds), speeds=speeds)
    return {
        "part": "driver",
        "trials": trials,
        "workers": len(speeds),
        "unequal": max(speeds) / min(speeds),
        "ask": costs.ask,
        "record": costs.record,
        "wall": wall,
        "idle": 1 - busy / (len(speeds) * wall),
        "forecast wall": predicted.wall,
        "forecast idle": predicted.idle,
    }


def measure_studies(trials: int = 24) -> Iterator[Entry]:
    """Search in this process; forecast the trials that are proposed from the baselines."""
    import torch

    from benchmarks.study_api import open_fresh

    torch.set_num_threads(1)
    few = ["evaluate.search_items=8"]
    for path, overrides, count in (
        (SPECIALISTS / "study.yaml", [], trials),
        (SMOLLM, few, 14),
    ):
        if not (path.parent / "models" / "base").is_dir():
            print(f"{path}: the models are missing; see examples/smollm", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            study = open_fresh(path, Path(folder), overrides)
            # The batch sizes of the two files.
            plan = study.memory_plan(128 if path.parent == SPECIALISTS else 64)
            # Processor time: what other programs do on the machine does not count.
            times = [time.process_time()]
            asked: list[bool] = []

            def watch(
                event: Any,
                times: list[float] = times,
                asked: list[bool] = asked,
            ) -> None:
                times.append(time.process_time())
                asked.append(not event.trial.label)

            with _peak_of_anonymous_memory() as peak:
                study.run(count, watch)
        seconds = [end - start for start, end in pairwise(times)]
        # The baselines come first and are not proposed; the first one loads the models.
        n_baselines = asked.index(True)
        costs = TrialCosts(
            0.0,
            statistics.mean(seconds[1:n_baselines]),
            mmmo_ask_seconds(
                count, len(study.space.distributions), len(study.goals.objectives)
            ),
            record=0.0,
        )
        proposed = seconds[n_baselines:]
        yield {
            "part": "study",
            "study": path.parent.name,
            "baselines": n_baselines,
            "trials": len(seconds),
            "baseline": costs.evaluate,
            "proposed": statistics.mean(proposed),
            "seconds": sum(proposed),
            "forecast": forecast(costs, len(proposed)).wall,
            "memory": peak[0],
            "planned memory": plan.host,
            "planned batch": plan.score,
        }


@contextmanager
def _peak_of_anonymous_memory() -> Iterator[list[int]]:
    """The most bytes of this process that are in no file, sampled ten times a second."""
    peak = [0]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.1):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], 1024 * int(line.split()[1]))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


# ----- forecasts


@dataclass(frozen=True)
class Size:
    """A study of models of one size on GPUs.

    Attributes:
        billions: Parameters.
        gpus: GPUs of one worker.
        costs: Of one trial.
        models: Sizes in memory.
    """

    billions: float
    gpus: int
    costs: TrialCosts
    models: Models

    @classmethod
    def of(cls, billions: float, assumed: Assumed = ASSUMED) -> "Size":
        """Forecast from the size alone: bfloat16, three full fine-tunes."""
        live = int(billions * 2e9)
        # Half of a GPU may hold weights beside keys, values and blocks, if there are several.
        gpus = 1
        while live + CUDA_CONTEXT_BYTES + 8e9 > assumed.gpu_bytes * gpus * 0.9:
            gpus *= 2
        sources = (SOURCES + 1) * live
        # All GPUs of a worker receive their part of the sources at the same time.
        merge = sources / (assumed.bus * gpus)
        operations = 2 * billions * 1e9 * assumed.tokens
        evaluate = operations / (assumed.gpu_flops * gpus)
        costs = TrialCosts(
            merge,
            evaluate,
            mmmo_ask_seconds(TRIALS, parameters=10, objectives=3),
            spread=assumed.spread,
            start=live / assumed.load,
        )
        largest = 4 * (1 << 26)
        models = Models(
            whole=sources,
            computed=0,
            mapped=sources,
            live=live,
            pool=0,
            written=live,
            cpu_work=0,
            gpu_work=(SOURCES + 8) * largest,
            host_work=10**9,
            score=4 * 10**9,
        )
        return cls(billions, gpus, costs, models)


def large_models() -> str:
    """Wall time, GPU hours, waiting, memory and disk for sizes and numbers of workers."""
    rows = []
    for billions in PARAMETERS:
        size = Size.of(billions)
        for workers in WORKERS:
            result = forecast(size.costs, TRIALS, workers)
            gpu_hours = result.wall * workers * size.gpus / 3600
            rows.append(
                [
                    f"{billions:g} B",
                    f"{workers}",
                    f"{workers * size.gpus}",
                    hours(result.wall),
                    f"{gpu_hours:,.0f}" if gpu_hours >= 10 else f"{gpu_hours:.1f}",
                    f"{result.idle:.0%}",
                    gigabytes(size.models.mapped),
                    gigabytes(size.models.written + TRIALS * KB_PER_TRIAL * 1000),
                ]
            )
    header = ["model", "workers", "GPUs", "wall time", "GPU hours", "GPUs wait"]
    header += ["files, per machine", "disk for a pick"]
    return markdown_table(header, rows)


def costs_of_sizes() -> str:
    """What one trial takes by the assumptions, and how many workers the driver keeps busy."""
    rows = []
    for billions in PARAMETERS:
        size = Size.of(billions)
        costs = size.costs
        cells = [costs.merge, costs.evaluate, costs.ask, costs.record]
        numbers = [f"{cell:.2g}" if cell < 10 else f"{cell:.0f}" for cell in cells]
        rows.append(
            [f"{billions:g} B", f"{size.gpus}", *numbers, f"{costs.most_workers}"]
        )
    header = ["model", "GPUs per worker", "merge, s", "evaluate, s", "ask, s"]
    header += ["record, s", "workers that the driver keeps busy"]
    return markdown_table(header, rows)


def unequal_workers() -> str:
    """Eight workers, with and without a barrier, by the time of a trial."""
    rows = []
    for seconds in (10, 60, 600):
        costs = TrialCosts(
            0.05 * seconds,
            0.95 * seconds,
            mmmo_ask_seconds(TRIALS, parameters=10, objectives=3),
            spread=ASSUMED.spread,
        )
        cells = [f"{seconds} s"]
        for speeds in ([1.0] * 8, SPEEDS):
            for generation in (None, 8):
                result = forecast(
                    costs, TRIALS, 8, speeds=speeds, generation=generation
                )
                cells.append(f"{result.idle:.1%}")
        rows.append(cells)
    header = ["time of a trial", "equal, one by one", "equal, generations of 8"]
    header += ["speeds 1 to 3, one by one", "speeds 1 to 3, generations of 8"]
    return markdown_table(header, rows)


def fits() -> str:
    """What sizes need on one GPU, with sources on the device and mapped."""
    rows = []
    for billions in (0.5, 7, 13, 32, 70):
        models = Size.of(billions).models
        free = Free(10**13, 10**13, 1, 10**13)
        cells = [f"{billions:g} B", gigabytes(models.live), gigabytes(models.whole)]
        for sources in ("device", "mmap"):
            plan = plan_memory(models, free, "cuda", sources)
            assert plan.gpu is not None
            cells.append(gigabytes(plan.gpu))
        rows.append([*cells, gigabytes(models.mapped)])
    header = ["model", "live model", "base and sources"]
    header += ["one GPU, `sources: device`", "one GPU, `sources: mmap`"]
    header += ["files in the host's memory"]
    return markdown_table(header, rows)


def gigabytes(size: float) -> str:
    """Bytes as text."""
    if size >= 1e12:
        return f"{size / 1e12:.1f} TB"
    return f"{size / 1e9:.0f} GB"


def hours(seconds: float) -> str:
    """Seconds as text."""
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 100 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} d"


# ----- tables of what was measured


def asks(entries: Sequence[Entry]) -> str:
    """Seconds of a proposal, measured and by the fit that forecasts use."""
    found = {}
    for entry in entries:
        if entry["part"] == "ask":
            key = entry["parameters"], entry["objectives"], entry["observations"]
            found[key] = entry["seconds"]
    rows = []
    for parameters, objectives in SPACES:
        cells = [str(parameters), str(objectives)]
        for n in OBSERVATIONS:
            cells.append(f"{found[parameters, objectives, n]:.2f}")
        for trials in (60, 300, 1000):
            fit = mmmo_ask_seconds(trials, parameters, objectives)
            cells.append(f"{fit:.2f}")
        rows.append(cells)
    header = ["parameters", "objectives", *(f"{n}" for n in OBSERVATIONS)]
    header += [f"mean of {trials}, fit" for trials in (60, 300, 1000)]
    return markdown_table(header, rows, text_columns=0)


def places(entries: Sequence[Entry]) -> str:
    """Seconds of a merge by where its sources are."""
    found: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry["part"] == "sources":
            row = found.setdefault(entry["method"], {})
            row[entry["place"]] = entry["seconds"]
    rows = []
    for method, seconds in found.items():
        cells = [f"{seconds[place]:.2f}" for place in ("memory", "mapped", "read")]
        rows.append([method, *cells])
    header = ["method", "copied into memory", "mapped", "read each time"]
    return markdown_table(header, rows)


def drivers(entries: Sequence[Entry]) -> str:
    """Searches whose workers sleep, beside their forecasts."""
    latest: dict[float, Entry] = {}
    for entry in entries:
        if entry["part"] == "driver":
            latest[entry["unequal"]] = entry
    rows = []
    for unequal, entry in latest.items():
        error = entry["forecast wall"] / entry["wall"] - 1
        rows.append(
            [
                "equal" if unequal == 1 else f"1 to {unequal:.0f}",
                f"{entry['trials']}",
                f"{entry['ask']:.2f}",
                f"{entry['record']:.2f}",
                f"{entry['wall']:.0f}",
                f"{entry['forecast wall']:.0f}",
                f"{error:+.1%}",
                f"{entry['idle']:.1%}",
                f"{entry['forecast idle']:.1%}",
            ]
        )
    header = ["speeds of 8 workers", "trials", "ask, s", "record, s", "wall, s"]
    header += ["forecast, s", "error", "workers wait", "forecast"]
    return markdown_table(header, rows)


def studies(entries: Sequence[Entry]) -> str:
    """Searches beside the forecast from their baselines, and their planned memory."""
    latest: dict[str, Entry] = {}
    for entry in entries:
        if entry["part"] == "study":
            latest[entry["study"]] = entry
    rows = []
    for name, entry in latest.items():
        error = entry["forecast"] / entry["seconds"] - 1
        proposed = entry["trials"] - entry["baselines"]
        # By the fit as it was when the run was made; only runs that a fit was changed after.
        first = ""
        if "first forecast" in entry:
            first = f"{entry['first forecast'] / entry['seconds'] - 1:+.1%}"
        rows.append(
            [
                name,
                f"{entry['baseline']:.2f}",
                f"{proposed}",
                f"{entry['seconds']:.1f}",
                f"{entry['forecast']:.1f}",
                f"{error:+.1%}",
                first,
                f"{entry['memory'] / 1e9:.2f}",
                f"{entry['planned memory'] / 1e9:.2f}",
                f"{entry['planned batch'] / 1e9:.2f}",
            ]
        )
    header = ["study", "a baseline, s", "proposed trials", "processor s", "forecast, s"]
    header += [
        "error",
        "error of the fit before",
        "memory, GB",
        "planned, GB",
        "of it for a batch, GB",
    ]
    return markdown_table(header, rows)


def tables() -> str:
    """Every table of the two pages."""
    entries = read_entries(FILE)
    parts = [
        fits(),
        large_models(),
        costs_of_sizes(),
        unequal_workers(),
        asks(entries),
        places(entries),
        drivers(entries),
        studies(entries),
        str(ASSUMED),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, or print the tables."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--parts", default=",".join(PARTS))
    commands.add_parser("table")
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.command == "table":
        print(tables())
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    measurements = {
        "ask": measure_asks,
        "sources": measure_sources,
        "driver": measure_driver,
        "study": measure_studies,
    }
    for part in arguments.parts.split(","):
        for entry in measurements[part]():
            print(entry, flush=True)
            append_entry(FILE, entry)


if __name__ == "__main__":
    main()
