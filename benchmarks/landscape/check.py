"""How good the surrogate is, by ten-fold cross-validation; and how good others would have been.

Settings (length scales and the like) are learned on folds 0 to 4, without a look at folds 5 to 9; each of these is then
predicted from the nine others. So no prediction rests on the merge that it is compared with.
"""

import time
from collections.abc import Callable, Mapping
from itertools import combinations_with_replacement

import moocore
import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from paretomerge.pareto.front import hypervolume, nondominated

from .landscape import Landscape
from .merges import Array, Merges
from .process import features, fit, logits, sigmoid

_FOLDS, _HELD = 10, 5
Mask = NDArray[np.bool_]
Predictor = Callable[[Array, Array, Array, Array], Array]
"""Features, logits and variances of the known points, features of the others -> their logits."""


def check(landscape: Landscape) -> None:
    """Print the tables of docs/landscape.md."""
    merges = landscape.merges
    held = _folds(merges) >= _HELD
    front = near_front(merges)
    print(
        "| surrogate | RMSE, all | RMSE, near the front | bias, near the front | s |\n|---|---:|---:|---:|---:|"
    )
    print(
        f"| binomial standard error | {_floor(merges, held):.4f} | {_floor(merges, held & front):.4f} | | |"
    )
    for name, (learner, by_method) in _candidates().items():
        start = time.perf_counter()
        predicted = cross_validated(merges, learner, by_method)
        error = predicted - merges.scores
        rows = [_rms(error[held]), _rms(error[held & front]), error[held & front].mean()]
        print(
            f"| {name} | {rows[0]:.4f} | {rows[1]:.4f} | {rows[2]:+.4f} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )
    print()  # the last candidate is what is shipped
    _details(merges, predicted, held, front)
    print()
    _fronts(landscape)


def _details(merges: Merges, predicted: Array, held: Mask, front: Mask) -> None:
    groups = {method: held & (merges.method == i) for i, method in enumerate(merges.space.methods)}
    groups |= {"all": held, "near the front": held & front}
    print(
        "| task | merges | n | RMSE | binomial | R² | Spearman |\n|---|---|---:|---:|---:|---:|---:|"
    )
    for j, task in enumerate(merges.tasks):
        for name, group in groups.items():
            true, guess = merges.scores[group, j], predicted[group, j]
            floor = np.sqrt((merges.stderr[group, j] ** 2).mean())
            fit_of = 1 - ((guess - true) ** 2).mean() / true.var()
            rank = spearmanr(true, guess).statistic
            print(
                f"| {task} | {name} | {group.sum()} | {_rms(guess - true):.4f} | {floor:.4f} | {fit_of:.3f} | {rank:.3f} |"
            )


def _fronts(landscape: Landscape) -> None:
    """The surrogate's front beside that of the merges."""
    merges, reference = landscape.merges, landscape.reference
    known = landscape.predict(merges.method, merges.numbers)
    on_front = nondominated(merges.scores)
    front = landscape.scores(landscape.front)
    rows = {
        "merges, as measured": (merges.scores, hypervolume(merges.scores, reference)),
        "the measured front, as the surrogate has it": (
            known[on_front],
            hypervolume(known[on_front], reference),
        ),
        "merges, as the surrogate has them": (known, hypervolume(known, reference)),
        "the surrogate's own front": (front, landscape.hypervolume),
    }
    print(
        f"| | best mean | {' | '.join(f'best {t}' for t in merges.tasks)} | hypervolume |\n|---|{'---:|' * (len(merges.tasks) + 2)}"
    )
    for name, (scores, volume) in rows.items():
        print(
            f"| {name} | {scores.mean(1).max():.4f} | {' | '.join(f'{b:.4f}' for b in scores.max(0))} | {volume:.5f} |"
        )


def cross_validated(
    merges: Merges, learner: Callable[[Array, Array, Array], Predictor], by_method: bool
) -> Array:
    """Scores `(n, m)` predicted for folds 5 to 9 without their own merges; NaN elsewhere."""
    folds = _folds(merges)
    x = features(merges.space, merges.method, merges.numbers)
    out = np.full(merges.scores.shape, np.nan)
    for part in (
        [merges.method == i for i in range(len(merges.space.methods))]
        if by_method
        else [np.ones(len(merges), dtype=bool)]
    ):
        for j in range(len(merges.tasks)):
            z, v = logits(merges.correct[:, j].sum(1).astype(float), merges.items)
            learn = part & (folds < _HELD)
            predict = learner(x[learn], z[learn], v[learn])
            for fold in range(_HELD, _FOLDS):
                known, asked = part & (folds != fold), part & (folds == fold)
                out[asked, j] = sigmoid(predict(x[known], z[known], v[known], x[asked]))
    return out


def near_front(merges: Merges) -> Mask:
    """Merges of the first three ranks of dominance, or of the best tenth by mean score: where optimisers live."""
    rank = np.asarray(moocore.pareto_rank(merges.scores, maximise=True))
    mean = merges.scores.mean(1)
    return (rank - rank.min() < 3) | (mean >= np.quantile(mean, 0.9))


def _candidates() -> Mapping[str, tuple[Callable[[Array, Array, Array], Predictor], bool]]:
    def polynomial(degree: int, penalty: float) -> Callable[[Array, Array, Array], Predictor]:
        return lambda x, z, v: (
            lambda known, z, v, asked: _ridge(known, z, v, asked, degree, penalty)
        )

    def process(**options: object) -> Callable[[Array, Array, Array], Predictor]:
        def learner(x: Array, z: Array, v: Array) -> Predictor:
            fitted = fit(x, z, v, **options)  # type: ignore[arg-type]

            def predict(known: Array, z: Array, v: Array, asked: Array) -> Array:
                return np.asarray(fitted.covariance(asked, known) @ fitted.solve(known, z, v)[0])

            return predict

        return learner

    return {
        "ridge, degree 2, one per method": (polynomial(2, 0.1), True),
        "ridge, degree 3, one per method": (polynomial(3, 1.0), True),
        "GP, squared exponential, ARD, one per method": (process(shape="rbf"), True),
        "GP, Matérn 5/2, ARD, one per method": (process(), True),
        "GP, squared exponential, learned map, method a coordinate": (
            process(shape="rbf", learn_map=True),
            False,
        ),
        "GP, Matérn 5/2, learned map, method a coordinate": (process(learn_map=True), False),
        "GP, Matérn 5/2, ARD, method a coordinate (shipped)": (process(), False),
    }


def _ridge(known: Array, z: Array, v: Array, asked: Array, degree: int, penalty: float) -> Array:
    """Least squares on monomials of [-1, 1]-scaled features, rows weighted by their noise."""

    def monomials(x: Array) -> Array:
        scaled = 2 * x - 1
        columns = [np.ones(len(x))]
        for power in range(1, degree + 1):
            columns += [
                scaled[:, list(which)].prod(1)
                for which in combinations_with_replacement(range(x.shape[1]), power)
            ]
        return np.stack(columns, axis=1)

    varies = np.ptp(known, axis=0) > 0
    a, weights = monomials(known[:, varies]), 1 / (v + 0.3)
    moment = a.T @ (a * weights[:, None]) + penalty * np.eye(a.shape[1])
    return np.asarray(monomials(asked[:, varies]) @ np.linalg.solve(moment, a.T @ (weights * z)))


def _folds(merges: Merges) -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(len(merges)) % _FOLDS


def _floor(merges: Merges, group: Mask) -> float:
    return _rms(merges.stderr[group])


def _rms(error: Array) -> float:
    return float(np.sqrt((error**2).mean()))
