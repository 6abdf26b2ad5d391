"""README.md's overhead: where a trial's time goes on the specialists.

    python -m benchmarks.overhead

The goal: asking, merging and bookkeeping together take less than a third of a trial's time.
"""

from collections import Counter

from benchmarks.study_api import trial_seconds
from paretomerge.examples import SPECIALISTS


def main() -> None:
    """Print the seconds of each part, and the share of what is not evaluation."""
    trials = trial_seconds(SPECIALISTS / "study.yaml")
    warm_trials = trials[1:]  # the first trial loads the models
    totals: Counter[str] = Counter()
    for seconds in warm_trials:
        totals.update(seconds)
    whole = sum(totals.values())
    for part in ("ask", "merge", "evaluate", "record"):
        mean = totals[part] / len(warm_trials)
        share = totals[part] / whole
        print(f"{part:10s} {mean:6.3f} s a trial  {share:6.1%}")
    overhead = 1 - totals["evaluate"] / whole
    print(
        f"overhead   {overhead:6.1%} of a trial (goal: under 33.3 %), "
        f"{len(trials)} trials, {whole:.0f} s"
    )


if __name__ == "__main__":
    main()
