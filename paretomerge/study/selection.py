"""Measure the best trials on more examples, until it is clear which one a preference picks."""

from collections.abc import Callable, Sequence

import numpy as np

from paretomerge.decide.belief import Belief
from paretomerge.decide.decision import ENOUGH, best_chances
from paretomerge.errors import EvaluationError, ParetoMergeError
from paretomerge.evaluate.evaluator import PerExample, Score, evaluators_in
from paretomerge.pareto.preference import Preference
from paretomerge.record.trial import Trial
from paretomerge.study.search import Search

# Trials that are less probably the best are not measured.
_LEAST_CHANCE = 0.02
_MOST_FINALISTS = 8
# The examples are spent in so many rounds, after each of which some trials drop out.
_ROUNDS = 4


def select(
    search: Search,
    preference: Preference,
    watch: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Score the finalists of a preference on selection examples, and record the scores.

    In each round those trials are scored that may still be the best. It ends when one of them is
    the best with a probability of 90 %, or when the examples are spent. What the record holds is
    not measured again.

    Args:
        search: The search, with a feasible trial.
        preference: What the user wants.
        watch: Called with each trial that was scored.

    Raises:
        EvaluationError: A trial cannot be scored; the message names it.
    """
    parts = evaluators_in(search.goals.evaluator)
    harnesses = [part for part in parts if isinstance(part, PerExample)]
    totals: dict[str, int] = {}
    for harness in harnesses:
        for name, examples in harness.examples("selection").items():
            totals[name] = len(examples)
    names = [o.name for o in search.goals.objectives if o.name in totals]
    if not names:
        return
    total = max(totals[name] for name in names)
    step = max(-(-total // _ROUNDS), 1)
    while True:
        belief = Belief.of(search.results())
        finalists = _finalists(belief, preference)
        if len(finalists) < 2:
            return
        scored = [_n_scored(trial, names) for trial in finalists]
        target = min(min(scored) + step, total)
        if min(scored) >= total:
            return
        for trial, n_scored in zip(finalists, scored, strict=True):
            if n_scored < target:
                _score(search, harnesses, trial, target)
                watch(trial)


def _finalists(belief: Belief, preference: Preference) -> list[Trial]:
    """The trials that may be the best, the leader first; the leader alone if it is clear."""
    values = belief.values(preference)
    chances = best_chances(values)
    leader = int(values.mean(0).argmax())
    if chances[leader] >= ENOUGH:
        return [belief.trials[leader]]
    finalists = [belief.trials[leader]]
    for i in np.argsort(-chances, kind="stable")[:_MOST_FINALISTS]:
        if chances[i] >= _LEAST_CHANCE and i != leader:
            finalists.append(belief.trials[i])
    return finalists


def _n_scored(trial: Trial, names: Sequence[str]) -> int:
    """How many selection examples a trial has been scored on."""
    scores = trial.selection or {}
    return max((scores[name].n for name in names if name in scores), default=0)


def _score(
    search: Search, harnesses: Sequence[PerExample], trial: Trial, target: int
) -> None:
    """Score a trial on the selection examples below `target` that it was not scored on."""
    names = [objective.name for objective in search.goals.objectives]
    scores = dict(trial.selection or {})
    with search.live:
        candidate = search.load(trial)
        for harness in harnesses:
            missing: dict[str, range] = {}
            for name, examples in harness.examples("selection").items():
                # Only means over examples can be added up.
                is_mean = name in names and trial.scores[name].example_scores
                if is_mean:
                    first = scores[name].n if name in scores else 0
                    missing[name] = range(first, min(target, len(examples)))
            try:
                values = harness.example_scores(candidate, "selection", missing)
            except ParetoMergeError as error:
                raise EvaluationError(
                    f"{trial.name}, on selection examples: {error}"
                ) from error
            for name, new in values.items():
                earlier = scores[name].example_scores if name in scores else ()
                scores[name] = Score.mean_of([*(earlier or ()), *new])
    search.record.add_selection(trial.number, scores)
