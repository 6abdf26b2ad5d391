"""What the search benchmark searches: synthetic and engineering problems, and the merge landscape where it is there.

    python benchmarks/problems.py          # computes references.json anew: reference points and true fronts' volumes

All objectives are MAXIMISED: what the literature minimises is negated. Every problem has a fixed reference point, the
same for whoever takes one and for the hypervolume: per objective, a tenth of the true front's range beyond its nadir;
for the synthetic problems the median of 4,096 random points where that is worse (in many dimensions nothing reaches the
nadir in 100 evaluations, and all optimisers would score 0).

`-noisy` names measure each objective as an accuracy over 200 items: 1 at the ideal, 1/2 at the reference point, 0 as far
beyond it again (clipped); a binomial draw, given with its standard error sqrt(p (1 - p) / n), as scores of merges are.
The landscape's scores are accuracies already.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from engineering import ENGINEERING, Engineering
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from scipy.stats import qmc

from paretomerge.pareto.front import hypervolume, nondominated
from paretomerge.types import Conditions

Array = NDArray[np.float64]
Params = Mapping[str, Any]
Noise = Callable[[Array, np.random.Generator], tuple[Array, Array]]
HERE = Path(__file__).resolve().parent
REFERENCES = HERE / "references.json"
LANDSCAPE = HERE / "landscape" / "surrogate.npz"
DIMENSIONS = (5, 10, 30, 100)
ITEMS = 200


@dataclass(frozen=True)
class Problem:
    """m objectives, maximised, over `distributions`.

    evaluate: n parameter sets -> true values `(n, m)`.
    reference: `(m,)`, in the units of the values. volume: hypervolume of the true front above it.
    noise: standing between the optimiser and the values, (values `(m,)`, generator) -> (seen `(m,)`, stderr `(m,)`); None: exact.
    starts: parameter sets that every optimiser evaluates first (counted).
    """

    name: str
    distributions: Mapping[str, BaseDistribution]
    m: int
    evaluate: Callable[[Sequence[Params]], Array]
    reference: Array
    ideal: Array
    volume: float
    noise: Noise | None = None
    conditions: Conditions = field(default_factory=dict)
    starts: Sequence[Params] = ()

    def share(self, true: Array, seen: Array) -> float:
        """Share of the true front's hypervolume, by the TRUE values of the points that are nondominated as SEEN.

        That is what a user gets who picks from the front that the noisy scores show.
        """
        return hypervolume(true[nondominated(seen)], self.reference) / self.volume


# ----- the functions, minimised, on the unit cube


def zdt(kind: int, x: Array) -> Array:
    """Zitzler, Deb & Thiele 2000, ZDT1 to 3: `(n, d)` -> `(n, 2)`."""
    return np.stack([x[:, 0], _zdt_shape(kind, x[:, 0], 1 + 9 * x[:, 1:].mean(1))], axis=1)


def _zdt_shape(kind: int, f1: Array, g: Array | float) -> Array:
    ratio = f1 / g
    if kind == 2:
        return np.asarray(g * (1 - ratio**2))
    return np.asarray(
        g * (1 - np.sqrt(ratio) - (ratio * np.sin(10 * np.pi * f1) if kind == 3 else 0))
    )


def dtlz2(m: int, x: Array) -> Array:
    """Deb, Thiele, Laumanns & Zitzler 2002: the front is the part of the unit sphere in the positive orthant."""
    angle = x[:, : m - 1] * np.pi / 2
    radius = 1 + ((x[:, m - 1 :] - 0.5) ** 2).sum(1)
    f = np.repeat(radius[:, None], m, axis=1)
    for k in range(m):
        f[:, k] *= np.cos(angle[:, : m - 1 - k]).prod(1)
        if k:
            f[:, k] *= np.sin(angle[:, m - 1 - k])
    return f


def dtlz7(m: int, x: Array) -> Array:
    """Deb, Thiele, Laumanns & Zitzler 2002: the front is 2^(m - 1) separate pieces."""
    g = 2 + 9 * x[:, m - 1 :].mean(1)
    shape = m - _waves(x[:, : m - 1] / g[:, None], x[:, : m - 1]).sum(1)
    return np.column_stack([x[:, : m - 1], g * shape])


def _waves(ratio: Array, f: Array) -> Array:
    return np.asarray(ratio * (1 + np.sin(3 * np.pi * f)))


# ----- the true fronts, all minimised: ideal, nadir, and the volume below a reference point


@dataclass(frozen=True)
class Front:
    ideal: Array
    nadir: Array
    volume: Callable[[Array], float]


_GRID = np.linspace(0, 1, 200_001)


def zdt_front(kind: int) -> Front:
    """The volume is the area between the lower envelope of f2(f1) and the reference point."""
    envelope = np.minimum.accumulate(_zdt_shape(kind, _GRID, 1.0))
    on_front = np.diff(envelope, prepend=np.inf) < 0
    last = _GRID[on_front].max()
    ideal, nadir = np.array([0.0, envelope[-1]]), np.array([last, 1.0])
    return Front(
        ideal,
        nadir,
        lambda r: float(np.trapezoid(r[1] - envelope, _GRID) + (r[0] - 1) * (r[1] - envelope[-1])),
    )


def dtlz2_front(m: int) -> Front:
    ball = math.pi ** (m / 2) / math.gamma(m / 2 + 1) / 2**m
    return Front(np.zeros(m), np.ones(m), lambda r: float(np.prod(r) - ball))


def dtlz7_front(m: int) -> Front:
    """With g at its least, 2, the last objective is 2 m less a sum of one term per other objective.

    So the least that is reachable under (t1, ...) is 2 m less the sum of each term's running maximum.
    """
    reached = np.maximum.accumulate(_waves(_GRID, _GRID))
    last = _GRID[np.diff(reached, prepend=-1.0) > 0].max()
    ideal = np.append(np.zeros(m - 1), 2 * m - (m - 1) * reached[-1])
    nadir = np.append(np.full(m - 1, last), 2.0 * m)

    def volume(r: Array) -> float:
        side = r[0]  # the same for all but the last objective, at least `last`
        below = _GRID[: np.searchsorted(_GRID, side, side="right")]
        area = np.trapezoid(reached[: len(below)], below) + max(side - 1, 0.0) * reached[-1]
        return float(side ** (m - 1) * (r[-1] - 2 * m) + (m - 1) * side ** (m - 2) * area)

    return Front(ideal, nadir, volume)


def searched_front(task: Engineering, population: int = 400, generations: int = 400) -> Front:
    """The published ideal and nadir points; the volume from three long runs of NSGA-II (pymoo) inside the reference point."""

    def volume(r: Array) -> float:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem as PymooProblem
        from pymoo.optimize import minimize

        class Inside(PymooProblem):  # type: ignore[misc]
            def _evaluate(self, x: Array, out: dict[str, Array], *_: Any, **__: Any) -> None:
                out["F"] = task(x)
                out["G"] = out["F"] - r

        inside = Inside(n_var=len(task.low), n_obj=len(r), n_ieq_constr=len(r), xl=0.0, xu=1.0)
        found = [
            minimize(inside, NSGA2(population), ("n_gen", generations), seed=seed).F
            for seed in range(3)
        ]
        return hypervolume(-np.concatenate(found), -r)

    return Front(task.ideal, task.nadir, volume)


# ----- the table


@dataclass(frozen=True)
class Family:
    function: Callable[[Array], Array]
    d: int
    front: Callable[[], Front]
    synthetic: bool = True


def families() -> dict[str, Family]:
    """Every problem without noise, by name."""
    table: dict[str, Family] = {}
    for d in DIMENSIONS:
        for kind in (1, 2, 3):
            table[f"zdt{kind}-d{d}"] = Family(partial(zdt, kind), d, partial(zdt_front, kind))
    for m in (2, 3, 4):
        for d in DIMENSIONS:
            table[f"dtlz2-m{m}-d{d}"] = Family(partial(dtlz2, m), d, partial(dtlz2_front, m))
            table[f"dtlz7-m{m}-d{d}"] = Family(partial(dtlz7, m), d, partial(dtlz7_front, m))
    for name, task in ENGINEERING.items():
        table[name] = Family(task, len(task.low), partial(searched_front, task), synthetic=False)
    return table


def names() -> list[str]:
    """Every problem that can be had here."""
    plain = [*families(), *(["landscape"] if LANDSCAPE.exists() else [])]
    return [*plain, *(f"{name}-noisy" for name in plain)]


def problem(name: str) -> Problem:
    """The problem of this name; `-noisy` at its end puts the binomial noise on top."""
    base = name.removesuffix("-noisy")
    if base == "landscape":
        return _landscape(name, None if base == name else binomial)
    family, known = families()[base], json.loads(REFERENCES.read_text())[base]
    distributions = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(family.d)}
    reference, ideal = -np.asarray(known["reference"]), -np.asarray(known["ideal"])

    def evaluate(params: Sequence[Params]) -> Array:
        return -family.function(np.array([[p[key] for key in distributions] for p in params]))

    exact = Problem(name, distributions, len(ideal), evaluate, reference, ideal, known["volume"])
    return exact if base == name else _as_accuracies(exact)


def _as_accuracies(exact: Problem) -> Problem:
    half = 2 * (exact.ideal - exact.reference)

    def evaluate(params: Sequence[Params]) -> Array:
        return np.clip(1 - (exact.ideal - exact.evaluate(params)) / half, 0.0, 1.0)

    ones = np.ones(exact.m)
    volume = exact.volume / float(np.prod(half))
    return Problem(
        exact.name, exact.distributions, exact.m, evaluate, ones / 2, ones, volume, binomial
    )


def binomial(accuracy: Array, rng: np.random.Generator, items: int = ITEMS) -> tuple[Array, Array]:
    """What `items` right or wrong answers show of an accuracy, and its standard error."""
    seen = rng.binomial(items, accuracy) / items
    return seen, np.sqrt(seen * (1 - seen) / items)


def _landscape(name: str, noise: Noise | None) -> Problem:
    """Real merges of the shipped specialists, by the fitted surrogate of `benchmarks/landscape`."""
    from landscape import Landscape

    known = Landscape.load()
    ideal = known.scores(known.front).max(0)
    starts = tuple(known.starts.values())
    return Problem(
        name,
        known.distributions,
        len(ideal),
        known.scores,
        known.reference,
        ideal,
        known.hypervolume,
        noise,
        known.conditions,
        starts,
    )


def compute_reference(family: Family) -> dict[str, Any]:
    """Ideal, reference point and volume of a problem, minimised, as they stand in references.json."""
    front = family.front()
    reference = front.nadir + 0.1 * (front.nadir - front.ideal)
    if family.synthetic:
        random = family.function(qmc.Sobol(family.d, rng=0).random_base2(12))
        reference = np.maximum(reference, np.median(random, axis=0))
    rounded = [float(f"{r:.6g}") for r in reference]
    return {
        "ideal": [float(f"{v:.6g}") for v in front.ideal],
        "reference": rounded,
        "volume": float(f"{front.volume(np.array(rounded)):.6g}"),
    }


def main() -> None:
    found = {}
    for name, family in families().items():
        found[name] = compute_reference(family)
        print(name, found[name], flush=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items())
    REFERENCES.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
