"""Searches over the merges of one family of models, beside its sources and untuned merges.

`benchmarks.specialists` and `benchmarks.smollm` are such families. Every search has the same
budget, the same space and the same baseline recipes, which count. Search scores choose the front
and the picks; tables show scores on held-out examples. The hypervolume is that of the front's
held-out scores, above the worst source per objective less a tenth of the range.
"""

import hashlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection

from benchmarks.reporting import (
    REPOSITORY,
    Entry,
    append_entry,
    markdown_table,
    mean_and_deviation,
    missing_runs,
    read_entries,
)
from benchmarks.study_api import RecipeScorer
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.pareto.ranking import knee
from paretomerge.recipe import Recipe
from paretomerge.study.study import load_study
from paretomerge.types import Array

SearchMaker = str | Callable[[int], BaseSampler]
"""A preset, set up as `sampler: NAME` in a study.yaml sets it up; or seed -> sampler."""


@dataclass(frozen=True)
class Family:
    """What a table is made of.

    Attributes:
        study: The study.yaml with models, tasks and space.
        results: The file of the searches' results.
        untuned_results: That of the sources and the untuned merges.
        searches: Row of the table -> the sampler.
        studies: Row of the table -> another study.yaml over the same models and tasks, for a search
            in another space. It runs as a whole study, in a folder that it continues.
        sources: Names of the sources.
        objectives: Names of the scores that are searched on.
        watched: Names of the scores that are only reported.
        trials: Evaluations of a search.
        front_examples: Held-out examples of each objective that the front is scored on; None for
            all. The picks are always scored on all.
        overrides: Keys of the study.yaml that are set here.
        progress: A file of the scores of single merges, from which a search that was interrupted
            goes on, on any machine; None where a search takes minutes.
    """

    study: Path
    results: Path
    untuned_results: Path
    searches: Mapping[str, SearchMaker]
    sources: tuple[str, ...]
    objectives: tuple[str, ...]
    watched: tuple[str, ...]
    trials: int
    front_examples: int | None = None
    overrides: tuple[str, ...] = ()
    progress: Path | None = None
    studies: Mapping[str, Path] = field(default_factory=dict)

    @property
    def all_searches(self) -> list[str]:
        """Rows of the table that are searches."""
        return [*self.searches, *self.studies]


