"""README.md's table: sources, untuned merges and searches on the specialists.

    python -m benchmarks.specialists run --seeds 0 1 2 3 4     # over an hour on one core
    python -m benchmarks.specialists table

Every search has the same budget, the same space and the same baseline recipes, which count. Search
scores choose the front and the picks; the table shows scores on held-out examples. The hypervolume
is that of the front's held-out scores, above the worst source per objective less a tenth of the
range. Two picks of each front: its knee, and the trial with the best mean of the search scores.
"""

import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection

from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    markdown_table,
    mean_and_deviation,
    missing_runs,
    read_entries,
    search_arguments,
)
from benchmarks.study_api import RecipeScorer
from paretomerge.examples import SPECIALISTS
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.pareto.ranking import knee
from paretomerge.recipe import Recipe
from paretomerge.types import Array

FILE = RESULTS / "specialists.jsonl"
UNTUNED_FILE = RESULTS / "untuned.jsonl"
SEARCHES = {
    "random search": "random",
    "NSGA-II": "nsga2",
    "CMA-ES on the mean": "cma",
    "kinship": "kinship",
    "Optuna's GP": "gp",
    "MM-MO (ours)": "mmmo",
}
"""Row of the table -> the preset, set up as `sampler: NAME` in the study.yaml sets it up."""
SOURCES = ("order", "mirror", "scribe")
OBJECTIVES = ("sort", "reverse", "translate")
WATCHED = ("unique", "shift", "translate_reverse", "copy", "count", "translate_sort")
TRIALS = 60


def run(seeds: Sequence[int], searches: Sequence[str]) -> None:
    """Score the untuned merges, and run the searches that are not in the result file."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    scorer = RecipeScorer(SPECIALISTS / "study.yaml")
    if not UNTUNED_FILE.exists():
        for name, recipe in untuned(scorer).items():
            append_entry(
                UNTUNED_FILE, {"name": name, "scores": scorer.held_out(recipe)}
            )
    for seed, name in missing_runs(FILE, seeds, searches):
        entry = {"search": name, "seed": seed} | search(name, seed, scorer)
        append_entry(FILE, entry)
        print(f"seed {seed}  {name}: knee {entry['knee']}", flush=True)


def untuned(scorer: RecipeScorer) -> dict[str, Recipe]:
    """Recipes that need no search, at the defaults of their papers."""
    sources = scorer.sources

    def recipe(
        method: str,
        each: Mapping[str, Any],
        models: Iterable[str] = sources,
        **options: Any,
    ) -> Recipe:
        content: dict[str, Any] = {"merge_method": method}
        if method != "linear":
            content["base_model"] = scorer.base
        listed = [{"model": sources[name], "parameters": dict(each)} for name in models]
        return Recipe.from_dict(content | {"models": listed, "parameters": options})

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
    return recipes


def search(name: str, seed: int, scorer: RecipeScorer) -> Entry:
    """One search; the held-out scores of its front and of its picks."""
    recipes, values = sampled(name, seed, scorer)
    front = np.flatnonzero(nondominated(values))
    front_scores = []
    for i in front:
        scores = scorer(recipes[i], "held_out")
        front_scores.append(
            [scores[objective].value for objective in scorer.objectives]
        )
    at_knee = front[knee(values[front])]
    best_mean = int(np.argmax(np.mean(values, axis=1)))
    return {
        "front": front_scores,
        "knee": scorer.held_out(recipes[at_knee]),
        "best mean": scorer.held_out(recipes[best_mean]),
    }


def sampled(name: str, seed: int, scorer: RecipeScorer) -> tuple[list[Recipe], Array]:
    """The recipes of one search, and their search scores `(n, m)`."""
    sampler = scorer.sampler(SEARCHES[name], seed, TRIALS)
    directions = [StudyDirection.MAXIMIZE] * len(scorer.objectives)
    study = optuna.create_study(directions=directions, sampler=sampler)
    for params in scorer.baselines:
        study.enqueue_trial(dict(params))
    recipes, values = [], []
    for _ in range(TRIALS):
        trial = study.ask(scorer.distributions)
        recipe = scorer.recipe(trial.params)
        scores = scorer(recipe, "search")
        trial_values = [scores[objective].value for objective in scorer.objectives]
        stderr = [scores[objective].stderr for objective in scorer.objectives]
        trial.set_user_attr("stderr", stderr)
        study.tell(trial, trial_values)
        recipes.append(recipe)
        values.append(trial_values)
    return recipes, np.asarray(values)


# ----- the table


def table(untuned_entries: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """The README's table."""
    untuned_scores = {entry["name"]: entry["scores"] for entry in untuned_entries}
    reference = reference_point(
        [objectives_of(untuned_scores[source]) for source in SOURCES]
    )
    n_seeds = len({entry["seed"] for entry in entries})
    rows = []
    for name, scores in untuned_scores.items():
        rows.append(untuned_row(name, scores, reference))
    for name in SEARCHES:
        seeds = [entry for entry in entries if entry["search"] == name]
        if len(seeds) == n_seeds:
            rows.append(search_row(name, seeds, reference))
    header = ["", *OBJECTIVES, "mean", "mean of the best mean", "hypervolume", *WATCHED]
    return markdown_table(header, rows)


def untuned_row(name: str, scores: Mapping[str, float], reference: Array) -> list[str]:
    """One merge without a search."""
    values = objectives_of(scores)
    volume = hypervolume_share([values], reference)
    numbers = [*values, statistics.mean(values)]
    cells = [name, *(f"{number:.3f}" for number in numbers)]
    cells += ["", f"{volume:.3f}"]  # there is one merge, and no other pick
    cells += [f"{scores[task]:.3f}" for task in WATCHED]
    return cells


def search_row(name: str, entries: Sequence[Entry], reference: Array) -> list[str]:
    """One search over all seeds, at the knee."""
    knee_means, best_means, volumes = [], [], []
    for entry in entries:
        knee_means.append(statistics.mean(objectives_of(entry["knee"])))
        best_means.append(statistics.mean(objectives_of(entry["best mean"])))
        volumes.append(hypervolume_share(entry["front"], reference))
    columns = [knee_scores(entries, task) for task in OBJECTIVES]
    columns += [knee_means, best_means, volumes]
    columns += [knee_scores(entries, task) for task in WATCHED]
    return [f"{name}, knee", *(mean_and_deviation(column) for column in columns)]


def knee_scores(entries: Sequence[Entry], task: str) -> list[float]:
    """The score of each seed's knee on one task."""
    return [entry["knee"][task] for entry in entries]


def objectives_of(scores: Mapping[str, float]) -> list[float]:
    """Scores of the three objectives, in their order."""
    return [scores[objective] for objective in OBJECTIVES]


def hypervolume_share(values: Sequence[Sequence[float]], reference: Array) -> float:
    """The hypervolume, as a share of what perfect scores would have."""
    perfect = hypervolume([[1.0] * len(OBJECTIVES)], reference)
    return hypervolume(values, reference) / perfect


def main() -> None:
    """Run searches, or print the table."""
    arguments = search_arguments(__doc__, SEARCHES, folder=False)
    if arguments.command == "run":
        run(arguments.seeds, arguments.searches)
    else:
        print(table(read_entries(UNTUNED_FILE), read_entries(FILE)))


if __name__ == "__main__":
    main()
