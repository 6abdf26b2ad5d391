"""docs/lab/evaluation.md's table of estimators: a merge's score from some of its examples.

    python -m benchmarks.estimators [--better]          # half a minute

On the merges of the landscape (`paretomerge.problems`). Of the baseline recipes and `--known` other
merges all 600 examples of each of three tasks are known, as of the trials that a study has scored;
300 more are seen on 10 to 100 examples. Bias, root mean square error and Spearman's correlation
with the true score, averaged over tasks and five draws of examples. Stated errors are right where
their ratio to the true ones is 1.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.reporting import documented_parser, markdown_table
from paretomerge.evaluate.estimators import (
    Estimator,
    ItemResponseModel,
    difficulty_corrected,
    sample_mean,
    stratified_mean,
)
from paretomerge.problems import ScoredMerges
from paretomerge.problems.scored_merges import START
from paretomerge.types import Array

SAMPLE_SIZES = (10, 20, 50, 100)
N_NEW = 300
DRAWS = 5

Indices = NDArray[np.intp]
Figures = tuple[float, float, float, float]
"""Bias, error, rank correlation, stated error over the true one."""


def chosen_merges(
    merges: ScoredMerges, n_known: int, better: bool
) -> tuple[Indices, Indices]:
    """Indices of the merges that are known, and of those that are estimated."""
    is_start = merges.stage == START
    rng = np.random.default_rng(0)
    others = rng.permutation(np.flatnonzero(~is_start))
    known = np.concatenate([np.flatnonzero(is_start), others[:n_known]])
    new = others[n_known:]
    if better:
        means = merges.correct[new].mean((1, 2))
        new = new[means >= np.quantile(means, 2 / 3)]
    return known, new[:N_NEW]


def estimators(known: Array, starts: Array) -> Mapping[str, Estimator]:
    """Row of the table -> estimator.

    known: `(k, N)`, answers of the known merges to N examples. starts: those of the baselines.
    """
    model = ItemResponseModel(known)
    return {
        "plain subsample": sample_mean(known),
        "stratified by the starts": stratified_mean(starts),
        "corrected by difficulty": difficulty_corrected(known),
        "item response, predicted": model.p_irt,
        "item response, corrected": model.corrected,
        "item response, combined": model.gp_irt,
    }


def figures(estimator: Estimator, answers: Array, examples: Indices) -> Figures:
    """How well an estimator does on new merges.

    answers: `(k, N)`, of the new merges to all examples. examples: those that are seen, `(n,)`.
    """
    estimates = [estimator(examples, row[examples]) for row in answers]
    values = np.array([estimate.value for estimate in estimates])
    stderr = np.array([estimate.stderr for estimate in estimates])
    truth = answers.mean(1)
    error = values - truth
    stated = np.sqrt((stderr**2).mean())
    true_error = float(np.sqrt((error**2).mean()))
    rank = float(spearmanr(values, truth).statistic)
    return float(error.mean()), true_error, rank, float(stated / true_error)


def table(merges: ScoredMerges, known: Indices, new: Indices) -> str:
    """The table of docs/lab/evaluation.md."""
    is_start = merges.stage == START
    by_estimator: dict[str, dict[int, list[Figures]]] = {}
    for task in range(len(merges.tasks)):
        answers = merges.correct[:, task].astype(float)
        for name, estimator in estimators(answers[known], answers[is_start]).items():
            by_size = by_estimator.setdefault(name, {size: [] for size in SAMPLE_SIZES})
            for draw in range(DRAWS):
                rng = np.random.default_rng([draw, task])
                order = rng.permutation(merges.n_examples)
                for size in SAMPLE_SIZES:
                    result = figures(estimator, answers[new], order[:size])
                    by_size[size].append(result)
    rows = []
    for name, by_size in by_estimator.items():
        cells = [name]
        for size in SAMPLE_SIZES:
            bias, error, rank, ratio = np.mean(by_size[size], axis=0)
            cells += [f"{bias:+.3f}", f"{error:.3f}"]
            cells += [f"{rank:.2f}", f"{ratio:.2f}"]
        rows.append(cells)
    header = ["estimator"]
    for size in SAMPLE_SIZES:
        header += [f"{size} items: bias", "error", "rank", "stated / true error"]
    return markdown_table(header, rows)


def main() -> None:
    """Print the table."""
    parser = documented_parser(__doc__)
    parser.add_argument("--known", type=int, default=30)
    parser.add_argument(
        "--better",
        action="store_true",
        help="new merges are of the best third, as in a search",
    )
    arguments = parser.parse_args()
    merges = ScoredMerges.load()
    known, new = chosen_merges(merges, arguments.known, arguments.better)
    print(f"{len(known)} known merges, {len(new)} new ones\n")
    print(table(merges, known, new))


if __name__ == "__main__":
    main()
