"""docs/lab/routes.md's tables: what routes through layers are worth, at equal budgets.

    python examples/specialists/train.py --out FOLDER/models --layers 8 --drop 0.1 --base-steps 650
    python -m benchmarks.dataflow run FOLDER --seeds 0 1 2 3 4
    python -m benchmarks.dataflow table

Parameters alone, routes alone, and both, on specialists of eight layers. Training takes some ten
minutes, a search 1 to 4 minutes on one core. Each search has a study.yaml in FOLDER and continues
where it was interrupted; scores of examples are cached there. All have 60 evaluations, baseline
recipes included, but for those that say 120.

Search scores (300 examples per task) choose each front. The hypervolume is that of its held-out
scores (600 other examples), above the worst source per objective less a tenth of the range, as a
share of what perfect scores would have.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    markdown_table,
    mean_and_deviation,
    missing_runs,
    read_entries,
    search_arguments,
    write_study,
)
from benchmarks.study_api import (
    feasible_trials,
    merged_layers,
    plain_scores,
    run_study,
    score_held_out,
)
from paretomerge.examples import SPECIALISTS
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.types import Array

FILE = RESULTS / "dataflow.jsonl"
SOURCES = ("order", "mirror", "scribe")
SKILLS = ("sort", "reverse", "translate")
SEARCH_EXAMPLES, HELD_OUT_EXAMPLES = 300, 600
LAYERS = 8
BUDGET, FIRST_LEVEL, LARGER_BUDGET = 60, 40, 120
LAYER_LIMITS = range(4, 10)
PARAMETERS = {
    "methods": ["task_arithmetic", "ties", "dare_ties"],
    "weight": {"bounds": [0, 1.5]},
}
EDITS: dict[str, Any] = {"routes": {"blocks": LAYERS}}
INDICATORS: dict[str, Any] = {"routes": {"blocks": LAYERS, "form": "indicators"}}
SIZE = {"size": "layers"}
PARAMETERS_ALONE = "parameters alone, MM-MO"
RANDOM_ROUTES = "routes alone, random edits"


def two_levels(
    sampler: str, first_level: int = FIRST_LEVEL, budget: int = BUDGET, **routes: Any
) -> dict[str, Any]:
    """A search of parameters, followed by one of routes through the best merges."""
    second_level = {
        "routes": EDITS["routes"] | routes,
        "trials": budget - first_level,
        "sampler": sampler,
    }
    return {"space": PARAMETERS, "trials": first_level, "then": second_level}


SEARCHES: dict[str, dict[str, Any]] = {
    PARAMETERS_ALONE: {"space": PARAMETERS},
    "hierarchy, MM-MO": two_levels("mmmo"),
    "hierarchy 50 + 10 without scales, MM-MO": two_levels(
        "mmmo", 50, scale=False, most=1
    ),
    "hierarchy 55 + 5 without scales, MM-MO": two_levels(
        "mmmo", 55, scale=False, most=1
    ),
    "parameters alone, 120, MM-MO": {"space": PARAMETERS, "trials": LARGER_BUDGET},
    "hierarchy 100 + 20 without scales, MM-MO": two_levels(
        "mmmo", 100, LARGER_BUDGET, scale=False, most=1
    ),
    RANDOM_ROUTES: {"space": EDITS, "sampler": "random"},
    "routes alone, MM-MO": {"space": EDITS},
    "routes alone, policy": {"space": EDITS, "sampler": "policy"},
    "routes alone, CMA-ES": {"space": EDITS, "sampler": "cma"},
    "routes alone, NSGA-II": {"space": EDITS, "sampler": "nsga2"},
    "indicators, CMA-ES": {"space": INDICATORS, "sampler": "cma"},
    "indicators, NSGA-II": {"space": INDICATORS, "sampler": "nsga2"},
    "indicators, policy": {"space": INDICATORS, "sampler": "policy"},
    "hierarchy with size, MM-MO": two_levels("mmmo", BUDGET // 2)
    | {"objectives": [SIZE]},
    "hierarchy with size, policy": two_levels("policy", BUDGET // 2)
    | {"objectives": [SIZE]},
}
"""Row of the table -> what its study.yaml has beside the common part.

