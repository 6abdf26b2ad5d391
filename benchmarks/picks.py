"""docs/lab/picks.md: what a pick is worth, beside its front's best and single-objective searches.

    python -m benchmarks.picks run landscape FOLDER --seeds 0 1 2 3 4    # hours on one core
    python -m benchmarks.picks run specialists FOLDER --seeds 0 1 2 3 4
    python -m benchmarks.picks run specialists FOLDER --searches MM-MO   # regrets alone
    python -m benchmarks.picks run specialists FOLDER --preferences 0    # the mean alone
    python -m benchmarks.picks run smollm FOLDER --searches MM-MO        # 1.5 hours a seed
    python -m benchmarks.picks table
    python -m benchmarks.picks share FOLDER --seeds 100 101              # half an hour

Ten preferences: the mean of the objectives, and nine sets of weights that were drawn once. Every
search has 60 evaluations. The value of a merge for a preference is that of its held-out scores,
scaled by the range of the sources. Searches of one objective see that value of the search scores,
and pick the best that they saw.

On the landscape an evaluation has 200 examples of its own, and held-out scores are the true ones.
The specialists are studies in FOLDER, which continue: 300 search examples of each task, 300 others
for the selection, 600 held out. So are the experts of SmolLM2, which `make smollm` unpacks: 40
search examples of each task, 60 others for the selection, 100 held out.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, GPSampler, TPESampler
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
from benchmarks.smollm import EXAMPLE
from paretomerge.decide.decision import Decision
from paretomerge.decide.pick import Choice, decide_for
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.examples import SPECIALISTS
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.pareto.preference import Preference, PreferSetting, Scale
from paretomerge.problems import MergeLandscape
from paretomerge.record.results import Parameters, Results
from paretomerge.record.trial import Trial
from paretomerge.search.baselines.scalarised import ScalarisedSampler, cma
from paretomerge.search.registry import SearchProblem, make
from paretomerge.study.study import Study, load_study
from paretomerge.types import Array

FILE = RESULTS / "picks.jsonl"
SHARES_FILE = RESULTS / "picks-shares.jsonl"
BUDGET = 60
N_EXAMPLES = 200  # of an evaluation on the landscape
VERY_MANY = 10**9  # examples of the landscape's true scores
OURS, PREFERRING = "MM-MO", "MM-MO, with `prefer`"
SINGLE = ("CMA-ES", "TPE", "Optuna's GP")
SEARCHES = (OURS, PREFERRING, *SINGLE)
WAYS = ("search scores", "belief", "selection")
SHARES = (0.0, 0.1, 0.25)
N_PREFERENCES = 10


def wanted(objectives: Sequence[str]) -> list[PreferSetting]:
    """The ten preferences, as users write them."""
    rng = np.random.default_rng(0)
    preferences: list[PreferSetting] = ["mean"]
    drawn = rng.dirichlet(np.ones(len(objectives)), N_PREFERENCES - 1)
    for weights in drawn.tolist():
        preferences.append(dict(zip(objectives, weights, strict=True)))
    return preferences


class Family(Protocol):
    """Merges that can be searched."""

    objectives: tuple[str, ...]

    def search(
        self, seed: int, prefer: PreferSetting | None, share: float | None, single: str
    ) -> "Found":
        """Run a search: of the front, or, if `single` names a sampler, of the preference alone."""


class Found(Protocol):
    """What a search has found."""

    @property
    def results(self) -> Results:
        """Its trials; those of the front have held-out scores."""

    def decide(self, prefer: PreferSetting) -> Decision:
        """The pick for a preference, after selection examples were asked where there are any."""

    def held_out(self, number: int) -> dict[str, Score]:
        """Held-out scores of a trial."""


# ----- the merge landscape


@dataclass(frozen=True)
class FoundOnLandscape:
    """The trials of a search on the landscape, all with their true scores."""

    results: Results

    def decide(self, prefer: PreferSetting) -> Decision:
        """The pick; there are no selection examples."""
        return decide_for(self.results, Choice(prefer))

    def held_out(self, number: int) -> dict[str, Score]:
        """The true scores of a trial."""
        return dict(self.results.trials[number].held_out or {})


class Landscape:
    """The merge landscape, with noise."""

    def __init__(self, folder: Path) -> None:
        self._landscape = MergeLandscape.load()
        self.objectives = self._landscape.tasks

    def search(
        self, seed: int, prefer: PreferSetting | None, share: float | None, single: str
    ) -> FoundOnLandscape:
        """Run a search."""
        landscape = self._landscape
        baselines = list(landscape.baselines.values())
        n_sources = len(self.objectives)
        sampler: BaseSampler
        if single:
            assert prefer is not None
            preference = Preference.parse(prefer, self.objectives)
            start = baselines[n_sources]
            sampler = single_sampler(
                single, preference, seed, space=landscape.space, start=start
            )
        else:
            weights: Any = prefer
            if isinstance(prefer, dict):
                weights = Preference.parse(prefer, self.objectives).weights
            problem = SearchProblem(
                landscape.space,
                n_sources,
                seed=seed,
                conditions=landscape.conditions,
                starts=len(baselines),
                sources=n_sources,
                trials=BUDGET,
                prefer=weights,
            )
            options = {} if share is None else {"prefer_after": after(share)}
            sampler = make("mmmo", problem, options)
        directions = [StudyDirection.MAXIMIZE] * n_sources
        study = optuna.create_study(directions=directions, sampler=sampler)
        for params in baselines:
            study.enqueue_trial(dict(params))
        trials = []
        for number in range(BUDGET):
            asked = study.ask(dict(landscape.space))
            rng = np.random.default_rng([seed, number])
            values, stderr = landscape.evaluate(asked.params, N_EXAMPLES, rng)
            asked.set_user_attr("stderr", stderr.tolist())
            study.tell(asked, values.tolist())
            scores, true_scores = {}, {}
            truth = landscape.scores([asked.params])[0]
            for k, name in enumerate(self.objectives):
                scores[name] = Score(values[k], stderr[k], N_EXAMPLES)
                true_scores[name] = Score(truth[k], 0.0, VERY_MANY)
            trials.append(Trial(number, asked.params, scores, held_out=true_scores))
        results = Results(
            objectives=tuple(Objective(name) for name in self.objectives),
            sources=tuple(landscape.baselines)[:n_sources],
            trials=tuple(trials),
            parameters={0: Parameters(landscape.space, landscape.conditions)},
        )
        return FoundOnLandscape(results)


# ----- real models


@dataclass(frozen=True)
class FoundByStudy:
    """A study that has ended."""

    study: Study
    _measured: dict[int, dict[str, Score]] = field(default_factory=dict)

    # The record is read once: its trials have thousands of scores, and do not change any more.
    @cached_property
    def results(self) -> Results:
        """The record's."""
        return self.study.results()

    def decide(self, prefer: PreferSetting) -> Decision:
        """The study's own decision."""
        return self.study.decide(prefer)

    def held_out(self, number: int) -> dict[str, Score]:
        """Held-out scores of a trial; measured where they are missing."""
        if number not in self._measured:
            self._measured[number] = self.study.evaluate(number)
        return self._measured[number]


