"""The search benchmark: which optimiser has how much of the true front's hypervolume, after how many evaluations.

    python benchmarks/search.py run --problems 'zdt*-d10' re21 --peers mmmo nsga2 botorch --seeds 0 1 2 3 4 --evaluations 100
    python benchmarks/search.py run --problems 'dtlz2-m2-*' --ablation      # ours with each part switched
    python benchmarks/search.py table [--write]                             # and `ablation`: from results/search/
    python benchmarks/search.py speed [--write]                             # what an ask takes, by n, d and m
    python benchmarks/search.py list                                        # every problem and every peer

problems.py says what is searched and above which reference points, peers.py who searches. Each (problem, peer, seed)
is a cell, run in a process of its own with one thread; its curve is added to results/search/PROBLEM.jsonl when it is
done. Cells that are there with as many evaluations are skipped, so a run that was interrupted goes on; no peer knows
its budget, so a cell of 300 evaluations serves 30, 60 and 100. `--again` measures anew (after a change of a sampler).
Timings mean something only where nothing else runs.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import optuna
import peers
import problems
import standings
import torch
from optuna.distributions import FloatDistribution
from standings import EVERY, Cell

from paretomerge.search.mmmo.sampler import MMMOSampler

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "search"
PAGE = HERE.parent / "docs" / "search-benchmark.md"


def measure(problem: str, peer: str, seed: int, evaluations: int) -> Cell:
    """One cell. Shares are of what a user would see after each ten evaluations; see Problem.share."""
    torch.set_num_threads(1)
    task = problems.problem(problem)
    meter = peers.run(peer, task, seed, evaluations)
    true, seen = np.asarray(meter.true), np.asarray(meter.seen)
    ends = range(EVERY, evaluations + 1, EVERY)
    return Cell(
        peer,
        seed,
        tuple(task.share(true[:n], seen[:n]) for n in ends),
        tuple(statistics.mean(meter.seconds[n - EVERY : n]) for n in ends),
    )


def missing(
    chosen: Sequence[str], who: Sequence[str], seeds: Sequence[int], evaluations: int, again: bool
) -> list[tuple[str, str, int]]:
    """Cells that are not there with as many evaluations, seed by seed, so that an interrupted run is complete for some."""
    known = {name: {} if again else standings.load(RESULTS / f"{name}.jsonl") for name in chosen}
    cells = [(name, peer, seed) for seed, name, peer in product(seeds, chosen, who)]
    return [
        c
        for c in cells
        if (found := known[c[0]].get(c[1:])) is None or found.evaluations < evaluations
    ]


def run(cells: Sequence[tuple[str, str, int]], evaluations: int, jobs: int) -> int:
    """Measure the cells; the number of those that failed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # children read it before they start
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = 0
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        futures: dict[Future[Cell], tuple[str, str, int]] = {
            pool.submit(measure, *cell, evaluations): cell for cell in cells
        }
        for done, future in enumerate(as_completed(futures), 1):
            problem, peer, seed = futures[future]
            if (error := future.exception()) is not None:
                failed += 1
                print(
                    f"[{done}/{len(cells)}] {problem}, {peer}, seed {seed}: FAILED: {error!r}",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            cell = future.result()
            with (RESULTS / f"{problem}.jsonl").open("a") as file:
                file.write(cell.line() + "\n")
            seconds = statistics.mean(cell.seconds)
            print(
                f"[{done}/{len(cells)}] {problem}, {peer}, seed {seed}: {cell.share[-1]:.4f}, {seconds:.3f} s per ask",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def speed(observations: Sequence[int], dimensions: Sequence[int], objectives: Sequence[int]) -> str:
    """Median seconds of three asks of MMMOSampler, each told, after n fabricated observations with known noise."""
    torch.set_num_threads(1)
    lines = []
    for d, m in product(dimensions, objectives):
        texts = []
        for n in observations:
            texts.append(f"{_ask_seconds(n, d, m):.2f}")
            print(f"d {d}, m {m}, n {n}: {texts[-1]} s", file=sys.stderr, flush=True)
        lines.append("| " + " | ".join([str(d), str(m), *texts]) + " |")
    head = (
        "| parameters | objectives | "
        + " | ".join(f"{n} observations" for n in observations)
        + " |"
    )
    return "\n".join([head, "|" + "---:|" * (2 + len(observations)), *lines])


def _ask_seconds(n: int, d: int, m: int) -> float:
    rng = np.random.default_rng([n, d, m])
    space = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(d)}
    centres = rng.random((m, d))

    def values(params: dict[str, float]) -> list[float]:
        x = np.array([params[key] for key in space])
        y: list[float] = (1 - ((x - centres) ** 2).mean(1) + 0.02 * rng.standard_normal(m)).tolist()
        return y

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = MMMOSampler(seed=0, space=dict(space), reference=[0.7] * m)
    study = optuna.create_study(directions=["maximize"] * m, sampler=sampler)
    noise = {"stderr": [0.02] * m}
    points = [dict(zip(space, rng.random(d).tolist(), strict=True)) for _ in range(n)]
    create = optuna.trial.create_trial
    study.add_trials(
        [
            create(params=p, distributions=dict(space), values=values(p), user_attrs=noise)
            for p in points
        ]
    )
    taken = []
    for _ in range(3):
        since = time.perf_counter()
        trial = study.ask(dict(space))
        taken.append(time.perf_counter() - since)
        trial.set_user_attr("stderr", noise["stderr"])
        study.tell(trial, values(trial.params))
    return statistics.median(taken)


def write(section: str, text: str, page: Path = PAGE) -> None:
    """Put `text` between the page's markers of `section`."""
    begin, end = (
        f"<!-- {section}: written by benchmarks/search.py -->",
        f"<!-- end of {section} -->",
    )
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page.name}: expected the markers {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _matching(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names that any pattern matches, in the table's order; `all` is all."""
    for pattern in patterns:
        if pattern != "all" and not any(fnmatch(name, pattern) for name in known):
            raise SystemExit(
                f"--problems: expected names or patterns of {', '.join(known)}; got {pattern}"
            )
    return [
        name
        for name in known
        if any(pattern == "all" or fnmatch(name, pattern) for pattern in patterns)
    ]


def _found() -> dict[str, dict[tuple[str, int], Cell]]:
    """What is in the results, in the order of the problems."""
    order = {name: i for i, name in enumerate(problems.names())}
    paths = sorted(RESULTS.glob("*.jsonl"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
    return {path.stem: standings.load(path) for path in paths}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("run")
    measured.add_argument("--problems", nargs="+", required=True, help="names, patterns, or all")
    measured.add_argument(
        "--peers", nargs="+", default=[], help="names (default: all); 'mmmo -part' is a name"
    )
    measured.add_argument(
        "--ablation",
        action="store_true",
        help="ours with each part switched, in place of the peers",
    )
    measured.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    measured.add_argument("--evaluations", type=int, default=100)
    measured.add_argument("--jobs", type=int, default=1)
    measured.add_argument(
        "--again", action="store_true", help="measure cells that are there already, too"
    )
    for name in ("table", "ablation"):
        commands.add_parser(name).add_argument(
            "--write", action="store_true", help=f"into docs/{PAGE.name}"
        )
    timed = commands.add_parser("speed")
    timed.add_argument("--observations", nargs="+", type=int, default=[20, 50, 100, 200])
    timed.add_argument("--parameters", nargs="+", type=int, default=[5, 20, 100])
    timed.add_argument("--objectives", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6])
    timed.add_argument("--write", action="store_true")
    commands.add_parser("list")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> int:
    if arguments.evaluations < EVERY or arguments.evaluations % EVERY:
        raise SystemExit(
            f"--evaluations: expected a multiple of {EVERY}, got {arguments.evaluations}"
        )
    chosen = _matching(arguments.problems, problems.names())
    who = peers.ablation() if arguments.ablation else arguments.peers or peers.names()
    for name in who:
        peers.find(name)  # names are checked before anything runs
    cells = missing(chosen, who, arguments.seeds, arguments.evaluations, arguments.again)
    print(f"{len(cells)} cells to measure", flush=True)
    return 1 if run(cells, arguments.evaluations, arguments.jobs) else 0


def main() -> int:
    arguments = _arguments()
    if arguments.command == "run":
        return _run(arguments)
    if arguments.command == "list":
        print(
            "\n".join(
                [
                    "problems",
                    *(f"  {n}" for n in problems.names()),
                    "peers",
                    *(f"  {n}" for n in peers.names()),
                ]
            )
        )
        return 0
    if arguments.command == "speed":
        section, text = (
            "speed",
            speed(arguments.observations, arguments.parameters, arguments.objectives),
        )
    elif arguments.command == "ablation":
        section, text = "ablation", standings.ablation(_found())
    else:
        section, text = "results", standings.results(_found(), peers.names())
    print(text)
    if arguments.write:
        write(section, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