Layers are an objective of the last two alone.
"""

BASELINE_ROWS = {
    PARAMETERS_ALONE: "untuned merges (known starts)",
    RANDOM_ROUTES: "static stacking (known starts)",
}
"""Searches whose baseline recipes have a row of their own -> that row."""


def run(folder: Path, seeds: Sequence[int], searches: Sequence[str]) -> None:
    """Run what is not in the result file."""
    for seed, name in missing_runs(FILE, seeds, searches):
        entry = measure(folder, name, seed)
        append_entry(FILE, entry)
        n_front = len(entry["front"])
        print(f"seed {seed}  {name}: {n_front} on the front", flush=True)


def measure(folder: Path, name: str, seed: int) -> Entry:
    """Run one search, and score on held-out examples what the tables need of it."""
    study = run_study(write_config(folder, name, seed))
    trials = feasible_trials(study)
    search_scores, layers = {}, {}
    for trial in trials:
        search_scores[trial.number] = plain_scores(trial.scores)
        layers[trial.number] = merged_layers(study, trial, LAYERS)
    groups = {
        "front": study.front(),
        "depths": [trials[i] for i in best_by_depth(search_scores, layers)],
    }
    if name in BASELINE_ROWS:
        groups["starts"] = [trial for trial in trials if trial.is_baseline]
    held_out = score_held_out(
        study, [trial for group in groups.values() for trial in group]
    )
    entry: Entry = {"search": name, "seed": seed}
    for group, members in groups.items():
        entry[group] = []
        for trial in sorted(members, key=lambda trial: trial.number):
            number = trial.number
            record: Entry = {"layers": layers[number]} if group == "depths" else {}
            if group == "starts":
                record["label"] = trial.label
            record["search"] = correct_answers(search_scores[number], SEARCH_EXAMPLES)
            record["held_out"] = correct_answers(held_out[number], HELD_OUT_EXAMPLES)
            entry[group].append(record)
    return entry


def write_config(folder: Path, name: str, seed: int) -> Path:
    """Write a search's study.yaml in a folder of its own."""
    models = folder.resolve() / "models"
    config = {
        "base": str(models / "base"),
        "models": [str(models / source) for source in SOURCES],
        "evaluate": {
            "include_path": str(SPECIALISTS / "tasks"),
            "data_root": str(SPECIALISTS),
            "splits": {"search": "search", "held_out": "held_out"},
            "search_items": SEARCH_EXAMPLES,
            "batch_size": 128,
            "cache": str(folder.resolve() / "items.db"),
        },
        "trials": BUDGET,
        "seed": seed,
        "dtype": "float32",
    }
    config |= SEARCHES[name]
    tasks = [{"task": skill} for skill in SKILLS]
    config["objectives"] = tasks + SEARCHES[name].get("objectives", [])
    return write_study(folder / "studies", name, seed, config)


def skill_scores(scores: Mapping[str, float]) -> list[float]:
    """Scores of the three skills, in their order."""
    return [scores[skill] for skill in SKILLS]


def correct_answers(scores: Mapping[str, float], n_examples: int) -> list[int]:
    """Correct answers per skill: the exact accuracy in few characters."""
    return [round(score * n_examples) for score in skill_scores(scores)]


def best_by_depth(
    search_scores: Mapping[int, Mapping[str, float]], layers: Mapping[int, int]
) -> list[int]:
    """Positions of the trials that have the best mean among those with as many layers or fewer."""
    pairs = []
    for number, scores in search_scores.items():
        mean = statistics.mean(skill_scores(scores))
        pairs.append((-layers[number], mean))
    return np.flatnonzero(nondominated(pairs)).tolist()


# ----- tables


def tables(entries: Sequence[Entry]) -> str:
    """The tables of docs/lab/routes.md."""
    by_seed = sorted(entries, key=lambda entry: entry["seed"])
    measured: dict[str, list[Entry]] = {}
    for name in SEARCHES:
        searches = [entry for entry in by_seed if entry["search"] == name]
        if searches:
            measured[name] = searches
    return results_table(measured) + "\n\n" + layers_table(measured)


