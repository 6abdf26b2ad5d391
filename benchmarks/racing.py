"""docs/lab/evaluation.md's table of racing: examples that it saves, and hypervolume that it costs.

    python -m benchmarks.racing run FOLDER --seeds 0 1 2 3 4
    python -m benchmarks.racing table

The study of the specialists, 60 trials, with every search example, with a half or a quarter of
them, and with `evaluate.race`; for its three tasks and for the first two. Scores of examples are
cached in FOLDER. The examples of all trials count, baseline recipes included. The hypervolume is
that of the front's held-out scores, above the worst source per objective less a tenth of the range,
as a share of what perfect scores would have.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

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
    knee_of,
    n_examples_scored,
    run_study,
    score_held_out,
    source_trials,
)
from paretomerge.examples import SPECIALISTS
from paretomerge.pareto.front import hypervolume, reference_point

FILE = RESULTS / "racing.jsonl"
HALF = {"search_items": 300}
QUARTER = {"search_items": 150}
RACE = {"race": True}
SEARCHES: dict[str, tuple[int, dict[str, Any]]] = {
    "every item": (3, {}),
    "half the items": (3, HALF),
    "a quarter of the items": (3, QUARTER),
    "race": (3, RACE),
    "race over half the items": (3, HALF | RACE),
    "two objectives, every item": (2, {}),
    "two objectives, race": (2, RACE),
}
"""Row of the table -> number of tasks, and what its `evaluate` has beside the shipped one."""

EVERY_ITEM = {3: "every item", 2: "two objectives, every item"}
"""Number of tasks -> the search that scores every example."""


def run(folder: Path, seeds: Sequence[int], searches: Sequence[str]) -> None:
    """Run what is not in the result file."""
    for seed, name in missing_runs(FILE, seeds, searches):
        entry = measure(folder, seed, name)
        append_entry(FILE, entry)
        print(
            f"seed {seed}  {name}: {entry['n_examples']} examples, "
            f"{len(entry['front'])} on the front",
            flush=True,
        )


def measure(folder: Path, seed: int, name: str) -> Entry:
    """One search, and its front on held-out examples."""
    study = run_study(write_config(folder, seed, name))
    objectives = [objective.name for objective in study.goals.objectives]
    front, sources = study.front(), source_trials(study)
    scores = score_held_out(study, [*front, *sources])

    def held_out(number: int) -> list[float]:
        return [scores[number][objective] for objective in objectives]

    return {
        "search": name,
        "seed": seed,
        "n_examples": n_examples_scored(study),
        "left_early": sum(not trial.final for trial in study.trials()),
        "front": [held_out(trial.number) for trial in front],
        "knee": held_out(knee_of(study, front).number),
        "sources": [held_out(trial.number) for trial in sources],
    }


def write_config(folder: Path, seed: int, name: str) -> Path:
    """Write a search's study.yaml in a folder of its own."""
    n_objectives, evaluation = SEARCHES[name]
    config = yaml.safe_load((SPECIALISTS / "study.yaml").read_text())
    config["base"] = str(SPECIALISTS / config["base"])
    config["models"] = [str(SPECIALISTS / model) for model in config["models"]]
    config["objectives"] = config["objectives"][:n_objectives]
    config["watch"] = []
    config["seed"] = seed
    config["evaluate"] |= {
        "include_path": str(SPECIALISTS / "tasks"),
        "data_root": str(SPECIALISTS),
        "cache": str(folder / "items.db"),
    }
    config["evaluate"] |= evaluation
    return write_study(folder, name, seed, config)


def table(entries: Sequence[Entry]) -> str:
    """The table of docs/lab/evaluation.md."""
    by_search = {(entry["search"], entry["seed"]): entry for entry in entries}
    rows = []
    for name, (n_objectives, _) in SEARCHES.items():
        whole_name = EVERY_ITEM[n_objectives]
        pairs = []
        for (search, seed), entry in by_search.items():
            if search == name and (whole_name, seed) in by_search:
                pairs.append((entry, by_search[whole_name, seed]))
        if pairs:
            rows.append(row(name, pairs))
    header = ["", "seeds", "items asked", "trials left early"]
    header += ["held-out hypervolume", "knee's held-out mean"]
    return markdown_table(header, rows)


def row(name: str, pairs: Sequence[tuple[Entry, Entry]]) -> list[str]:
    """One search over all seeds, each beside the search that scores every example."""
    reference = reference_point(pairs[0][1]["sources"])
    perfect = hypervolume([[1.0] * len(reference)], reference)
    volumes, shares, left_early, knees = [], [], [], []
    for entry, whole in pairs:
        volume = hypervolume(entry["front"], reference)
        volumes.append(volume / perfect)
        shares.append(entry["n_examples"] / whole["n_examples"])
        left_early.append(entry["left_early"])
        knees.append(statistics.mean(entry["knee"]))
    return [
        name,
        str(len(pairs)),
        f"{statistics.mean(shares):.0%}",
        f"{statistics.mean(left_early):.0f}",
        mean_and_deviation(volumes),
        mean_and_deviation(knees),
    ]


def main() -> None:
    """Run searches, or print the table."""
    arguments = search_arguments(__doc__, SEARCHES)
    if arguments.command == "run":
        run(arguments.folder, arguments.seeds, arguments.searches)
    else:
        print(table(read_entries(FILE)))


if __name__ == "__main__":
    main()
