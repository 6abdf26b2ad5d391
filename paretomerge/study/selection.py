"""Measure the best trials on more examples, until it is clear which one a preference picks."""

import hashlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from paretomerge.decide.belief import Belief
from paretomerge.decide.decision import ENOUGH, best_chances
from paretomerge.errors import EvaluationError, ParetoMergeError
from paretomerge.evaluate.evaluator import (
    Candidate,
    Evaluator,
    PerExample,
    Score,
    evaluators_in,
)
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.pareto.preference import Preference
from paretomerge.record.trial import Trial
from paretomerge.study.search import Search

# Trials whose chance of being the best is a smaller share of the greatest chance are not measured.
_LEAST_SHARE = 0.1
_MOST_FINALISTS = 8
# The examples are spent in so many rounds, after each of which some trials drop out.
_ROUNDS = 4
# So many equal scores are no chance: of 20 coins, two throws have as many heads in an eighth of all
# cases.
_LEAST_CALLS = 4

_log = logging.getLogger(__name__)


def select(
    search: Search,
    preference: Preference,
    watch: Callable[[Trial], None] = lambda trial: None,
    *,
    examples: bool = True,
    repeats: int = 0,
) -> None:
    """Measure the finalists of a preference once more, and record the scores.

    In each round those trials are scored that may still be the best, on some of the selection
    examples. It ends when one of them is the best with a probability of 90 %, or when the examples
    are spent. What the record holds is not measured again.

    Args:
        search: The search, with a feasible trial.
        preference: What the user wants.
        watch: Called with each trial that was scored.
        examples: Whether tasks have selection examples.
        repeats: How often scores without examples that have a standard error are measured again.

    Raises:
        EvaluationError: A trial cannot be scored; the message names it.
    """
    sources: Sequence[_Source] = _sources(search, examples, repeats)
    # Other examples, or another order of them, could not be added to what was scored before.
    search.record.forget_other_selection(_digest(sources))
    results = search.results()
    # The prior does not change with what is measured here, and takes a second to form.
    of_search = Belief.of_search(results)
    while True:
        belief = of_search.with_selection(results)
        finalists = _finalists(belief, preference)
        if len(finalists) < 2:
            return
        target = _target(finalists, sources)
        if target is None:
            return
        for trial in finalists:
            if _score(search, sources, trial, target):
                watch(trial)
        sources = _without_constant(search, sources)
        results = search.results()


class _Source(Protocol):
    """Where more measurements of some objectives come from."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Objective -> how many measurements of it there can be."""

    def identity(self) -> str:
        """Identifies the measurements; with the same one, later ones add to earlier ones."""

    def measure(
        self, candidate: Candidate, ranges: Mapping[str, range]
    ) -> Mapping[str, Sequence[float]]:
        """Make the measurements with some numbers; objective -> the values, in their order."""


@dataclass(frozen=True)
class _Examples:
    """The selection examples of one evaluator.

    Attributes:
        evaluator: What scores them.
        orders: Objective -> the examples' places in the data, shuffled: the first of them are a
            sample of all, also where the data is sorted or a group has several tasks.
    """

    evaluator: PerExample
    orders: Mapping[str, Sequence[int]]

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: len(order) for name, order in self.orders.items()}

    def identity(self) -> str:
        parts = []
        examples = self.evaluator.examples("selection")
        for name, order in sorted(self.orders.items()):
            contents = getattr(examples[name], "content_digests", ())
            parts.append(f"{name} {list(order)} {list(contents)}")
        return "".join(parts)

    def measure(
        self, candidate: Candidate, ranges: Mapping[str, range]
    ) -> Mapping[str, Sequence[float]]:
        places = {}
        for name, numbers in ranges.items():
            places[name] = self.orders[name][numbers.start : numbers.stop]
        return self.evaluator.example_scores(candidate, "selection", places)


@dataclass(frozen=True)
class _Repeats:
    """Another call of an evaluator whose scores are random.

    Attributes:
        evaluator: What is called.
        names: Its objectives.
        most: How often it may be called.
    """

    evaluator: Evaluator
    names: Sequence[str]
    most: int

    @property
    def sizes(self) -> Mapping[str, int]:
        return dict.fromkeys(self.names, self.most)

    def identity(self) -> str:
        # Not how often: more calls add to those before.
        return f"{sorted(self.names)} again"

    def measure(
        self, candidate: Candidate, ranges: Mapping[str, range]
    ) -> Mapping[str, Sequence[float]]:
        values: dict[str, list[float]] = {name: [] for name in ranges}
        for _ in range(max(map(len, ranges.values()))):
            scores = self.evaluator.evaluate(candidate, "search")
            for name, numbers in ranges.items():
                if len(values[name]) < len(numbers):
                    values[name].append(scores[name].value)
        return values


def _sources(search: Search, examples: bool, repeats: int) -> list[_Source]:
    """What can measure the objectives once more."""
    means, random_ones = _kinds_of_scores(search)
    sources: list[_Source] = []
    for part in evaluators_in(search.goals.evaluator):
        if examples and isinstance(part, PerExample):
            orders = _shuffled(part, means)
            if orders:
                sources.append(_Examples(part, orders))
        if repeats and isinstance(part, FunctionEvaluator):
            names = [name for name in random_ones if _is_of(part, name)]
            if names:
                sources.append(_Repeats(part, names, repeats))
    return sources


