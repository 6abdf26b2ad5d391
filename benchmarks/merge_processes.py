"""docs/lab/speed.md: a merge by one process, by several, and the most that several could reach.

    python -m benchmarks.merge_processes run --methods linear,ties --workers 2     # 4 GB of inputs
    python -m benchmarks.merge_processes run --size 2 --repeat 5 --write
    python -m benchmarks.merge_processes table                # from benchmarks/results/
    python -m benchmarks.merge_processes balance              # seconds; measures nothing

Three things follow each other, as often as `--repeat` says: a merge by one process; N of these at
once, each a merge of its own; one merge by N processes. Cores share caches, memory and, as
hyperthreads, arithmetic units, so that N merges at once take longer than one. `possible` is their
throughput over that of one merge: what N processes reach that never wait for each other.
`efficiency` is the speed-up of one merge over that. The merges are made as `paretomerge merge`
makes them; start, plan and checksums count.
"""

import argparse
import heapq
import math
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.merge import (
    METHODS,
    OURS,
    SIZES,
    Run,
    Setup,
    comma_separated,
    facts,
    make_models,
    measure,
    read_once,
    recipe,
)
from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)

if TYPE_CHECKING:
    from benchmarks.workloads import Shape
    from paretomerge.merging.plan.plan import Plan
    from paretomerge.merging.tasks import Piece

FILE = RESULTS / "merge_processes.jsonl"
DEFAULT_METHODS = ["linear", "ties", "dare_linear", "dare_ties"]
HEADER = (
    "method",
    "wall s, one process",
    "N processes",
    "speed-up",
    "possible",
    "efficiency",
    "CPU s, one process",
    "N processes",
    "beyond files MiB, one process",
    "N processes",
)


def rounds(method: str, workers: int, setup: Setup) -> list[dict[str, list[Run]]]:
    """What was measured, for each repetition: `one`, `at once` and `several` -> runs."""
    results = []
    with tempfile.TemporaryDirectory(dir=setup.folder.parent) as name:
        folder = Path(name)
        text, models = recipe(method, setup.folder, setup.dtype)
        (folder / "recipe.yml").write_text(text)
        for _ in range(setup.repeat):
            read_once(models)
            one = merges_at_once(folder, 1, workers=1)
            at_once = merges_at_once(folder, workers, workers=1)
            several = merges_at_once(folder, 1, workers=workers)
            results.append({"one": one, "at once": at_once, "several": several})
    return results


def merges_at_once(folder: Path, count: int, workers: int) -> list[Run]:
    """Make so many merges of one recipe at the same time, each by so many processes."""
    outs = [folder / f"out{number}" for number in range(count)]

    def merge(out: Path) -> Run:
        command = [OURS, "merge", str(folder / "recipe.yml"), str(out)]
        return measure([*command, "--workers", str(workers)], workers)

    with ThreadPoolExecutor(count) as pool:
        runs = list(pool.map(merge, outs))
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)
    return runs


def row(method: str, measured: Sequence[dict[str, list[Run]]]) -> list[str]:
    """A method's row of the table: medians over the repetitions."""
    speed_ups = []
    possible = []
    for runs in measured:
        one = runs["one"][0]["wall"]
        at_once = runs["at once"]
        slowest = max(run["wall"] for run in at_once)
        speed_ups.append(one / runs["several"][0]["wall"])
        possible.append(len(at_once) * one / slowest)
    efficiencies = []
    for reached, limit in zip(speed_ups, possible, strict=True):
        efficiencies.append(reached / limit)
    cells = [
        method,
        f"{median_of(measured, 'one', 'wall'):.1f}",
        f"{median_of(measured, 'several', 'wall'):.1f}",
        f"{statistics.median(speed_ups):.2f}",
        f"{statistics.median(possible):.2f}",
        f"{statistics.median(efficiencies):.2f}",
    ]
    for figure in ("cpu", "beyond"):
        for kind in ("one", "several"):
            value = median_of(measured, kind, figure)
            cells.append(f"{value:.1f}" if figure == "cpu" else f"{value:.0f}")
    return cells


def median_of(
    measured: Sequence[dict[str, list[Run]]], kind: str, figure: str
) -> float:
    """The median of one figure of single merges."""
    return statistics.median(runs[kind][0][figure] for runs in measured)