class OfStudy:
    """Merges that a study.yaml searches.

    Args:
        file: The study.yaml.
        items: Examples of each task, by kind of split.
        folder: Where the studies are kept.
    """

    def __init__(self, file: Path, items: Mapping[str, int], folder: Path) -> None:
        self._folder = folder.resolve()
        overrides = ["watch=[]", f"trials={BUDGET}"]
        overrides.append(f"evaluate.cache={self._folder / 'scores'}")
        for split, count in items.items():
            overrides.append(f"evaluate.{split}_items={count}")
        self._settings = load_study(file, overrides).settings
        self.objectives = tuple(measure.name for measure in self._settings.objectives)

    def search(
        self, seed: int, prefer: PreferSetting | None, share: float | None, single: str
    ) -> FoundByStudy:
        """Run a study."""
        sampler: Any = "mmmo"
        if share is not None:
            sampler = {"name": "mmmo", "prefer_after": after(share)}
        label = f"{seed}-{single or 'ours'}-{share}"
        settings = replace(self._settings, seed=seed, sampler=sampler)
        if prefer is not None:
            label += f"-{wanted(self.objectives).index(prefer)}"
        if single:
            assert prefer is not None
            preference = Preference.parse(prefer, self.objectives)
            space = Study.from_settings(settings).search().space
            start = list(space.baselines().values())[len(space.sources)]
            settings = replace(
                settings,
                sampler=single_sampler(
                    single, preference, seed, space=space.distributions, start=start
                ),
            )
        elif prefer is not None and prefer != "knee":
            settings = replace(settings, prefer=prefer)
        study = Study.from_settings(replace(settings, out=self._folder / label))
        # The seed of a study also draws DARE's masks, which all searches share here.
        study.run(lambda event: None)
        if not single:
            study.score_held_out()
        return FoundByStudy(study)


