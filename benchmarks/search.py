"""docs/lab/search-benchmark.md: which optimiser has how much of the true front's hypervolume, when.

    python -m benchmarks.search run --problems 'zdt*-d10' re21 --peers mmmo nsga2 --seeds 0 1
    python -m benchmarks.search run --problems 'dtlz2-m2-*' --ablation   # ours, each part switched
    python -m benchmarks.search table [--write]          # from results/search/; also `ablation`
    python -m benchmarks.search speed [--write]          # what an ask takes, by n, d and m
    python -m benchmarks.search list                     # every problem and every peer

`paretomerge.problems` says what is searched and above which reference points, `peers` by whom. Each
(problem, peer, seed) is a cell. It runs in a process of its own with one thread, and its curve is
added to results/search/PROBLEM.jsonl when it is finished. Cells that are there with as many
evaluations are skipped, so that an interrupted run continues. No peer knows its budget, so a cell
of 300 evaluations serves 30, 60 and 100. `--again` measures anew, after a change of a sampler.
Timings mean something only where nothing else runs.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution

from benchmarks import peers, reporting, standings
from benchmarks.reporting import (
    REPOSITORY,
    append_entry,
    documented_parser,
    markdown_table,
)
from benchmarks.standings import EVERY, Cell
from paretomerge import problems
from paretomerge.search.mmmo.sampler import MMMOSampler

RESULTS = reporting.RESULTS / "search"
PAGE = REPOSITORY / "docs" / "lab" / "search-benchmark.md"

CellKey = tuple[str, str, int]
"""Problem, peer, seed."""


# ----- running


def missing(
    chosen: Sequence[str],
    peer_names: Sequence[str],
    seeds: Sequence[int],
    evaluations: int,
    again: bool,
) -> list[CellKey]:
    """Cells that are not there with as many evaluations.

    They are ordered by seed, so that an interrupted run is complete for some seeds.
    """
    measured = {}
    for problem in chosen:
        file = RESULTS / f"{problem}.jsonl"
        measured[problem] = {} if again else standings.load(file)
    cells = []
    for seed, problem, peer in product(seeds, chosen, peer_names):
        cell = measured[problem].get((peer, seed))
        if cell is None or cell.evaluations < evaluations:
            cells.append((problem, peer, seed))
    return cells


def run(cells: Sequence[CellKey], evaluations: int, jobs: int) -> int:
    """Measure the cells, and return the number of those that failed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers read it before they start
    failed = 0
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        futures: dict[Future[Cell], CellKey] = {}
        for key in cells:
            futures[pool.submit(measure, *key, evaluations)] = key
        for done, future in enumerate(as_completed(futures), 1):
            problem, peer, seed = futures[future]
            label = f"[{done}/{len(cells)}] {problem}, {peer}, seed {seed}"
            error = future.exception()
            if error is not None:
                failed += 1
                print(f"{label}: FAILED: {error!r}", file=sys.stderr, flush=True)
                continue
            cell = future.result()
            append_entry(RESULTS / f"{problem}.jsonl", cell.entry())
            seconds = statistics.mean(cell.seconds)
            share = cell.share[-1]
            print(f"{label}: {share:.4f}, {seconds:.3f} s per ask", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def measure(problem_name: str, peer: str, seed: int, evaluations: int) -> Cell:
    """One cell. Shares are of what a user would see after each ten evaluations."""
    torch.set_num_threads(1)
    problem = problems.get(problem_name)
    meter = peers.run(peer, problem, seed, evaluations)
    true_values = np.asarray(meter.true_values)
    shares, seconds = [], []
    for n in range(EVERY, evaluations + 1, EVERY):
        share = problem.hypervolume_share(true_values[:n], meter.y[:n])
        latest = meter.seconds[n - EVERY : n]
        shares.append(share)
        seconds.append(statistics.mean(latest))
    return Cell(peer, seed, tuple(shares), tuple(seconds))


# ----- what an ask takes


def speed(
    observations: Sequence[int], dimensions: Sequence[int], objectives: Sequence[int]
) -> str:
    """Median seconds of three asks of MMMOSampler after n observations with known noise."""
    torch.set_num_threads(1)
    rows = []
    for d, m in product(dimensions, objectives):
        cells = [str(d), str(m)]
        for n in observations:
            seconds = f"{ask_seconds(n, d, m):.2f}"
            cells.append(seconds)
            print(f"d {d}, m {m}, n {n}: {seconds} s", file=sys.stderr, flush=True)
        rows.append(cells)
    header = ["parameters", "objectives", *(f"{n} observations" for n in observations)]
    return markdown_table(header, rows, text_columns=0)


def ask_seconds(
    n: int, d: int, m: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds of three asks, each told, after n fabricated observations."""
    rng = np.random.default_rng([n, d, m])
    space: dict[str, BaseDistribution] = {}
    for i in range(d):
        space[f"x{i}"] = FloatDistribution(0.0, 1.0)
    centres = rng.random((m, d))
    stderr = [0.02] * m

    def values(params: Mapping[str, float]) -> list[float]:
        x = np.array([params[key] for key in space])
        distance = ((x - centres) ** 2).mean(1)
        noise = 0.02 * rng.standard_normal(m)
        noisy: list[float] = (1 - distance + noise).tolist()
        return noisy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = MMMOSampler(seed=0, space=dict(space), reference=[0.7] * m)
    study = optuna.create_study(directions=["maximize"] * m, sampler=sampler)
    # All points are drawn before the first value, as the published timings were.
    points = rng.random((n, d)).tolist()
    for point in points:
        params = dict(zip(space, point, strict=True))
        finished = optuna.trial.create_trial(
            params=params,
            distributions=space,
            values=values(params),
            user_attrs={"stderr": stderr},
        )
        study.add_trial(finished)
    seconds = []
    for _ in range(3):
        since = clock()
        trial = study.ask(space)
        seconds.append(clock() - since)
        trial.set_user_attr("stderr", stderr)
        study.tell(trial, values(trial.params))
    return statistics.median(seconds)


# ----- tables


def measured_problems() -> dict[str, dict[tuple[str, int], Cell]]:
    """Problem -> its cells, in the order of `problems.names()`."""
    measured = {}
    for name in problems.names():
        path = RESULTS / f"{name}.jsonl"
        if path.exists():
            measured[name] = standings.load(path)
    return measured


def write(section: str, text: str, page: Path = PAGE) -> None:
    """Put `text` between the page's markers of `section`."""
    begin = f"<!-- {section}: written by benchmarks/search.py -->"
    end = f"<!-- end of {section} -->"
    before, begin_found, rest = page.read_text().partition(begin)
    _, end_found, after = rest.partition(end)
    if not (begin_found and end_found):
        raise SystemExit(f"{page.name}: expected the markers {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


# ----- the command


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names that match a pattern, in their order; `all` matches all."""
    for pattern in patterns:
        if pattern != "all" and not any(fnmatch(name, pattern) for name in names):
            listed = ", ".join(names)
            raise SystemExit(
                f"--problems: expected names or patterns of {listed}; got {pattern}"
            )
    if "all" in patterns:
        return list(names)
    matches = []
    for name in names:
        if any(fnmatch(name, pattern) for pattern in patterns):
            matches.append(name)
    return matches


def parse_arguments() -> argparse.Namespace:
    """The command line, as this module's docstring has it."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument(
        "--problems", nargs="+", required=True, help="names, patterns, or all"
    )
    running.add_argument(
        "--peers",
        nargs="+",
        default=[],
        help="names (default: all); 'mmmo -part' is a name",
    )
    running.add_argument(
        "--ablation",
        action="store_true",
        help="ours with each part switched, not the peers",
    )
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    running.add_argument("--evaluations", type=int, default=100)
    running.add_argument("--jobs", type=int, default=1)
    running.add_argument(
        "--again", action="store_true", help="measure cells that are there, too"
    )
    for name in ("table", "ablation"):
        command = commands.add_parser(name)
        command.add_argument(
            "--write", action="store_true", help=f"into docs/lab/{PAGE.name}"
        )
    timing = commands.add_parser("speed")
    timing.add_argument(
        "--observations", nargs="+", type=int, default=[20, 50, 100, 200]
    )
    timing.add_argument("--parameters", nargs="+", type=int, default=[5, 20, 100])
    timing.add_argument("--objectives", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6])
    timing.add_argument("--write", action="store_true")
    commands.add_parser("list")
    return parser.parse_args()


def run_command(arguments: argparse.Namespace) -> int:
    """`run`: measure what is missing; exit status 1 where a cell failed."""
    evaluations = arguments.evaluations
    if evaluations < EVERY or evaluations % EVERY:
        raise SystemExit(
            f"--evaluations: expected a multiple of {EVERY}, got {evaluations}"
        )
    chosen = matching(arguments.problems, problems.names())
    peer_names = arguments.peers or peers.names()
    if arguments.ablation:
        peer_names = peers.ablation()
    for name in peer_names:
        peers.find(name)  # names are checked before anything runs
    cells = missing(chosen, peer_names, arguments.seeds, evaluations, arguments.again)
    print(f"{len(cells)} cells to measure", flush=True)
    return 1 if run(cells, evaluations, arguments.jobs) else 0


def main() -> int:
    """Run cells, print or write a table, or list the names; the exit status."""
    arguments = parse_arguments()
    if arguments.command == "run":
        return run_command(arguments)
    if arguments.command == "list":
        print("problems", *problems.names(), sep="\n  ")
        print("peers", *peers.names(), sep="\n  ")
        return 0
    if arguments.command == "speed":
        section = "speed"
        text = speed(arguments.observations, arguments.parameters, arguments.objectives)
    elif arguments.command == "ablation":
        section = "ablation"
        text = standings.ablation(measured_problems())
    else:
        section = "results"
        text = standings.results(measured_problems(), peers.names())
    print(text)
    if arguments.write:
        write(section, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
