"""Merges where the surrogate sees its front, so that it learns where it is wrong.

A surrogate is fitted to merges and then searched for its best, which finds the points where it errs
upwards. On the merges of the design alone it promised a task 10 points too much there
(docs/lab/landscape.md).
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.landscape import nsga2
from benchmarks.landscape.design import N_SOBOL
from benchmarks.landscape.evaluator import SpecialistEvaluator, check_provenance
from benchmarks.landscape.files import extended, save_merges
from benchmarks.landscape.fit import solve_all
from paretomerge.pareto.front import hypervolume, nondominated
from paretomerge.problems import MergeLandscape, ScoredMerges
from paretomerge.problems.scored_merges import PROBE
from paretomerge.types import Array

_COMPARED = 150  # points of the front


def probe(
    landscape: MergeLandscape, rounds: int, count: int = 24, seed: int = 0
) -> ScoredMerges:
    """Measure the `count` most promising points of the surrogate's front, `rounds` times.

    The surrogate is solved anew after each round. The processes stay as they are, lest they err
    anew elsewhere.
    """
    evaluator, merges = SpecialistEvaluator(), landscape.merges
    check_provenance(merges, evaluator, N_SOBOL)
    for r in range(rounds):
        method, numbers, scores = nsga2.front(
            merges,
            landscape.predict,
            landscape.reference_point,
            seed=seed + r,
            generations=60,
        )
        predicted = landscape.predict(merges.method, merges.numbers)
        chosen = promising(scores, predicted, landscape.reference_point, count)
        measured = []
        for i in chosen:
            point = merges.space.point(method[i], numbers[i])
            measured.append(evaluator.measure(point))
        correct = np.stack(measured)
        merges = extended(merges, PROBE, method[chosen], numbers[chosen], correct)
        save_merges(merges)
        bias = (scores[chosen] - correct.mean(2)).mean(0)
        print(
            f"round {r}: bias {bias.round(4).tolist()}, "
            f"best mean promised {scores.mean(1).max():.4f}, "
            f"measured {merges.scores.mean(1).max():.4f}",
            flush=True,
        )
        coefficients = solve_all(landscape.processes, merges)
        landscape = replace(landscape, merges=merges, coefficients=coefficients)
    return merges


def promising(
    front: Array, scores: Array, reference: Array, count: int
) -> NDArray[np.intp]:
    """Indices of the points of `front` that add most to the hypervolume of `scores`.

    They are chosen one after another, each beside those before it.
    """
    candidates = nsga2.thinned(front, _COMPARED)
    current = scores[nondominated(scores)]
    chosen = []
    for _ in range(min(count, len(candidates))):
        gains = []
        for i in candidates:
            with_point = np.vstack([current, front[i]])
            gains.append(hypervolume(with_point, reference))
        best = candidates[int(np.argmax(gains))]
        chosen.append(best)
        current = np.vstack([current, front[best]])
    return np.array(chosen)