def report(entries: Sequence[Entry]) -> str:
    """One table per size and number of processes; of repeated measurements the last counts."""
    groups: dict[tuple[str, int], dict[str, Entry]] = {}
    for entry in entries:
        key = (entry["size"], entry["workers"])
        groups.setdefault(key, {})[entry["name"]] = entry
    blocks = []
    for (_, workers), group in groups.items():
        rows = [row(name, entry["rounds"]) for name, entry in group.items()]
        about = list(group.values())[-1]["facts"]
        texts = [f"{name}: {value}" for name, value in about.items()]
        blocks.append(f"N = {workers} ({', '.join(texts)})")
        blocks.append(markdown_table(list(HEADER), rows))
    return "\n\n".join(blocks)


def balance() -> str:
    """The speed-up that the sizes of the tasks allow, by model, kind of method and processes."""
    from benchmarks.workloads import SHAPES, Shape

    shapes = {"0.5 B": SHAPES["0.5"], "7 B": Shape(28, 3584, 18944, 28, 4)}
    counts = (2, 4, 8, 16, 32, 64)
    rows = []
    for name, shape in shapes.items():
        for method in ("linear", "ties"):
            with tempfile.TemporaryDirectory() as folder:
                speed_ups = balanced_speed_ups(Path(folder), shape, method, counts)
            rows.append([f"{name}, {method}", *(f"{value:.1f}" for value in speed_ups)])
    return markdown_table(["processes", *map(str, counts)], rows)


def balanced_speed_ups(
    folder: Path, shape: "Shape", method: str, counts: Sequence[int]
) -> list[float]:
    """Total work over the work of the process with the most, for each number of processes."""
    from benchmarks.workloads import FILE as WEIGHTS
    from benchmarks.workloads import MODELS, header, write_config
    from paretomerge.merging.plan.make import make_plan
    from paretomerge.merging.tasks import cut_into_tasks

    tensors = shape.tensors()
    n_bytes = 2 * sum(math.prod(sides) for sides in tensors.values())
    for model in MODELS:
        write_config(folder / model, shape)
        # The file needs no disk: nothing is read but its header.
        with (folder / model / WEIGHTS).open("wb") as file:
            file.write(header(tensors))
            file.truncate(file.tell() + n_bytes)
    plan = make_plan(recipe(method, folder, "bfloat16")[0])
    speed_ups = []
    for count in counts:
        work = [0] * count
        for task in cut_into_tasks(plan, count):
            # The process that is free first takes the next task.
            free_first = heapq.heappop(work)
            heapq.heappush(
                work, free_first + sum(elements(plan, piece) for piece in task)
            )
        speed_ups.append(sum(work) / max(work))
    return speed_ups


def elements(plan: "Plan", piece: "Piece") -> int:
    """The number of elements of a piece."""
    shape = plan.jobs[piece.job].shape
    if piece.rows is None:
        return math.prod(shape)
    first, end = piece.rows
    return (end - first) * shape[-1]


def parse_arguments() -> argparse.Namespace:
    """The command line, as this module's docstring has it."""
    parser = documented_parser(__doc__)
    subcommands = parser.add_subparsers(dest="command", required=True)
    subcommands.add_parser("table")
    subcommands.add_parser("balance")
    running = subcommands.add_parser("run")
    add = running.add_argument
    add("--size", choices=SIZES, default="0.5", help="billions of parameters")
    add("--methods", type=comma_separated, default=DEFAULT_METHODS)
    add("--workers", type=int, default=2)
    add("--repeat", type=int, default=3)
    models = Path(tempfile.gettempdir()) / "pm-bench"
    add("--models", type=Path, default=models, help="folder of the inputs")
    add("--write", action="store_true", help="add the figures to benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.command == "run":
        unknown = set(arguments.methods).difference(METHODS)
        if unknown:
            running.error(f"unknown methods: {', '.join(sorted(unknown))}")
    return arguments


def main() -> None:
    """Measure, or print the report of what was measured."""
    arguments = parse_arguments()
    if arguments.command == "table":
        print(report(read_entries(FILE)))
        return
    if arguments.command == "balance":
        print(balance())
        return
    arguments.models.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        size=arguments.size,
        folder=make_models(arguments.models, arguments.size),
        dtype="bfloat16",
        repeat=arguments.repeat,
        mergekit=None,
    )
    about = facts(1, setup)
    del about["threads"]
    entries: list[Entry] = []
    for method in arguments.methods:
        entry: Entry = {
            "size": arguments.size,
            "workers": arguments.workers,
            "name": method,
            "facts": about,
            "rounds": rounds(method, arguments.workers, setup),
        }
        entries.append(entry)
        print(report([entry]) + "\n", flush=True)
    if arguments.write:
        for entry in entries:
            append_entry(FILE, entry)


if __name__ == "__main__":
    main()
