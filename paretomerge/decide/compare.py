"""Two models on the same items: the paired difference, and whether chance would explain it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from paretomerge.decide.rescore import score_checkpoint
from paretomerge.errors import ConfigError, EvaluationError, unknown_name
from paretomerge.evaluate.evaluator import Score, Split
from paretomerge.record.record import Trial
from paretomerge.study.study import Study


@dataclass(frozen=True)
class Comparison:
    """Of one task: `one` minus `other` over the same n items, with the 95 % interval of a paired mean (Student's t).

    p: of "no difference". Where items are right or wrong, McNemar's exact test on those that only one gets right (`only_one`,
    `only_other`); else the paired t-test, and both counts are None.
    """

    task: str
    n: int
    one: float
    other: float
    low: float
    high: float
    p: float
    only_one: int | None = None
    only_other: int | None = None

    @property
    def difference(self) -> float:
        return self.one - self.other

    @classmethod
    def of(cls, task: str, one: Sequence[float], other: Sequence[float]) -> "Comparison":
        """From the items' outcomes, in the same order."""
        if len(one) != len(other):
            raise EvaluationError(
                f"{task}: expected the same items of both, got {len(one)} and {len(other)}"
            )
        if len(one) < 2:
            raise EvaluationError(f"{task}: expected two items or more, got {len(one)}")
        a, b = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
        d = a - b
        error = float(d.std(ddof=1)) / math.sqrt(len(d))
        reach = float(stats.t.ppf(0.975, len(d) - 1)) * error
        common = (
            task,
            len(d),
            float(a.mean()),
            float(b.mean()),
            float(d.mean()) - reach,
            float(d.mean()) + reach,
        )
        if set(one) | set(other) <= {0.0, 1.0}:
            wins, losses = int((d > 0).sum()), int((d < 0).sum())
            p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
            return cls(*common, p, wins, losses)
        p = (
            2 * float(stats.t.sf(abs(d.mean()) / error, len(d) - 1))
            if error
            else float(not d.any())
        )
        return cls(*common, p)


def compare(
    study: Study, one: str, other: str, tasks: Sequence[str] = (), split: Split = "held_out"
) -> list[Comparison]:
    """`one` against `other`, each a trial's number, a known start's name (`uniform soup`, a source) or a checkpoint.

    tasks: by default all that have items and that both were scored on. What the record does not have is scored now.
    """
    scores = [_scores(study, who, split, tasks) for who in (one, other)]
    both = [name for name in scores[0] if name in scores[1]]
    for task in tasks:
        if task not in both:
            raise ConfigError(f"--task: {unknown_name('score', task, both)}")
    found = []
    for name in tasks or both:
        items = [s[name].example_scores for s in scores]
        if items[0] is not None and items[1] is not None:
            found.append(Comparison.of(name, items[0], items[1]))
        elif tasks:
            raise EvaluationError(
                f"{name}: expected a score with an outcome for each item, got one of the whole"
            )
    if not found:
        raise EvaluationError(
            f"expected a score with an outcome for each item, got none among {', '.join(both) or 'no scores'}"
        )
    return found


def _scores(study: Study, who: str, split: Split, tasks: Sequence[str]) -> Mapping[str, Score]:
    trial = _trial(study, who)
    if trial is None:
        return score_checkpoint(study, who, split)
    if split == "search":
        return trial.scores
    study.hold_out([trial], watched=any(task not in study.goals.scores for task in tasks))
    return next(t for t in study.trials if t.number == trial.number).held_out or {}


def _trial(study: Study, who: str) -> Trial | None:
    """The trial of that number or label; None where it can only be a checkpoint."""
    trials = study.trials
    found = [t for t in trials if str(t.number) == who or (t.is_start and t.label == who)]
    if found:
        if found[0].failure:
            raise ConfigError(f"{who}: this trial failed: {found[0].failure}")
        return found[0]
    if who.isdigit() or not (Path(who).exists() or "/" in who):
        labels = [t.label for t in trials if t.is_start]
        raise ConfigError(
            f"{who}: expected a trial's number below {len(trials)}, a checkpoint, or one of: {', '.join(labels)}"
        )
    return None