def single_sampler(
    name: str, preference: Preference, seed: int, **of_cma: Any
) -> BaseSampler:
    """A search of one objective: the preference's value, scaled over its own trials."""
    weights, kind = list(preference.weights), preference.kind
    assert kind != "distance"
    if name == "CMA-ES":
        return cma(seed, weights=weights, kind=kind, **of_cma)
    inner: Callable[..., BaseSampler] = GPSampler if name != "TPE" else _tpe
    return ScalarisedSampler(inner, weights, kind, seed=seed)


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(multivariate=True, seed=seed)


def specialists(folder: Path) -> OfStudy:
    """Merges of the shipped specialists; all 600 held-out examples."""
    items = {"search": 300, "selection": 300}
    return OfStudy(SPECIALISTS / "study.yaml", items, folder)


def smollm(folder: Path) -> OfStudy:
    """Merges of the experts of SmolLM2."""
    items = {"search": 40, "selection": 60, "held_out": 100}
    return OfStudy(EXAMPLE / "study.yaml", items, folder)


FAMILIES: dict[str, Callable[[Path], Family]] = {
    "landscape": Landscape,
    "specialists": specialists,
    "smollm": smollm,
}

# ----- what is measured


ALL = slice(None)
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)


def value_of(
    found: Found, prefer: PreferSetting, number: int, examples: slice = ALL
) -> float:
    """The value of a trial's held-out scores for a preference, on some of the examples."""
    results = found.results
    preference = Choice(prefer).preference(results)
    scores = held_out_rows(found, [number], examples)[0]
    return float(preference.values(scores, held_out_scale(found)))


def held_out_rows(found: Found, numbers: Sequence[int], examples: slice = ALL) -> Array:
    """Held-out scores `(n, m)` of trials, all maximised, on some of the examples."""
    objectives = found.results.objectives
    rows = []
    for number in numbers:
        scores = found.held_out(number)
        rows.append([o.inside(mean_of(scores[o.name], examples)) for o in objectives])
    return np.array(rows)


def mean_of(score: Score, examples: slice) -> float:
    """A score on some of its examples."""
    if examples == ALL:
        return score.value
    assert score.example_scores is not None
    return statistics.mean(score.example_scores[examples])


def held_out_scale(found: Found) -> Scale:
    """The range of the sources' held-out scores."""
    return Scale.of(held_out_rows(found, range(len(found.results.sources))))


def best_by_search_scores(found: Found, prefer: PreferSetting) -> int:
    """The number of the trial with the best search scores for a preference."""
    results = found.results
    preference = Choice(prefer).preference(results)
    values = np.array([trial.values(results.objectives) for trial in results.trials])
    scale = Scale.of(values[nondominated(values)])
    return int(preference.values(values, scale).argmax())


def hypervolume_share(found: Found) -> float:
    """The hypervolume of the front's held-out scores, as a share of what perfect scores have."""
    results = found.results
    reference = reference_point(held_out_rows(found, range(len(results.sources))))
    front = held_out_rows(found, [trial.number for trial in results.front])
    perfect = hypervolume([[1.0] * len(reference)], reference)
    return hypervolume(front, reference) / perfect


def measure(family: Family, seed: int, name: str, index: int | None) -> Entry:
    """One search, and what its picks are worth."""
    preferences = wanted(family.objectives)
    if index is None:
        found = family.search(seed, None, None, "")
        rows = [pick_entry(found, prefer) for prefer in preferences]
        return {"picks": rows, "hypervolume": hypervolume_share(found)}
    prefer = preferences[index]
    if name != PREFERRING:
        found = family.search(seed, prefer, None, name)
        return {"value": value_of(found, prefer, best_by_search_scores(found, prefer))}
    found = family.search(seed, prefer, None, "")
    picked = found.decide(prefer).trial.number
    return {
        "value": value_of(found, prefer, picked),
        "hypervolume": hypervolume_share(found),
    }


def pick_entry(found: Found, prefer: PreferSetting) -> Entry:
    """What each way of picking gets for one preference, of one front."""
    searched = without_selection(found.results)
    believed = decide_for(searched, Choice(prefer)).trial.number
    decision = found.decide(prefer)
    picked = decision.trial.number
    scores = found.held_out(picked)
    inside = []
    for name, expected in decision.expected.items():
        inside.append(expected.low <= scores[name].value <= expected.high)
    picks = {
        "search scores": best_by_search_scores(found, prefer),
        "belief": believed,
        "selection": picked,
    }
    entry: Entry = {"best of front": max(front_values(found, prefer).values())}
    for way, number in picks.items():
        entry[way] = value_of(found, prefer, number)
    entry |= {"probability": decision.probability, "inside": inside}
    if scores[found.results.objectives[0].name].example_scores is not None:
        entry["regret by halves"] = {
            way: regret_by_halves(found, prefer, number)
            for way, number in picks.items()
        }
    return entry


