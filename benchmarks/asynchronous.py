"""docs/lab/scaling.md: what eight trials at a time cost in hypervolume, and how long workers wait.

    python -m benchmarks.asynchronous run --seeds 0 1 2 3 4      # half an hour on one core
    python -m benchmarks.asynchronous table

Searches of MM-MO with 60 evaluations on the merge landscape and on the specialists. Eight workers
are simulated: a trial takes 60 seconds on the slowest of them and 20 on the fastest, with a
deviation of 20 %, and the driver asks for one trial at a time, in the processor seconds that this
takes here. Nothing waits for a generation. Sequential searches have one worker.

Hypervolumes are those of the front, above the worst source per objective less a tenth of the range:
of true scores on the landscape, of search scores on the specialists.
"""

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection

from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    mean_and_deviation,
    read_entries,
)
from benchmarks.study_api import RecipeScorer
from paretomerge.examples import SPECIALISTS
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.problems import MergeLandscape
from paretomerge.search.registry import SearchProblem, make
from paretomerge.types import Array

FILE = RESULTS / "asynchronous.jsonl"
BUDGET = 60
SECONDS = 60.0  # of a trial on the slowest worker
SPEEDS = np.linspace(1, 3, 8)
N_EXAMPLES = 200  # of an evaluation on the landscape
COUNTS = (1, 8)


