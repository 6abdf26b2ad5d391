"""How well a merge's score on all items is told from some: `python benchmarks/estimators.py`, half a minute.

Of the merge landscape (`benchmarks/landscape`): known on all 600 items of each of three tasks are what a study would have scored so
far, the known starts and `--known` other merges; 300 more are seen on 10 to 100 items. Bias, root mean square error and Spearman's
correlation with the true score, averaged over tasks and five draws of items. Stated errors are right where their ratio is 1.
"""

import argparse

import numpy as np
from landscape.merges import STARTS, Merges
from scipy.stats import spearmanr

from paretomerge.evaluate.estimators import (
    ItemResponseModel,
    difficulty_corrected,
    sample_mean,
    stratified_mean,
)

NUMBERS = (10, 20, 50, 100)
DRAWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--known", type=int, default=30)
    parser.add_argument(
        "--better",
        action="store_true",
        help="new merges are of the best third: searches go where nobody was",
    )
    arguments = parser.parse_args()
    merges = Merges.load()
    items, starts = merges.correct, merges.stage == STARTS
    rng = np.random.default_rng(0)
    others = rng.permutation(np.flatnonzero(~starts))
    known = np.concatenate([np.flatnonzero(starts), others[: arguments.known]])
    new = others[arguments.known :]
    if arguments.better:
        means = items[new].mean((1, 2))
        new = new[means >= np.quantile(means, 2 / 3)]
    new = new[:300]
    rows: dict[str, dict[int, list[tuple[float, float, float, float]]]] = {}
    for task in range(items.shape[1]):
        y = items[:, task].astype(float)
        model = ItemResponseModel(y[known])
        estimators = {
            "plain subsample": sample_mean(y[known]),
            "stratified by the starts": stratified_mean(y[starts]),
            "corrected by difficulty": difficulty_corrected(y[known]),
            "item response, predicted": model.p_irt,
            "item response, corrected": model.corrected,
            "item response, combined": model.gp_irt,
        }
        truth = y[new].mean(1)
        for draw in range(DRAWS):
            order = np.random.default_rng([draw, task]).permutation(y.shape[1])
            for n in NUMBERS:
                for name, estimate in estimators.items():
                    found = [estimate(order[:n], y[i, order[:n]]) for i in new]
                    error = np.array([e.value for e in found]) - truth
                    stated = np.sqrt(np.mean([e.stderr**2 for e in found]))
                    spread = float(np.sqrt((error**2).mean()))
                    agreement = float(spearmanr([e.value for e in found], truth).statistic)
                    rows.setdefault(name, {}).setdefault(n, []).append(
                        (float(error.mean()), spread, agreement, stated / spread)
                    )
    print(f"{len(known)} known merges, {len(new)} new ones\n")
    print(
        "| estimator | "
        + " | ".join(f"{n} items: bias | error | rank | stated / true error" for n in NUMBERS)
        + " |"
    )
    print("|---|" + "---:|" * 4 * len(NUMBERS))
    for name, by_n in rows.items():
        cells = [
            f"{b:+.3f} | {e:.3f} | {r:.2f} | {s:.2f}"
            for b, e, r, s in (np.mean(by_n[n], axis=0) for n in NUMBERS)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
