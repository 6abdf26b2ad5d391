"""Where the surrogate believes its front to be: merged, scored, and added to the file, so that it learns where it is wrong.

A surrogate is fitted to what is known and then searched for its best, which finds the points where it errs upwards. On
the merges of the design alone it promised a task 10 points too much there (docs/landscape.md).
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from paretomerge.pareto.front import hypervolume, nondominated

from . import nsga2
from .bench import Bench, check_made
from .design import SPREAD
from .fit import solved
from .landscape import Landscape
from .merges import FILE, PROBE, Array, Merges

_CANDIDATES = 150  # points of the front that are compared


def probe(landscape: Landscape, rounds: int, count: int = 24, seed: int = 0) -> Merges:
    """`rounds` times: find the surrogate's front, measure the `count` points that promise most, tell them to the surrogate.

    The settings of the processes stay as they are, lest they err anew elsewhere.
    """
    bench, merges = Bench(), landscape.merges
    check_made(merges, bench, SPREAD)
    for r in range(rounds):
        method, numbers, scores = nsga2.front(
            merges, landscape.predict, landscape.reference, seed=seed + r, generations=60
        )
        chosen = promising(
            scores, landscape.predict(merges.method, merges.numbers), landscape.reference, count
        )
        correct = np.stack(
            [bench.measure(merges.space.point(method[i], numbers[i])) for i in chosen]
        )
        error = scores[chosen] - correct.mean(2)
        merges = merges.extended(PROBE, method[chosen], numbers[chosen], correct)
        merges.save(FILE)
        promised, found = scores.mean(1).max(), merges.scores.mean(1).max()
        told = f"bias {error.mean(0).round(4).tolist()}, best mean promised {promised:.4f}, measured {found:.4f}"
        print(f"round {r}: {told}", flush=True)
        landscape = told_of(landscape, merges)
    return merges


def promising(front: Array, known: Array, reference: Array, count: int) -> NDArray[np.intp]:
    """Indices of the points of `front` that would add most to the hypervolume of `known`, each beside those before it."""
    candidates = nsga2.thinned(front, _CANDIDATES)
    held, chosen = known[nondominated(known)], []
    for _ in range(min(count, len(candidates))):
        gains = [hypervolume(np.vstack([held, front[i]]), reference) for i in candidates]
        chosen.append(candidates[int(np.argmax(gains))])
        held = np.vstack([held, front[chosen[-1]]])
    return np.array(chosen)


def told_of(landscape: Landscape, merges: Merges) -> Landscape:
    """The same processes, given all of `merges`."""
    coefficients = solved(landscape.processes, merges)[0]
    return replace(landscape, merges=merges, coefficients=coefficients)