def run(family: Family, seeds: Sequence[int], searches: Sequence[str]) -> None:
    """Score the untuned merges and run the searches that are not in the result files."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    scorer = RecipeScorer(family.study, family.overrides)
    finished = {entry["name"] for entry in read_entries(family.untuned_results)}
    for name, recipe in untuned(scorer).items():
        if name not in finished:
            scores = scorer.held_out(recipe)
            append_entry(family.untuned_results, {"name": name, "scores": scores})
    for seed, name in missing_runs(family.results, seeds, searches):
        entry = {"search": name, "seed": seed} | search(family, name, seed, scorer)
        append_entry(family.results, entry)
        print(f"seed {seed}  {name}: knee {entry['knee']}", flush=True)


def same_for_all(
    scorer: RecipeScorer,
    method: str,
    each: Mapping[str, Any],
    models: Iterable[str] | None = None,
    **options: Any,
) -> Recipe:
    """A recipe with the same parameters for all sources, or for some."""
    content: dict[str, Any] = {"merge_method": method}
    if method != "linear":
        content["base_model"] = scorer.base
    sources = scorer.sources
    names = sources if models is None else models
    listed = [{"model": sources[name], "parameters": dict(each)} for name in names]
    return Recipe.from_dict(content | {"models": listed, "parameters": options})


def untuned(scorer: RecipeScorer) -> dict[str, Recipe]:
    """Recipes that need no search, at the defaults of their papers."""
    sources = scorer.sources
    recipe = partial(same_for_all, scorer)
    recipes = {name: recipe("linear", {"weight": 1.0}, [name]) for name in sources}
    recipes["uniform soup"] = recipe("linear", {"weight": 1.0})
    recipes["task arithmetic, 0.4"] = recipe("task_arithmetic", {"weight": 0.4})
    recipes["TIES, top 20 %, lambda 1"] = recipe(
        "ties", {"weight": 1.0, "density": 0.2}
    )
    recipes["DARE-TIES, drop 90 %, 0.4"] = recipe(
        "dare_ties", {"weight": 0.4, "density": 0.1}, rescale="inverse_density"
    )
    for first, second in combinations(sources, 2):
        content = {
            "merge_method": "slerp",
            "base_model": sources[first],
            "models": [{"model": sources[first]}, {"model": sources[second]}],
            "parameters": {"t": 0.5},
        }
        recipes[f"SLERP {first} + {second}, 0.5"] = Recipe.from_dict(content)
    recipes["Model Stock"] = recipe("model_stock", {})
    recipes["TSV"] = recipe("tsv", {})
    return recipes


def search(family: Family, name: str, seed: int, scorer: RecipeScorer) -> Entry:
    """One search; the held-out scores of its front and of its picks."""
    progress = Progress(family, name, seed)
    if name in family.studies:
        recipes, values = studied(family, name, seed, scorer)
    else:
        recipes, values = sampled(family, name, seed, scorer, progress)
    front = np.flatnonzero(nondominated(values))
    front_scores = []
    for i in front:
        scores = progress.scores(
            "front",
            int(i),
            partial(scorer.held_out_objectives, recipes[i], family.front_examples),
        )
        front_scores.append([scores[objective] for objective in scorer.objectives])
    picks = {
        "knee": int(front[knee(values[front])]),
        "best mean": int(np.argmax(np.mean(values, axis=1))),
    }
    entry: Entry = {"front": front_scores}
    for label, number in picks.items():
        measure = partial(scorer.held_out, recipes[number])
        entry[label] = progress.scores("pick", number, measure)
    return entry


class Progress:
    """The scores that a search has measured, by what was scored and the trial's number."""

    def __init__(self, family: Family, name: str, seed: int) -> None:
        self._file = family.progress
        self._search = {"search": name, "seed": seed}
        self._known: dict[tuple[str, int], dict[str, float]] = {}
        if self._file is None:
            return
        for entry in read_entries(self._file):
            if (entry["search"], entry["seed"]) == (name, seed):
                self._known[entry["of"], entry["number"]] = entry["scores"]

    def scores(
        self, of: str, number: int, measure: Callable[[], Mapping[str, float]]
    ) -> dict[str, float]:
        """Scores from the file, or measured now and written to it."""
        if (of, number) not in self._known:
            scores = dict(measure())
            self._known[of, number] = scores
            if self._file is not None:
                line = {"of": of, "number": number, "scores": scores}
                # All digits: a search that goes on must see exactly what it saw before.
                append_entry(self._file, self._search | line, exact=True)
        return self._known[of, number]


def make_sampler(
    family: Family, name: str, seed: int, scorer: RecipeScorer
) -> BaseSampler:
    """The sampler of one search."""
    maker = family.searches[name]
    if isinstance(maker, str):
        return scorer.sampler(maker, seed, family.trials)
    return maker(seed)


def sampled(
    family: Family, name: str, seed: int, scorer: RecipeScorer, progress: "Progress"
) -> tuple[list[Recipe], Array]:
    """The recipes of one search, and their search scores `(n, m)`."""
    sampler = make_sampler(family, name, seed, scorer)
    directions = [StudyDirection.MAXIMIZE] * len(scorer.objectives)
    study = optuna.create_study(directions=directions, sampler=sampler)
    for params in scorer.baselines:
        study.enqueue_trial(dict(params))
    recipes, values = [], []
    for number in range(family.trials):
        trial = study.ask(scorer.distributions)
        recipe = scorer.recipe(trial.params)
        # Samplers are seeded: a search that starts again proposes the same merges.
        scores = progress.scores(
            f"trial {digest_of(trial.params)}",
            number,
            partial(search_scores, scorer, recipe),
        )
        trial_values = [scores[objective] for objective in scorer.objectives]
        stderr = [scores[f"{name} stderr"] for name in scorer.objectives]
        trial.set_user_attr("stderr", stderr)
        study.tell(trial, trial_values)
        recipes.append(recipe)
        values.append(trial_values)
    return recipes, np.asarray(values)


