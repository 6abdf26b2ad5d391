"""docs/lab/lineages.md: merges of merges on the specialists, beside searches of a weight space.

    python -m benchmarks.lineages run --seeds 0 1 2      # half an hour on one core
    python -m benchmarks.lineages table

Each search is a study with `space: {lineage: true}` and 60 evaluations, the three sources included.
Model Kinship has no randomness, so it is run once. Picks, held-out scores and the hypervolume are
those of `benchmarks.family`; the other rows are from the results of `benchmarks.specialists`.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import family
from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    markdown_table,
    missing_runs,
    read_entries,
    search_arguments,
)
from benchmarks.specialists import FAMILY
from benchmarks.study_api import RecipeScorer, open_fresh
from paretomerge.pareto.front import nondominated, reference_point
from paretomerge.pareto.ranking import knee
from paretomerge.record.trial import Trial
from paretomerge.report.lineage import merge_graph

FILE = RESULTS / "lineages.jsonl"
EVALUATIONS = 60
_POPULATION = 4
_GENERATIONS = (EVALUATIONS - _POPULATION) // _POPULATION
_EVOLVER = f"population_size: {_POPULATION}, generations: {_GENERATIONS}"
SEARCHES: Mapping[str, str] = {
    "Evolver, dominance": f"{{name: evolver, {_EVOLVER}}}",
    "Evolver, mean as in the paper": f"{{name: evolver, {_EVOLVER}, compare: mean}}",
    "Model Kinship, dominance": "{name: kinship}",
    "Model Kinship, mean as in the paper": "{name: kinship, compare: mean}",
}
_BESIDE_UNTUNED = ("scribe", "uniform soup", "TIES, top 20 %, lambda 1")
_BESIDE = ("random search", "kinship", "Optuna's GP", "MM-MO (ours)")


def run(seeds: Sequence[int], searches: Sequence[str]) -> None:
    """Run the searches that are not in the result file."""
    scorer = RecipeScorer(FAMILY.study)
    for seed, name in missing_runs(FILE, seeds, searches):
        if "Kinship" in name and seed != min(seeds):
            continue
        entry = {"search": name, "seed": seed} | search(name, seed, scorer)
        append_entry(FILE, entry)
        print(f"seed {seed}  {name}: best mean {entry['best mean']}", flush=True)


def search(name: str, seed: int, scorer: RecipeScorer) -> Entry:
    """One search; the held-out scores of its front and of its picks."""
    with tempfile.TemporaryDirectory() as folder:
        trials = lineage_of(SEARCHES[name], seed, Path(folder))
    scored = [trial for trial in trials if not trial.failure and trial.same_as is None]
    values = np.array([values_of(trial) for trial in scored])
    front = np.flatnonzero(nondominated(values))
    front_scores = []
    for i in front:
        scores = scorer.held_out_objectives(scored[i].recipe)
        front_scores.append([scores[objective] for objective in scorer.objectives])
    picks = {
        "knee": int(front[knee(values[front])]),
        "best mean": int(np.argmax(values.mean(1))),
    }
    entry: Entry = {"front": front_scores, "evaluations": len(scored)}
    for label, number in picks.items():
        recipe = scored[number].recipe
        entry[label] = scorer.held_out(recipe)
        graph = merge_graph(recipe)
        merges = [node for node in graph if node.document is not None]
        entry[f"merges of the {label}"] = len(merges)
    return entry


def lineage_of(sampler: str, seed: int, folder: Path) -> Sequence[Trial]:
    """The trials of one search."""
    sampler = sampler.replace("}", f", seed: {seed}}}")
    overrides = (
        "space={lineage: true}",
        f"sampler={sampler}",
        f"trials={EVALUATIONS}",
    )
    study = open_fresh(FAMILY.study, folder, overrides)
    study.run()
    return study.trials()


def values_of(trial: Trial) -> list[float]:
    """Search scores of the objectives."""
    return [trial.scores[name].value for name in FAMILY.objectives]


def table() -> str:
    """Untuned merges, searches of a weight space and lineages: a row each."""
    untuned = {}
    for entry in read_entries(FAMILY.untuned_results):
        untuned[entry["name"]] = entry["scores"]
    sources = [family.objectives_of(FAMILY, untuned[name]) for name in FAMILY.sources]
    reference = reference_point(sources)
    rows = []
    for name in _BESIDE_UNTUNED:
        # Without the watched tasks.
        cells = family.untuned_row(FAMILY, name, untuned[name], reference)
        rows.append([*cells[: 4 + len(FAMILY.objectives)], "", "", ""])
    others = read_entries(FAMILY.results)
    for name in _BESIDE:
        entries = [entry for entry in others if entry["search"] == name]
        cells = _search_cells(name, entries, reference)
        rows.append([*cells, str(len(entries)), str(FAMILY.trials), ""])
    lineages = read_entries(FILE)
    for name in SEARCHES:
        entries = [entry for entry in lineages if entry["search"] == name]
        if not entries:
            continue
        evaluations = _numbers(entries, "evaluations")
        merges = _numbers(entries, "merges of the best mean")
        cells = _search_cells(name, entries, reference)
        rows.append([*cells, str(len(entries)), evaluations, merges])
    header = ["", *FAMILY.objectives, "mean", "mean of the best mean", "hypervolume"]
    header += ["runs", "evaluations", "merges in the lineage of the best mean"]
    return markdown_table(header, rows)


def _search_cells(
    name: str, entries: Sequence[Entry], reference: np.ndarray
) -> list[str]:
    cells = family.search_row(FAMILY, name, entries, reference)
    return cells[: 4 + len(FAMILY.objectives)]


def _numbers(entries: Sequence[Entry], key: str) -> str:
    """The numbers of all seeds, or the one that all have."""
    numbers = [entry[key] for entry in entries]
    return ", ".join(str(number) for number in dict.fromkeys(numbers))


def main() -> None:
    """Run searches, or print the table."""
    arguments = search_arguments(__doc__, SEARCHES, folder=False)
    if arguments.command == "run":
        run(arguments.seeds, arguments.searches)
    else:
        print(table())


if __name__ == "__main__":
    main()
