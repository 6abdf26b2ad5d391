"""How good the surrogate is, by ten-fold cross-validation; and how good others would have been.

Hyperparameters are learned on folds 0 to 4, without a look at folds 5 to 9. Each of these is then
predicted from the nine others. So no prediction rests on the merge that it is compared with.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement

import moocore
import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.landscape.fit import task_logits
from benchmarks.landscape.gaussian_process import KernelName, covariance, fit, solve
from benchmarks.reporting import markdown_row, markdown_table
from paretomerge.pareto.front import hypervolume, nondominated
from paretomerge.problems import MergeLandscape, ScoredMerges
from paretomerge.problems.surrogate import features, sigmoid
from paretomerge.types import Array

_FOLDS = 10
_FIRST_TESTED = 5  # the folds from this one on are predicted

Mask = NDArray[np.bool_]

Predictor = Callable[[Array, Array, Array, Array], Array]
"""Features, logits and variances of some merges, features of others -> logits of the others."""


@dataclass(frozen=True)
class Surrogate:
    """A kind of surrogate.

    Attributes:
        learn: features `(n, p)`, logits `(n,)` and variances `(n,)` -> predictor.
        by_method: whether each merge method has one of its own.
    """

    learn: Callable[[Array, Array, Array], Predictor]
    by_method: bool


def check(landscape: MergeLandscape) -> None:
    """Print the tables of docs/lab/landscape.md."""
    merges = landscape.merges
    tested = fold_of(merges) >= _FIRST_TESTED
    near = tested & near_front(merges)
    header = [
        "surrogate",
        "RMSE, all",
        "RMSE, near the front",
        "bias, near the front",
        "s",
    ]
    binomial = ["binomial standard error", *rms_cells(merges.stderr, tested, near)]
    print(markdown_table(header, [[*binomial, "", ""]]))
    for name, surrogate in surrogates().items():
        start = time.perf_counter()
        predicted = cross_validated(merges, surrogate)
        seconds = time.perf_counter() - start
        error = predicted - merges.scores
        cells = [name, *rms_cells(error, tested, near)]
        cells += [f"{error[near].mean():+.4f}", f"{seconds:.0f}"]
        print(markdown_row(cells), flush=True)
    # The last one is what is shipped.
    print("\n" + errors_by_task(merges, predicted, tested, near))
    print("\n" + fronts_table(landscape))


def rms_cells(error: Array, *groups: Mask) -> list[str]:
    """The root mean square of the errors `(n, m)` of each group."""
    return [f"{rms(error[group]):.4f}" for group in groups]


def errors_by_task(
    merges: ScoredMerges, predicted: Array, tested: Mask, near: Mask
) -> str:
    """Errors of one surrogate by task and method."""
    groups: dict[str, Mask] = {}
    for i, method in enumerate(merges.space.methods):
        groups[method] = tested & (merges.method == i)
    groups |= {"all": tested, "near the front": near}
    rows = []
    for j, task in enumerate(merges.tasks):
        for name, group in groups.items():
            scores = merges.scores[group, j]
            guess = predicted[group, j]
            error = guess - scores
            r_squared = 1 - (error**2).mean() / scores.var()
            rank = spearmanr(scores, guess).statistic
            cells = [task, name, str(group.sum()), f"{rms(error):.4f}"]
            cells += rms_cells(merges.stderr[:, j], group)
            cells += [f"{r_squared:.3f}", f"{rank:.3f}"]
            rows.append(cells)
    header = ["task", "merges", "n", "RMSE", "binomial", "R²", "Spearman"]
    return markdown_table(header, rows, text_columns=2)


def fronts_table(landscape: MergeLandscape) -> str:
    """The surrogate's front beside that of the merges."""
    merges, reference = landscape.merges, landscape.reference_point
    predicted = landscape.predict(merges.method, merges.numbers)
    on_front = nondominated(merges.scores)
    front = landscape.scores(landscape.front)
    lines = {
        "merges, as measured": (merges.scores, None),
        "the measured front, as the surrogate has it": (predicted[on_front], None),
        "merges, as the surrogate has them": (predicted, None),
        "the surrogate's own front": (front, landscape.front_hypervolume),
    }
    rows = []
    for name, (scores, volume) in lines.items():
        if volume is None:
            volume = hypervolume(scores, reference)
        best = [scores.mean(1).max(), *scores.max(0)]
        cells = [f"{score:.4f}" for score in best]
        rows.append([name, *cells, f"{volume:.5f}"])
    header = [
        "",
        "best mean",
        *(f"best {task}" for task in merges.tasks),
        "hypervolume",
    ]
    return markdown_table(header, rows)