class Family(Protocol):
    """Merges that can be searched."""

    space: Mapping[str, BaseDistribution]
    baselines: Sequence[Mapping[str, Any]]
    n_sources: int

    def sampler(self, seed: int) -> BaseSampler:
        """MM-MO, set up for this family."""

    def evaluate(
        self, params: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """What the search sees of a merge: values `(m,)` and their standard errors."""

    def values(self, params: Mapping[str, Any]) -> Array:
        """What counts in the table: values `(m,)`."""


class Landscape:
    """The merge landscape, with noise."""

    def __init__(self) -> None:
        self._landscape = MergeLandscape.load()
        self.space: Mapping[str, BaseDistribution] = self._landscape.space
        self.baselines: Sequence[Mapping[str, Any]] = list(
            self._landscape.baselines.values()
        )
        self.n_sources = len(self._landscape.tasks)

    def sampler(self, seed: int) -> BaseSampler:
        """See `Family.sampler`."""
        problem = SearchProblem(
            self.space,
            self.n_sources,
            seed=seed,
            conditions=self._landscape.conditions,
            starts=len(self.baselines),
            sources=self.n_sources,
            trials=BUDGET,
        )
        return make("mmmo", problem)

    def evaluate(
        self, params: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """See `Family.evaluate`."""
        return self._landscape.evaluate(params, N_EXAMPLES, rng)

    def values(self, params: Mapping[str, Any]) -> Array:
        """The true scores."""
        return self._landscape.scores([params])[0]


class Specialists:
    """Merges of the shipped specialists."""

    def __init__(self) -> None:
        self._scorer = RecipeScorer(SPECIALISTS / "study.yaml")
        self.space: Mapping[str, BaseDistribution] = self._scorer.distributions
        self.baselines: Sequence[Mapping[str, Any]] = self._scorer.baselines
        self.n_sources = len(self._scorer.sources)

    def sampler(self, seed: int) -> BaseSampler:
        """See `Family.sampler`."""
        return self._scorer.sampler("mmmo", seed, BUDGET)

    def evaluate(
        self, params: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """See `Family.evaluate`; the examples are always the same ones."""
        scores = self._scorer(self._scorer.recipe(params), "search")
        objectives = [scores[name] for name in self._scorer.objectives]
        values = [score.value for score in objectives]
        stderr = [score.stderr for score in objectives]
        return np.array(values), np.array(stderr)

    def values(self, params: Mapping[str, Any]) -> Array:
        """The search scores."""
        return self.evaluate(params, np.random.default_rng(0))[0]


FAMILIES: Mapping[str, Callable[[], Family]] = {
    "landscape": Landscape,
    "specialists": Specialists,
}


@dataclass(order=True)
class _Running:
    """A trial on a worker, which is done at `end`, in seconds."""

    end: float
    worker: int
    trial: optuna.Trial


def simulate(family: Family, n_workers: int, seed: int) -> Entry:
    """One search; its hypervolume, and the share of the time in which workers wait."""
    directions = [StudyDirection.MAXIMIZE] * len(family.values(family.baselines[0]))
    study = optuna.create_study(directions=directions, sampler=family.sampler(seed))
    for params in family.baselines:
        study.enqueue_trial(dict(params))
    rng = np.random.default_rng([seed, n_workers])
    speeds = SPEEDS if n_workers > 1 else np.ones(1)
    running: list[_Running] = []
    # When the driver is free, and what each worker has done so far.
    now = 0.0
    working = np.zeros(n_workers)
    idle = list(range(n_workers))
    asked = 0
    all_params: list[Mapping[str, Any]] = []
    while asked < BUDGET or running:
        while idle and asked < BUDGET:
            start = time.process_time()
            trial = study.ask(dict(family.space))
            now += time.process_time() - start
            asked += 1
            worker = idle.pop()
            seconds = SECONDS / speeds[worker] * rng.lognormal(0.0, 0.2)
            working[worker] += seconds
            heapq.heappush(running, _Running(now + seconds, worker, trial))
        done = heapq.heappop(running)
        now = max(now, done.end)
        # The noise of a trial does not depend on when it is done.
        noise = np.random.default_rng([seed, done.trial.number])
        values, stderr = family.evaluate(done.trial.params, noise)
        done.trial.set_user_attr("stderr", stderr.tolist())
        study.tell(done.trial, values.tolist())
        all_params.append(done.trial.params)
        idle.append(done.worker)
        if asked == BUDGET and n_workers > 1:
            # The last trials run alone in any scheme: waiting is counted until here.
            return _entry(family, all_params, study, running, now, working)
    return _entry(family, all_params, study, running, now, working)


def _entry(
    family: Family,
    done: Sequence[Mapping[str, Any]],
    study: optuna.Study,
    running: Sequence[_Running],
    now: float,
    working: Array,
) -> Entry:
    busy = working.sum()
    # What runs has been counted to its end.
    for late in running:
        busy -= late.end - now
    idle_share = 1 - busy / (now * len(working))
    params = [*done, *(late.trial.params for late in running)]
    values = np.array([family.values(one) for one in params])
    sources = np.array([family.values(one) for one in family.baselines])
    reference = reference_point(sources[: family.n_sources])
    front = values[nondominated(values)]
    return {
        "hypervolume": hypervolume(front, reference),
        "idle": float(idle_share),
        "evaluations": len(params),
    }


def table() -> str:
    """Hypervolume of eight workers beside one, and the share of their time that they wait."""
    entries = read_entries(FILE)
    rows = []
    for family in FAMILIES:
        volumes: dict[int, list[float]] = {}
        idle: list[float] = []
        for entry in entries:
            if entry["family"] == family:
                volumes.setdefault(entry["workers"], []).append(entry["hypervolume"])
                if entry["workers"] > 1:
                    idle.append(entry["idle"])
        if not idle:
            continue
        one, eight = (volumes[count] for count in COUNTS)
        change = np.mean(eight) / np.mean(one) - 1
        rows.append(
            [
                family,
                str(len(eight)),
                mean_and_deviation(one, 4),
                mean_and_deviation(eight, 4),
                f"{100 * change:+.1f} %",
                f"{100 * np.mean(idle):.1f} %",
            ]
        )
    header = ["", "seeds", "one worker", "eight workers", "change", "workers wait"]
    return markdown_table(header, rows)


def main() -> None:
    """Run searches that are missing, or print the table."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    run.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = set()
    for entry in read_entries(FILE):
        known.add((entry["family"], entry["seed"], entry["workers"]))
    for name in arguments.families:
        family = FAMILIES[name]()
        for seed in arguments.seeds:
            for n_workers in COUNTS:
                if (name, seed, n_workers) in known:
                    continue
                entry = {"family": name, "seed": seed, "workers": n_workers}
                append_entry(FILE, entry | simulate(family, n_workers, seed))


if __name__ == "__main__":
    main()
