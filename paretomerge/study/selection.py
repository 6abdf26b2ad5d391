"""Measure the best trials on more examples, until it is clear which one a preference picks."""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paretomerge.decide.belief import Belief
from paretomerge.decide.decision import ENOUGH, best_chances
from paretomerge.errors import EvaluationError, ParetoMergeError
from paretomerge.evaluate.evaluator import PerExample, Score, evaluators_in
from paretomerge.pareto.preference import Preference
from paretomerge.record.trial import Trial
from paretomerge.study.search import Search

# Trials whose chance of being the best is a smaller share of the greatest chance are not measured.
_LEAST_SHARE = 0.1
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
    questions = _questions(search)
    # Other examples, or another order of them, could not be added to what was scored before.
    search.record.forget_other_selection(_digest(questions))
    results = search.results()
    # The prior does not change with what is measured here, and takes a second to form.
    of_search = Belief.of_search(results)
    while True:
        belief = of_search.with_selection(results)
        finalists = _finalists(belief, preference)
        if len(finalists) < 2:
            return
        target = _target(finalists, questions)
        if target is None:
            return
        for trial in finalists:
            if _score(search, questions, trial, target):
                watch(trial)
        results = search.results()


@dataclass(frozen=True)
class _Question:
    """The selection examples of one objective.

    Attributes:
        evaluator: What scores them.
        order: The examples' places in the data, shuffled: the first of them are a sample of all,
            also where the data is sorted or a group has several tasks.
    """

    evaluator: PerExample
    order: Sequence[int]


def _questions(search: Search) -> dict[str, _Question]:
    """Objective -> its selection examples; only objectives that are means over examples."""
    names = _means_over_examples(search)
    questions = {}
    for part in evaluators_in(search.goals.evaluator):
        if not isinstance(part, PerExample):
            continue
        for name, examples in part.examples("selection").items():
            if name in names:
                order = list(range(len(examples)))
                random.Random(0).shuffle(order)
                questions[name] = _Question(part, order)
    return questions


def _means_over_examples(search: Search) -> set[str]:
    """The objectives whose search scores are means over examples, in all trials."""
    names = {objective.name for objective in search.goals.objectives}
    for trial in search.trials():
        if trial.can_be_on_front:
            for name in list(names):
                if not trial.scores[name].example_scores:
                    names.discard(name)
    return names


def _digest(questions: Mapping[str, _Question]) -> str:
    """Identifies the examples of all objectives and their order."""
    digest = hashlib.sha256()
    for name, question in sorted(questions.items()):
        examples = question.evaluator.examples("selection")[name]
        contents = getattr(examples, "content_digests", ())
        digest.update(f"{name} {list(question.order)} {list(contents)}".encode())
    return digest.hexdigest()[:16]


def _finalists(belief: Belief, preference: Preference) -> list[Trial]:
    """The trials that may be the best, the leader first; the leader alone if it is clear."""
    values = belief.values(preference)
    chances = best_chances(values)
    leader = int(values.mean(0).argmax())
    finalists = [belief.trials[leader]]
    if chances[leader] >= ENOUGH:
        return finalists
    # Relative to the greatest chance: of a hundred equal trials each has a chance of 1 %.
    least = _LEAST_SHARE * chances.max()
    for i in np.argsort(-chances, kind="stable")[:_MOST_FINALISTS]:
        if chances[i] >= least and i != leader:
            finalists.append(belief.trials[i])
    return finalists


def _target(
    finalists: Sequence[Trial], questions: Mapping[str, _Question]
) -> dict[str, int] | None:
    """Objective -> how many examples each finalist is scored on next; None if all are spent."""
    target = {}
    is_spent = True
    for name, question in questions.items():
        total = len(question.order)
        fewest = min(_n_scored(trial, name) for trial in finalists)
        step = max(-(-total // _ROUNDS), 1)
        target[name] = min(fewest + step, total)
        is_spent = is_spent and fewest >= total
    return None if is_spent else target


def _n_scored(trial: Trial, name: str) -> int:
    """How many selection examples of an objective a trial has been scored on."""
    score = (trial.selection or {}).get(name)
    return score.n if score else 0


def _score(
    search: Search,
    questions: Mapping[str, _Question],
    trial: Trial,
    target: Mapping[str, int],
) -> bool:
    """Score a trial on the examples that are missing; whether any were."""
    missing: dict[str, Sequence[int]] = {}
    for name, question in questions.items():
        places = question.order[_n_scored(trial, name) : target[name]]
        if places:
            missing[name] = places
    if not missing:
        return False
    scores = dict(trial.selection or {})
    with search.live:
        candidate = search.load(trial)
        for name, places in missing.items():
            evaluator = questions[name].evaluator
            try:
                values = evaluator.example_scores(
                    candidate, "selection", {name: places}
                )
            except ParetoMergeError as error:
                raise EvaluationError(
                    f"{trial.name}, on selection examples: {error}"
                ) from error
            example_scores = list(values[name])
            if name in scores:
                earlier = scores[name].example_scores or ()
                example_scores = [*earlier, *example_scores]
            scores[name] = Score.mean_of(example_scores)
    search.record.add_selection(trial.number, scores)
    return True