# ----- cross-validation


def cross_validated(merges: ScoredMerges, surrogate: Surrogate) -> Array:
    """Scores `(n, m)` predicted for folds 5 to 9 without their own merges; NaN elsewhere."""
    fold = fold_of(merges)
    x = features(merges.space, merges.method, merges.numbers)
    out = np.full(merges.scores.shape, np.nan)
    parts = [np.ones(len(merges), dtype=bool)]
    if surrogate.by_method:
        n_methods = len(merges.space.methods)
        parts = [merges.method == i for i in range(n_methods)]
    for part in parts:
        for j in range(len(merges.tasks)):
            z, v = task_logits(merges, j)
            learned = part & (fold < _FIRST_TESTED)
            predict = surrogate.learn(x[learned], z[learned], v[learned])
            for tested in range(_FIRST_TESTED, _FOLDS):
                rest = part & (fold != tested)
                own = part & (fold == tested)
                x_rest, z_rest, v_rest = x[rest], z[rest], v[rest]
                predicted = predict(x_rest, z_rest, v_rest, x[own])
                out[own, j] = sigmoid(predicted)
    return out


def fold_of(merges: ScoredMerges) -> NDArray[np.int64]:
    """The fold of each merge, `(n,)`."""
    return np.random.default_rng(0).permutation(len(merges)) % _FOLDS


def near_front(merges: ScoredMerges) -> Mask:
    """Merges where optimisers go: the first three ranks, and the best tenth by mean score."""
    rank = np.asarray(moocore.pareto_rank(merges.scores, maximise=True))
    in_first_ranks = rank - rank.min() < 3
    mean = merges.scores.mean(1)
    in_best_tenth = mean >= np.quantile(mean, 0.9)
    return in_first_ranks | in_best_tenth


def rms(error: Array) -> float:
    """Root mean square."""
    return float(np.sqrt((error**2).mean()))


# ----- the surrogates that are compared


def surrogates() -> Mapping[str, Surrogate]:
    """Row of the table -> surrogate, the shipped one last."""
    return {
        "ridge, degree 2, one per method": polynomial(2, 0.1),
        "ridge, degree 3, one per method": polynomial(3, 1.0),
        "GP, squared exponential, ARD, one per method": process("rbf", by_method=True),
        "GP, Matérn 5/2, ARD, one per method": process("matern", by_method=True),
        "GP, squared exponential, learned map, method a coordinate": process(
            "rbf", full_map=True
        ),
        "GP, Matérn 5/2, learned map, method a coordinate": process(
            "matern", full_map=True
        ),
        "GP, Matérn 5/2, ARD, method a coordinate (shipped)": process("matern"),
    }


def process(
    kernel: KernelName, *, full_map: bool = False, by_method: bool = False
) -> Surrogate:
    """A Gaussian process."""

    def learn(x: Array, z: Array, v: Array) -> Predictor:
        fitted = fit(x, z, v, kernel=kernel, full_map=full_map)

        def predict(x: Array, z: Array, v: Array, others: Array) -> Array:
            coefficients = solve(fitted, x, z, v)
            return np.asarray(covariance(fitted, others, x) @ coefficients)

        return predict

    return Surrogate(learn, by_method)


def polynomial(degree: int, penalty: float) -> Surrogate:
    """Ridge regression on monomials, one per method."""

    def learn(x: Array, z: Array, v: Array) -> Predictor:
        return partial(ridge, degree, penalty)

    return Surrogate(learn, by_method=True)


def ridge(
    degree: int, penalty: float, x: Array, z: Array, v: Array, others: Array
) -> Array:
    """Least squares on monomials, rows weighted by their noise."""
    varies = np.ptp(x, axis=0) > 0
    a = monomials(x[:, varies], degree)
    weights = 1 / (v + 0.3)
    weighted = a * weights[:, None]
    identity = np.eye(a.shape[1])
    moment = a.T @ weighted + penalty * identity
    target = a.T @ (weights * z)
    coefficients = np.linalg.solve(moment, target)
    return np.asarray(monomials(others[:, varies], degree) @ coefficients)


def monomials(x: Array, degree: int) -> Array:
    """All monomials `(n, k)` up to a degree of the features, scaled to [-1, 1]."""
    scaled = 2 * x - 1
    columns = [np.ones(len(x))]
    for power in range(1, degree + 1):
        for factors in combinations_with_replacement(range(x.shape[1]), power):
            columns.append(scaled[:, list(factors)].prod(1))
    return np.stack(columns, axis=1)