def _shuffled(evaluator: PerExample, names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> the places of its selection examples, shuffled; of the names given."""
    orders = {}
    for name, examples in evaluator.examples("selection").items():
        if name in names:
            orders[name] = list(range(len(examples)))
            random.Random(0).shuffle(orders[name])
    return orders


def _is_of(function: FunctionEvaluator, name: str) -> bool:
    """Whether a score is a function's: its only one, or one of several."""
    return name == function.name or name.startswith(f"{function.name}/")


def _kinds_of_scores(search: Search) -> tuple[list[str], list[str]]:
    """The objectives that are means over examples in all trials, and those that are random."""
    means, random_ones = [], []
    trials = [trial for trial in search.trials() if trial.can_be_on_front]
    for objective in search.goals.objectives:
        scores = [trial.scores[objective.name] for trial in trials]
        have_examples = [bool(score.example_scores) for score in scores]
        have_error = any(score.stderr for score in scores)
        if all(have_examples):
            means.append(objective.name)
        # The same examples, asked again, would give the same score.
        elif have_error and not any(have_examples):
            random_ones.append(objective.name)
    return means, random_ones


def _without_constant(search: Search, sources: Sequence[_Source]) -> list[_Source]:
    """The sources without functions that are not random; their repeats are forgotten.

    The mean of equal scores has the error of one of them: as a mean of random scores, it would make
    a pick look sure.
    """
    measured = [trial for trial in search.trials() if trial.selection]
    others: list[_Source] = []
    constant: list[str] = []
    for source in sources:
        if isinstance(source, _Repeats):
            found = [name for name in source.names if _is_constant(measured, name)]
            constant += found
            names = [name for name in source.names if name not in found]
            source = replace(source, names=names)
        others.append(source)
    if constant:
        _log.warning(
            "evaluate.selection_repeats: %s gave each merge the same score again, so it is not "
            "random, and another call tells nothing new. Remove the key.",
            ", ".join(constant),
        )
        for trial in measured:
            scores = trial.selection or {}
            kept = {name: scores[name] for name in scores if name not in constant}
            search.record.add_selection(trial.number, kept)
    return others


def _is_constant(trials: Sequence[Trial], name: str) -> bool:
    """Whether a score was the same at each call, of several trials."""
    n_calls = 0
    for trial in trials:
        score = (trial.selection or {}).get(name)
        repeats = (score.example_scores or ()) if score else ()
        if any(value != trial.scores[name].value for value in repeats):
            return False
        n_calls += len(repeats)
    return n_calls >= _LEAST_CALLS


def _digest(sources: Sequence[_Source]) -> str:
    """Identifies what is measured for the finalists."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.identity().encode())
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
    finalists: Sequence[Trial], sources: Sequence[_Source]
) -> dict[str, int] | None:
    """Objective -> how many measurements each finalist is to have next; None if all are spent."""
    target = {}
    is_spent = True
    for source in sources:
        for name, total in source.sizes.items():
            fewest = min(_n_measured(trial, name) for trial in finalists)
            step = max(-(-total // _ROUNDS), 1)
            target[name] = min(fewest + step, total)
            is_spent = is_spent and fewest >= total
    return None if is_spent else target


def _n_measured(trial: Trial, name: str) -> int:
    """How many measurements of an objective a trial has beyond those of the search."""
    score = (trial.selection or {}).get(name)
    return len(score.example_scores or ()) if score else 0


def _score(
    search: Search,
    sources: Sequence[_Source],
    trial: Trial,
    target: Mapping[str, int],
) -> bool:
    """Make the measurements of a trial that are missing; whether any were."""
    missing: list[tuple[_Source, dict[str, range]]] = []
    for source in sources:
        ranges: dict[str, range] = {}
        for name in source.sizes:
            numbers = range(_n_measured(trial, name), target[name])
            if numbers:
                ranges[name] = numbers
        if ranges:
            missing.append((source, ranges))
    if not missing:
        return False
    scores = dict(trial.selection or {})
    with search.live:
        candidate = search.load(trial)
        for source, numbers_by_name in missing:
            try:
                values = source.measure(candidate, numbers_by_name)
            except ParetoMergeError as error:
                raise EvaluationError(
                    f"{trial.name}, measured again for the pick: {error}"
                ) from error
            for name, new in values.items():
                scores[name] = _with_more(scores.get(name), new, trial.scores[name])
    search.record.add_selection(trial.number, scores)
    return True


def _with_more(score: Score | None, values: Sequence[float], searched: Score) -> Score:
    """A score with more measurements.

    Args:
        score: The score so far; None before the first.
        values: The new measurements: of examples, or of the whole score.
        searched: The score that the search has seen.
    """
    earlier = (score.example_scores or ()) if score else ()
    mean = Score.mean_of([*earlier, *values])
    if searched.example_scores is None:
        # A function may say of how many examples each of its scores is the mean.
        mean = replace(mean, n=mean.n * searched.n)
    return mean