def studied(
    family: Family, name: str, seed: int, scorer: RecipeScorer
) -> tuple[list[Recipe], Array]:
    """The recipes of one search that is a whole study, and their search scores `(n, m)`."""
    folder = REPOSITORY / "runs" / name.replace(" ", "-").lower() / str(seed)
    overrides = (
        *family.overrides,
        "watch=[]",
        f"evaluate.held_out_items={family.front_examples}",
        f"trials={family.trials}",
        f"seed={seed}",
        f"out={folder}",
    )
    with load_study(family.studies[name], overrides) as study:
        study.optimize(held_out=False, show_progress_bar=False)
        trials = [trial for trial in study.get_trials() if not trial.failure]
    values = []
    for trial in trials:
        values.append([trial.scores[name].value for name in scorer.objectives])
    return [trial.recipe for trial in trials], np.asarray(values)


def digest_of(params: Mapping[str, Any]) -> str:
    """A digest of a trial's parameters, the same on every machine."""
    text = json.dumps(dict(params), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def search_scores(scorer: RecipeScorer, recipe: Recipe) -> dict[str, float]:
    """Name -> search score, and `name stderr` -> its standard error."""
    numbers = {}
    for name, score in scorer(recipe, "search").items():
        numbers[name] = score.value
        numbers[f"{name} stderr"] = score.stderr
    return numbers


# ----- the table


def table(family: Family) -> str:
    """Sources, untuned merges and searches: a row each."""
    untuned_scores = {}
    for entry in read_entries(family.untuned_results):
        untuned_scores[entry["name"]] = entry["scores"]
    entries = read_entries(family.results)
    sources = [untuned_scores[source] for source in family.sources]
    reference = reference_point([objectives_of(family, source) for source in sources])
    n_seeds = len({entry["seed"] for entry in entries})
    rows = []
    for name, scores in untuned_scores.items():
        rows.append(untuned_row(family, name, scores, reference))
    for name in family.all_searches:
        seeds = [entry for entry in entries if entry["search"] == name]
        if seeds and len(seeds) == n_seeds:
            rows.append(search_row(family, name, seeds, reference))
    header = ["", *family.objectives, "mean", "mean of the best mean", "hypervolume"]
    return markdown_table([*header, *family.watched], rows)


def untuned_row(
    family: Family, name: str, scores: Mapping[str, float], reference: Array
) -> list[str]:
    """One merge without a search."""
    values = objectives_of(family, scores)
    volume = hypervolume_share([values], reference)
    numbers = [*values, statistics.mean(values)]
    cells = [name, *(f"{number:.3f}" for number in numbers)]
    cells += ["", f"{volume:.3f}"]  # there is one merge, and no other pick
    cells += [f"{scores[task]:.3f}" for task in family.watched]
    return cells


def search_row(
    family: Family, name: str, entries: Sequence[Entry], reference: Array
) -> list[str]:
    """One search over all seeds, at the knee."""
    knee_means, best_means, volumes = [], [], []
    for entry in entries:
        knee_means.append(statistics.mean(objectives_of(family, entry["knee"])))
        best_means.append(statistics.mean(objectives_of(family, entry["best mean"])))
        volumes.append(hypervolume_share(entry["front"], reference))
    columns = [knee_scores(entries, task) for task in family.objectives]
    columns += [knee_means, best_means, volumes]
    columns += [knee_scores(entries, task) for task in family.watched]
    return [f"{name}, knee", *(mean_and_deviation(column) for column in columns)]


def knee_scores(entries: Sequence[Entry], task: str) -> list[float]:
    """The score of each seed's knee on one task."""
    return [entry["knee"][task] for entry in entries]


def objectives_of(family: Family, scores: Mapping[str, float]) -> list[float]:
    """Scores of the objectives, in their order."""
    return [scores[objective] for objective in family.objectives]


def hypervolume_share(values: Sequence[Sequence[float]], reference: Array) -> float:
    """The hypervolume, as a share of what perfect scores would have."""
    perfect = hypervolume([[1.0] * len(reference)], reference)
    return hypervolume(values, reference) / perfect
