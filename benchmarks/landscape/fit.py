"""From the merges to the landscape: one process per task, and the front of what they predict."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.landscape import nsga2
from benchmarks.landscape.files import save_surrogate
from benchmarks.landscape.gaussian_process import fit, leave_one_out, logits, solve
from paretomerge.errors import StudyError
from paretomerge.pareto.front import hypervolume, reference_point
from paretomerge.problems import MergeLandscape, ScoredMerges
from paretomerge.problems.merge_landscape import SURROGATE_FILE
from paretomerge.problems.surrogate import LogitProcess, features, sigmoid
from paretomerge.types import Array

_FRONT_SAMPLE = 300


def build(
    merges: ScoredMerges,
    processes: tuple[LogitProcess, ...] | None = None,
    file: Path = SURROGATE_FILE,
    seeds: tuple[int, ...] = (0, 1),
) -> MergeLandscape:
    """Fit the processes unless they are given, search their front once per seed, write the file."""
    processes = processes or fit_processes(merges)
    coefficients, left_out = solve_left_out(processes, merges)
    reference = reference_point(source_scores(merges))
    draft = MergeLandscape(
        merges=merges,
        processes=processes,
        coefficients=coefficients,
        error=np.sqrt(((left_out - merges.scores) ** 2).mean(0)),
        reference_point=reference,
        front_rows=(merges.method[:0], merges.numbers[:0]),
        front_hypervolume=1.0,
    )
    fronts = []
    for seed in seeds:
        fronts.append(nsga2.front(merges, draft.predict, reference, seed=seed))
    method, numbers, scores = nsga2.united(fronts)
    volume = hypervolume(scores, reference)
    by_seed = [hypervolume(front[2], reference) for front in fronts]
    print(
        f"hypervolume of the front by seed {by_seed}, of both {volume:.6f} ({len(method)} points)",
        flush=True,
    )
    sample = nsga2.thinned(scores, _FRONT_SAMPLE)
    front_rows = (method[sample], numbers[sample])
    landscape = replace(draft, front_rows=front_rows, front_hypervolume=volume)
    save_surrogate(landscape, file)
    return landscape


def fit_processes(merges: ScoredMerges) -> tuple[LogitProcess, ...]:
    """One fitted process per task."""
    x = features(merges.space, merges.method, merges.numbers)
    processes = []
    for j in range(len(merges.tasks)):
        z, v = task_logits(merges, j)
        processes.append(fit(x, z, v))
    return tuple(processes)


def solve_all(processes: tuple[LogitProcess, ...], merges: ScoredMerges) -> Array:
    """Coefficients `(m, n)` of the processes, given all merges."""
    x = features(merges.space, merges.method, merges.numbers)
    rows = []
    for j, process in enumerate(processes):
        z, v = task_logits(merges, j)
        rows.append(solve(process, x, z, v))
    return np.stack(rows)


def solve_left_out(
    processes: tuple[LogitProcess, ...], merges: ScoredMerges
) -> tuple[Array, Array]:
    """Coefficients `(m, n)`, and the scores `(n, m)` of each merge as the others predict it."""
    x = features(merges.space, merges.method, merges.numbers)
    rows, predicted_logits = [], []
    for j, process in enumerate(processes):
        z, v = task_logits(merges, j)
        coefficients, left_out = leave_one_out(process, x, z, v)
        rows.append(coefficients)
        predicted_logits.append(left_out)
    return np.stack(rows), sigmoid(np.stack(predicted_logits, axis=1))


def task_logits(merges: ScoredMerges, task: int) -> tuple[Array, Array]:
    """Logits `(n,)` of the merges' accuracies on a task, and their variances `(n,)`."""
    n_correct = merges.correct[:, task].sum(1).astype(float)
    return logits(n_correct, merges.n_examples)


def source_scores(merges: ScoredMerges) -> Array:
    """Measured scores `(K, m)` of the sources alone."""
    models = merges.provenance["models"]
    assert isinstance(models, Mapping)
    sources = [name for name in models if name != "base"]
    for name in sources:
        if name not in merges.labels:
            raise StudyError(
                f"The merges lack the baseline recipe {name}; run `make` to its end"
            )
    return merges.scores[[merges.labels.index(name) for name in sources]]
