"""The generator: merges proposed by a seeded design, measured on the bench, written every 50.

A file that was cut short is continued as if it never had been: its proposals are drawn again from the seeds and its
scores, compared with what it holds, and the draws go on from there.
"""

import time
from pathlib import Path

import numpy as np

from paretomerge.errors import StudyError

from .bench import Bench, check_made
from .design import SPREAD, Design
from .merges import DESIGN, FILE, STARTS, Merges

MERGES = 3000
_EVERY = 50


def make(
    count: int = MERGES, file: Path = FILE, bench: Bench | None = None, spread: int = SPREAD
) -> Merges:
    """Bring the file to the known starts and `count` proposed merges; what it holds already counts.

    Raises StudyError if it holds merges that this design would not have proposed, or of other models.
    """
    bench = bench or Bench()
    merges = Merges.load(file) if file.exists() else _begun(bench, spread)
    check_made(merges, bench, spread)
    design, mine = Design(bench.space, spread), merges.stage == DESIGN
    scores = merges.scores[mine]
    x = design.replay(scores)
    method, numbers = design.rows(x)
    as_designed = np.allclose(numbers, merges.numbers[mine], rtol=0, atol=1e-9, equal_nan=True)
    if not (as_designed and np.array_equal(method, merges.method[mine])):
        raise StudyError(
            f"{file}: expected the merges of this design, got others; move the file away to start afresh"
        )
    start = time.perf_counter()
    for done in range(len(x) + 1, count + 1):
        x = np.concatenate([x, design.propose(x, scores)[None]])
        method, numbers = design.rows(x[-1:])
        merges = merges.extended(
            DESIGN, method, numbers, bench.measure(bench.space.point(method[0], numbers[0]))[None]
        )
        scores = np.concatenate([scores, merges.scores[-1:]])
        if done % _EVERY == 0 or done == count:
            merges.save(file)
            best = merges.scores.mean(1).max()
            print(
                f"{done}/{count}  {time.perf_counter() - start:.0f} s  best mean {best:.4f}",
                flush=True,
            )
    return merges


def _begun(bench: Bench, spread: int) -> Merges:
    """The known starts, measured."""
    starts = bench.starts()
    correct = np.stack([bench.measure(point) for point in starts.values()])
    stage = np.full(len(starts), STARTS, dtype=np.uint8)
    rows = bench.space.rows(list(starts.values()))
    return Merges(
        bench.space, bench.tasks, stage, *rows, correct, tuple(starts), bench.made(spread)
    )