def without_selection(results: Results) -> Results:
    """The results before any selection example was asked."""
    trials = tuple(replace(trial, selection=None) for trial in results.trials)
    return replace(results, trials=trials)


def front_values(
    found: Found, prefer: PreferSetting, examples: slice = ALL
) -> dict[int, float]:
    """Number of a member of the front -> the value of its held-out scores, on some examples."""
    values = {}
    for trial in found.results.front:
        values[trial.number] = value_of(found, prefer, trial.number, examples)
    return values


def regret_by_halves(found: Found, prefer: PreferSetting, picked: int) -> float:
    """Regret against the member of the front that half of the held-out examples chooses.

    The best of many noisy scores is partly luck, and no pick gets that luck. So the other half
    compares the two. The result is the mean of both ways.
    """
    regrets = []
    for choosing, comparing in ((EVEN, ODD), (ODD, EVEN)):
        values = front_values(found, prefer, choosing)
        best = max(values, key=lambda number: values[number])
        better = value_of(found, prefer, best, comparing)
        regrets.append(better - value_of(found, prefer, picked, comparing))
    return statistics.mean(regrets)


def run(
    name: str,
    folder: Path,
    seeds: Sequence[int],
    chosen: Sequence[str],
    indices: Sequence[int],
) -> None:
    """Run what is not in the result file."""
    family = FAMILIES[name](folder)
    finished = set()
    for entry in read_entries(FILE):
        finished.add((entry["family"], entry["seed"], entry["search"], entry["prefer"]))
    for seed in seeds:
        searches: list[tuple[str, int | None]] = [(OURS, None)]
        for index in indices:
            searches += [(search, index) for search in (PREFERRING, *SINGLE)]
        for search, prefer in searches:
            key = (name, seed, search, prefer)
            if key in finished or search not in chosen:
                continue
            names = ("family", "seed", "search", "prefer")
            entry = dict(zip(names, key, strict=True))
            append_entry(FILE, entry | measure(family, seed, search, prefer))
            print(*key, flush=True)


def after(share: float) -> int:
    """Trials before the last ones, which improve the preference."""
    return round(BUDGET * (1 - share))


def run_shares(folder: Path, seeds: Sequence[int]) -> None:
    """Searches whose last trials, several shares of them, improve the preference."""
    family = Landscape(folder)
    finished = set()
    for entry in read_entries(SHARES_FILE):
        finished.add((entry["seed"], entry["share"], entry["prefer"]))
    preferences = wanted(family.objectives)
    for seed in seeds:
        for index in range(0, len(preferences), 3):
            prefer = preferences[index]
            for share in SHARES:
                if (seed, share, index) in finished:
                    continue
                found = family.search(seed, prefer, share, "")
                picked = found.decide(prefer).trial.number
                entry = {
                    "seed": seed,
                    "share": share,
                    "prefer": index,
                    "value": value_of(found, prefer, picked),
                    "hypervolume": hypervolume_share(found),
                }
                append_entry(SHARES_FILE, entry)
                print(seed, share, index, flush=True)


# ----- tables


def regret_table(entries: Sequence[Entry]) -> str:
    """Regret of each way of picking, against the best member of the same front, in points."""
    rows = []
    for family in FAMILIES:
        searches = []
        for entry in entries:
            if entry["family"] == family and entry["search"] == OURS:
                searches.append(entry["picks"])
        if not searches:
            continue
        cells = [family]
        for way in WAYS:
            cells.append(f"{statistics.mean(regrets(searches, way)):.2f}")
        if "regret by halves" in searches[0][0]:
            for way in WAYS:
                cells.append(mean_and_deviation(regrets_by_halves(searches, way), 2))
        else:
            cells += [""] * len(WAYS)
        inside = []
        for picks in searches:
            for pick in picks:
                inside += pick["inside"]
        cells.append(f"{statistics.mean(inside):.0%}")
        rows.append(cells)
    header = [
        "regret of the pick, points",
        "best search scores",
        "belief",
        "belief, selection examples",
        "by halves: best search scores",
        "by halves: belief",
        "by halves: belief, selection examples",
        "held-out score inside the 90 % interval",
    ]
    return markdown_table(header, rows)


