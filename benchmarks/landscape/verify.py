"""Do the points exist that the surrogate calls best? A dozen of its front, merged and scored."""

from pathlib import Path

import numpy as np

from benchmarks.landscape.design import N_SOBOL
from benchmarks.landscape.evaluator import SpecialistEvaluator, check_provenance
from benchmarks.landscape.nsga2 import thinned
from benchmarks.reporting import RESULTS, append_entry, markdown_table, read_entries
from paretomerge.pareto.ranking import knee
from paretomerge.problems import MergeLandscape

FILE = RESULTS / "landscape.jsonl"


def verify(landscape: MergeLandscape, count: int = 12, file: Path = FILE) -> None:
    """Measure the knee, the best mean, the best of each task and points far from these."""
    evaluator = SpecialistEvaluator()
    check_provenance(landscape.merges, evaluator, N_SOBOL)
    front = landscape.front
    predicted = landscape.scores(front)
    best_mean = int(predicted.mean(1).argmax())
    far_apart = thinned(predicted, count).tolist()
    ordered = dict.fromkeys([knee(predicted), best_mean, *far_apart])
    chosen = list(ordered)[:count]
    file.unlink(missing_ok=True)
    for i in chosen:
        measured = evaluator.measure(front[i]).mean(1)
        entry = {
            "params": front[i],
            "predicted": predicted[i].round(5).tolist(),
            "measured": measured.round(5).tolist(),
        }
        append_entry(file, entry)
    print(report(landscape, file))


def report(landscape: MergeLandscape, file: Path = FILE) -> str:
    """The table of docs/lab/landscape.md, and the errors below it."""
    entries = read_entries(file)
    rows = []
    for entry in entries:
        cells = [entry["params"]["method"]]
        for predicted, measured in zip(
            entry["predicted"], entry["measured"], strict=True
        ):
            cells += [f"{predicted:.3f}", f"{measured:.3f}"]
        rows.append(cells)
    header = ["method"]
    for task in landscape.tasks:
        header += [f"{task}, predicted", "measured"]
    predicted = np.array([entry["predicted"] for entry in entries])
    error = predicted - np.array([entry["measured"] for entry in entries])
    variance = predicted * (1 - predicted) / landscape.merges.n_examples
    root_mean_square = np.sqrt((error**2).mean(0))
    binomial = np.sqrt(variance.mean(0))
    lines = [
        markdown_table(header, rows),
        f"bias: {error.mean(0).round(4).tolist()}",
        f"root mean square error: {root_mean_square.round(4).tolist()}",
        f"binomial standard error: {binomial.round(4).tolist()}",
    ]
    return "\n".join(lines)
