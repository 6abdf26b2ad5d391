"""The generator: merges proposed by a seeded design, measured, written every 50.

A file that was cut short is continued as if it never had been: its proposals are drawn again from
the seeds and its scores, compared with what it holds, and the draws go on from there.
"""

import time
from pathlib import Path

import numpy as np

from benchmarks.landscape.design import N_SOBOL, Design
from benchmarks.landscape.evaluator import (
    Evaluator,
    SpecialistEvaluator,
    check_provenance,
)
from benchmarks.landscape.files import extended, save_merges
from paretomerge.errors import StudyError
from paretomerge.problems import ScoredMerges
from paretomerge.problems.scored_merges import DESIGN, MERGES_FILE, START
from paretomerge.types import Array

_EVERY = 50


def make(
    count: int,
    file: Path = MERGES_FILE,
    evaluator: Evaluator | None = None,
    n_sobol: int = N_SOBOL,
) -> ScoredMerges:
    """Bring the file to the baseline recipes and `count` proposed merges.

    Raises StudyError if it holds merges that this design would not have proposed, or of other
    models.
    """
    if evaluator is None:
        evaluator = SpecialistEvaluator()
    merges = ScoredMerges.load(file) if file.exists() else baselines(evaluator, n_sobol)
    check_provenance(merges, evaluator, n_sobol)
    design = Design(evaluator.space, n_sobol)
    x, scores = replayed(design, merges, file)
    start = time.perf_counter()
    for done in range(len(x) + 1, count + 1):
        x = np.concatenate([x, design.propose(x, scores)[None]])
        method, numbers = design.rows(x[-1:])
        point = evaluator.space.point(method[0], numbers[0])
        correct = evaluator.measure(point)
        merges = extended(merges, DESIGN, method, numbers, correct[None])
        scores = np.concatenate([scores, merges.scores[-1:]])
        if done % _EVERY == 0 or done == count:
            save_merges(merges, file)
            seconds = time.perf_counter() - start
            best = merges.scores.mean(1).max()
            print(f"{done}/{count}  {seconds:.0f} s  best mean {best:.4f}", flush=True)
    return merges


def baselines(evaluator: Evaluator, n_sobol: int) -> ScoredMerges:
    """The baseline recipes, measured."""
    starts = evaluator.baselines()
    points = list(starts.values())
    method, numbers = evaluator.space.rows(points)
    return ScoredMerges(
        space=evaluator.space,
        tasks=evaluator.tasks,
        stage=np.full(len(starts), START, dtype=np.uint8),
        method=method,
        numbers=numbers,
        correct=np.stack([evaluator.measure(point) for point in points]),
        labels=tuple(starts),
        provenance=evaluator.provenance(n_sobol),
    )


def replayed(design: Design, merges: ScoredMerges, file: Path) -> tuple[Array, Array]:
    """Points `(n, C + d)` and scores `(n, m)` of the design's merges, drawn again and compared."""
    of_design = merges.stage == DESIGN
    scores = merges.scores[of_design]
    x = design.replay(scores)
    method, numbers = design.rows(x)
    stored = merges.numbers[of_design]
    same_numbers = np.allclose(numbers, stored, rtol=0, atol=1e-9, equal_nan=True)
    if not (same_numbers and np.array_equal(method, merges.method[of_design])):
        raise StudyError(
            f"{file}: expected the merges of this design, got others; "
            "move the file away to start afresh"
        )
    return x, scores
