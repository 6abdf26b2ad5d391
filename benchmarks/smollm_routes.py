"""docs/lab/smollm.md: routes through the layers of SmolLM2's best merges, quality against size.

    python -m benchmarks.smollm_routes run FOLDER --seeds 0     # about an hour on one core
    python -m benchmarks.smollm_routes table

24 evaluations of merges, then 16 of routes through the best of them, which may leave layers out.
The number of layers is an objective. The study is in FOLDER and continues where it was interrupted.
For each number of layers, the trial with the best search scores among those with as many layers or
fewer is scored on 100 held-out examples of each task.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    markdown_table,
    missing_runs,
    read_entries,
    search_arguments,
)
from benchmarks.smollm import FAMILY
from benchmarks.study_api import (
    feasible_trials,
    merged_layers,
    plain_scores,
    run_study,
    score_held_out,
)
from paretomerge.pareto.front import nondominated

FILE = RESULTS / "smollm-routes.jsonl"
LAYERS = 30
SEARCHES = {"MM-MO (ours)": "mmmo"}
OBJECTIVES = [*({"task": task} for task in FAMILY.objectives), {"size": "layers"}]


def run(folder: Path, seeds: Sequence[int], searches: Sequence[str]) -> None:
    """Run what is not in the result file."""
    for seed, name in missing_runs(FILE, seeds, searches):
        append_entry(FILE, measure(folder.resolve() / f"{name}-{seed}", name, seed))


def measure(out: Path, name: str, seed: int) -> Entry:
    """Run one search, and score its best trials by number of layers."""
    overrides = (
        f"out={out}",
        f"seed={seed}",
        f"sampler={SEARCHES[name]}",
        "trials=24",
        "then={routes: {blocks: 30, scale: false, most: 1}, trials: 16}",
        f"objectives={OBJECTIVES}",
        "watch=[]",
        f"evaluate.cache={out.parent / 'scores'}",
    )
    study = run_study(FAMILY.study, overrides)
    trials = feasible_trials(study)
    pairs = []
    for trial in trials:
        n_layers = merged_layers(study, trial, LAYERS)
        pairs.append((-n_layers, mean_score(plain_scores(trial.scores))))
    best = np.flatnonzero(nondominated(pairs))
    held_out = score_held_out(study, [trials[i] for i in best])
    depths = []
    for i in best:
        scores = held_out[trials[i].number]
        depths.append({"layers": -pairs[i][0], "search": pairs[i][1], "scores": scores})
    return {"search": name, "seed": seed, "depths": depths}


def mean_score(scores: dict[str, float]) -> float:
    """The mean of the three tasks."""
    return statistics.mean(scores[task] for task in FAMILY.objectives)


def table() -> str:
    """The best trials by number of layers."""
    rows = []
    for entry in read_entries(FILE):
        depths = sorted(entry["depths"], key=lambda depth: -depth["layers"])
        for depth in depths:
            tasks = [f"{depth['scores'][task]:.2f}" for task in FAMILY.objectives]
            mean = f"{mean_score(depth['scores']):.3f}"
            cells = [*tasks, f"{depth['search']:.3f}", mean]
            rows.append([f"{depth['layers']} layers", *cells])
    header = ["", *FAMILY.objectives, "mean, search examples", "mean, held-out"]
    return markdown_table(header, rows)


def main() -> None:
    """Run searches, or print the table."""
    arguments = search_arguments(__doc__, SEARCHES)
    torch.set_num_threads(1)  # one search to a core
    if arguments.command == "run":
        run(arguments.folder, arguments.seeds, arguments.searches)
    else:
        print(table())


if __name__ == "__main__":
    main()
