"""Reference points of the test problems: writes paretomerge/problems/data/references.json.

    python -m benchmarks.references          # an hour; needs pymoo: pip install
    'paretomerge[bench]'

Per objective, the reference point is a tenth of the true front's range beyond its nadir; for the
synthetic problems the median of 4,096 random points where that is worse. In many dimensions nothing
reaches the nadir in 100 evaluations, and all optimisers would score 0.

Volumes below the reference point are exact for the synthetic problems. Those of the engineering
problems come from three long runs of NSGA-II.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import qmc

from paretomerge.pareto.front import hypervolume
from paretomerge.problems.catalogue import REFERENCES, Reference, unit_cube_functions
from paretomerge.problems.engineering import ENGINEERING, EngineeringProblem
from paretomerge.problems.synthetic import dtlz7_waves, zdt_second_objective
from paretomerge.types import Array

GRID = np.linspace(0, 1, 200_001)


@dataclass(frozen=True)
class Front:
    """A true front, minimised.

    Attributes:
        ideal: the best value of each objective, `(m,)`.
        nadir: the worst value of each objective on the front, `(m,)`.
        volume: reference point `(m,)` -> volume that the front dominates below it.
    """

    ideal: Array
    nadir: Array
    volume: Callable[[Array], float]


def zdt_front(kind: int) -> Front:
    """The volume is the area between the lower envelope of f2(f1) and the reference point."""
    envelope = np.minimum.accumulate(zdt_second_objective(kind, GRID, 1.0))
    on_front = np.diff(envelope, prepend=np.inf) < 0
    last = GRID[on_front].max()

    def volume(reference: Array) -> float:
        width, height = reference
        # Up to f1 = 1 below the envelope, and beyond it below its last value.
        left = np.trapezoid(height - envelope, GRID)
        right = (width - 1) * (height - envelope[-1])
        return float(left + right)

    ideal = np.array([0.0, envelope[-1]])
    nadir = np.array([last, 1.0])
    return Front(ideal, nadir, volume)


def dtlz2_front(m: int) -> Front:
    """The volume is a box less the part of the unit ball in the positive orthant."""
    half = m / 2
    whole_ball = math.pi**half / math.gamma(half + 1)
    ball = whole_ball / 2**m

    def volume(reference: Array) -> float:
        return float(np.prod(reference) - ball)

    return Front(np.zeros(m), np.ones(m), volume)


def dtlz7_front(m: int) -> Front:
    """The front where g has its least value, 2.

    There the last objective is 2 m less a sum of one term per other objective, so its least value
    below (t1, ...) is 2 m less the sum of each term's running maximum.
    """
    running_maximum = np.maximum.accumulate(dtlz7_waves(GRID, GRID))
    last = GRID[np.diff(running_maximum, prepend=-1.0) > 0].max()
    least = 2 * m - (m - 1) * running_maximum[-1]
    ideal = np.append(np.zeros(m - 1), least)
    nadir = np.append(np.full(m - 1, last), 2.0 * m)

    def volume(reference: Array) -> float:
        side = reference[0]  # the same for all but the last objective, at least `last`
        n_below = np.searchsorted(GRID, side, side="right")
        inside = np.trapezoid(running_maximum[:n_below], GRID[:n_below])
        outside = max(side - 1, 0.0) * running_maximum[-1]
        area = inside + outside
        height = reference[-1] - 2 * m
        box = side ** (m - 1) * height
        waves = (m - 1) * side ** (m - 2) * area
        return float(box + waves)

    return Front(ideal, nadir, volume)


def engineering_front(
    problem: EngineeringProblem, population: int = 400, generations: int = 400
) -> Front:
    """The published ideal and nadir points; the volume from three long runs of NSGA-II."""

    def volume(reference: Array) -> float:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem as PymooProblem
        from pymoo.optimize import minimize

        class Inside(PymooProblem):  # type: ignore[misc]
            """The problem, with the reference point as a constraint of each objective."""

            def _evaluate(
                self, x: Array, out: dict[str, Array], *_: Any, **__: Any
            ) -> None:
                out["F"] = problem(x)
                out["G"] = out["F"] - reference

        m = len(reference)
        inside = Inside(n_var=len(problem.low), n_obj=m, n_ieq_constr=m, xl=0.0, xu=1.0)
        fronts = []
        for seed in range(3):
            result = minimize(
                inside, NSGA2(population), ("n_gen", generations), seed=seed
            )
            fronts.append(result.F)
        return hypervolume(-np.concatenate(fronts), -reference)

    return Front(problem.ideal, problem.nadir, volume)


def front_of(name: str) -> Front:
    """The true front of a problem."""
    if name in ENGINEERING:
        return engineering_front(ENGINEERING[name])
    if name.startswith("zdt"):
        return zdt_front(int(name[3]))
    family, objectives, _ = name.split("-")
    build = dtlz2_front if family == "dtlz2" else dtlz7_front
    return build(int(objectives[1:]))


def compute_reference(name: str) -> Reference:
    """Ideal point, reference point and volume, minimised."""
    front = front_of(name)
    reference = front.nadir + 0.1 * (front.nadir - front.ideal)
    if name not in ENGINEERING:
        problem = unit_cube_functions()[name]
        sobol = qmc.Sobol(problem.d, rng=0)
        random_values = problem.function(sobol.random_base2(12))
        reference = np.maximum(reference, np.median(random_values, axis=0))
    rounded = [six_digits(value) for value in reference]
    return {
        "ideal": [six_digits(value) for value in front.ideal],
        "reference": rounded,
        "volume": six_digits(front.volume(np.array(rounded))),
    }


def six_digits(value: float) -> float:
    """The value, rounded to six significant digits."""
    return float(f"{value:.6g}")


def main() -> None:
    """Compute every reference and write the file, one line per problem."""
    lines = []
    for name in unit_cube_functions():
        reference = compute_reference(name)
        print(name, reference, flush=True)
        lines.append(f"{json.dumps(name)}: {json.dumps(reference)}")
    REFERENCES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