def results_table(measured: Mapping[str, Sequence[Entry]]) -> str:
    """Hypervolume, best mean and layers of each search."""
    baselines = measured[PARAMETERS_ALONE][0]["starts"]
    sources = [trial for trial in baselines if trial["label"] in SOURCES]
    reference = reference_point([held_out_scores(trial) for trial in sources])
    rows = [row("the sources", [sources], reference)]
    for name, label in BASELINE_ROWS.items():
        if name in measured:
            # Baseline recipes are the same for every seed.
            starts = measured[name][0]["starts"]
            rows.append(row(label, [starts], reference))
    for name, entries in measured.items():
        rows.append(search_row(name, entries, reference))
    header = ["search", "seeds", "hypervolume", "best mean", "layers at 95 % of it"]
    return markdown_table(header, rows)


def row(name: str, fronts: Sequence[Sequence[Entry]], reference: Array) -> list[str]:
    """A row without layers, of one front per seed."""
    means = [best_mean(front) for front in fronts]
    return [name, *hypervolume_cells(fronts, reference), mean_and_deviation(means), ""]


def search_row(name: str, entries: Sequence[Entry], reference: Array) -> list[str]:
    """A search over all its seeds."""
    means, layers = [], []
    for entry in entries:
        trials = [*entry["front"], *entry["depths"]]
        mean = best_mean(trials)
        means.append(mean)
        layers.append(fewest_layers(entry["depths"], 0.95 * mean))
    fronts = [entry["front"] for entry in entries]
    cells = [mean_and_deviation(means), mean_and_deviation(layers, 1)]
    return [name, *hypervolume_cells(fronts, reference), *cells]


def hypervolume_cells(fronts: Sequence[Sequence[Entry]], reference: Array) -> list[str]:
    """Number of fronts; mean and deviation of their held-out hypervolume."""
    perfect = hypervolume([[1.0] * len(SKILLS)], reference)
    volumes = []
    for front in fronts:
        held_out = [held_out_scores(trial) for trial in front]
        volumes.append(hypervolume(held_out, reference) / perfect)
    return [str(len(fronts)), mean_and_deviation(volumes)]


def layers_table(measured: Mapping[str, Sequence[Entry]]) -> str:
    """The best held-out mean of each search under a limit of layers."""
    rows = []
    for name, entries in measured.items():
        cells = []
        for limit in LAYER_LIMITS:
            means = [best_mean(within(entry["depths"], limit)) for entry in entries]
            cells.append(f"{statistics.mean(means):.3f}")
        rows.append([name, *cells])
    header = ["best held-out mean with at most so many layers", *map(str, LAYER_LIMITS)]
    return markdown_table(header, rows)


def within(trials: Iterable[Entry], limit: int) -> list[Entry]:
    """Trials of at most `limit` layers."""
    return [trial for trial in trials if trial["layers"] <= limit]


def best_mean(trials: Sequence[Entry]) -> float:
    """The held-out mean of the trial with the best mean of search scores; 0 without trials."""
    if not trials:
        return 0.0
    best = max(trials, key=mean_search_score)
    return float(held_out_scores(best).mean())


def mean_search_score(trial: Entry) -> float:
    """The mean accuracy of the three skills on search examples."""
    return float(np.mean(np.array(trial["search"]) / SEARCH_EXAMPLES))


def held_out_scores(trial: Entry) -> Array:
    """Accuracies of the three skills `(3,)` on held-out examples."""
    return np.array(trial["held_out"]) / HELD_OUT_EXAMPLES


def fewest_layers(trials: Iterable[Entry], least: float) -> float:
    """Layers of the shortest trial whose held-out mean is at least `least`; NaN without one."""
    reaching = (trial for trial in trials if held_out_scores(trial).mean() >= least)
    return min((trial["layers"] for trial in reaching), default=float("nan"))


def main() -> None:
    """Run searches, or print the tables."""
    arguments = search_arguments(__doc__, SEARCHES)
    if arguments.command == "run":
        run(arguments.folder, arguments.seeds, arguments.searches)
    else:
        print(tables(read_entries(FILE)))


if __name__ == "__main__":
    main()