def regrets(searches: Sequence[Sequence[Entry]], way: str) -> list[float]:
    """The mean regret over the preferences, in points, of each search."""
    means = []
    for picks in searches:
        losses = [pick["best of front"] - pick[way] for pick in picks]
        means.append(100 * statistics.mean(losses))
    return means


def regrets_by_halves(searches: Sequence[Sequence[Entry]], way: str) -> list[float]:
    """The same, against members that were chosen on other held-out examples."""
    means = []
    for picks in searches:
        losses = [pick["regret by halves"][way] for pick in picks]
        means.append(100 * statistics.mean(losses))
    return means


def value_table(entries: Sequence[Entry], family: str) -> str:
    """The value of the pick by preference, of each search, and how often ours is the best."""
    rows = []
    n_best = 0
    for index in range(N_PREFERENCES):
        cells = ["mean" if index == 0 else f"weights {index}"]
        means = []
        for search in (PREFERRING, *SINGLE):
            values = values_of(entries, (family, search, index))
            if values:
                cells.append(mean_and_deviation(values))
                means.append(statistics.mean(values))
        # A preference that not all of them were run on is left out.
        if len(means) == 1 + len(SINGLE):
            n_best += means[0] >= max(means[1:])
            rows.append(cells)
    rows.append(
        ["at least as good as the three others", f"{n_best} of {len(rows)}", "", "", ""]
    )
    return markdown_table([f"{family}: value of the pick", PREFERRING, *SINGLE], rows)


def values_of(
    entries: Sequence[Entry], key: tuple[str, str, int | None]
) -> list[float]:
    """Values of the picks of a family, a search and a preference, one per seed."""
    values = []
    for entry in entries:
        if (entry["family"], entry["search"], entry["prefer"]) == key:
            values.append(entry["value"])
    return values


def volume_table(entries: Sequence[Entry]) -> str:
    """Hypervolume without and with a preference."""
    rows = []
    for family in FAMILIES:
        cells = [family]
        for search in (OURS, PREFERRING):
            volumes = []
            for entry in entries:
                if (entry["family"], entry["search"]) == (family, search):
                    volumes.append(entry["hypervolume"])
            if volumes:
                cells.append(mean_and_deviation(volumes))
        if len(cells) == 3:
            rows.append(cells)
    return markdown_table(["hypervolume", OURS, PREFERRING], rows)


def share_table(entries: Sequence[Entry]) -> str:
    """What the share of proposals on the preference changes."""
    rows = []
    for share in SHARES:
        of_share = [entry for entry in entries if entry["share"] == share]
        if not of_share:
            continue
        values = [entry["value"] for entry in of_share]
        volumes = [entry["hypervolume"] for entry in of_share]
        rows.append(
            [
                f"{share:.0%}",
                f"{statistics.mean(values):.4f}",
                f"{statistics.mean(volumes):.4f}",
            ]
        )
    header = [
        "last trials that improve the preference",
        "value of the pick",
        "hypervolume",
    ]
    return markdown_table(header, rows)


def tables() -> str:
    """The tables of docs/lab/picks.md."""
    entries = read_entries(FILE)
    parts = [regret_table(entries)]
    for family in FAMILIES:
        with_preference = [
            entry
            for entry in entries
            if entry["family"] == family and entry["prefer"] is not None
        ]
        if with_preference:
            parts.append(value_table(entries, family))
    parts += [volume_table(entries), share_table(read_entries(SHARES_FILE))]
    return "\n\n".join(parts)


def arguments() -> argparse.Namespace:
    """What to do."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "share"):
        command = commands.add_parser(name)
        if name == "run":
            command.add_argument("family", choices=list(FAMILIES))
            command.add_argument(
                "--searches", nargs="+", choices=SEARCHES, default=SEARCHES
            )
            every = list(range(N_PREFERENCES))
            command.add_argument("--preferences", type=int, nargs="+", default=every)
        command.add_argument("folder", type=Path)
        command.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    commands.add_parser("table")
    return parser.parse_args()


def main() -> None:
    """Run searches, or print the tables."""
    given = arguments()
    torch.set_num_threads(1)  # one search to a core
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if given.command == "run":
        run(
            given.family,
            given.folder,
            given.seeds,
            given.searches,
            given.preferences,
        )
    elif given.command == "share":
        run_shares(given.folder, given.seeds)
    else:
        print(tables())


if __name__ == "__main__":
    main()
