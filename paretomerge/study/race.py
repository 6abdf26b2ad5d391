"""Racing saves evaluations.

A candidate is scored on more and more examples, and left once the front probably dominates it.

All trials are asked the same examples in the same order, so a candidate and the front are
compared pair by pair on the examples that it has seen so far, as races of models are run (Maron
and Moore 1997; Birattari et al. 2002, with paired tests). What a candidate that was left would
score on all examples is estimated by an item-response model of the trials that were scored on all
of them (`evaluate/estimators.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretomerge.evaluate.estimators import (
    Estimate,
    Estimator,
    ItemResponseModel,
    difficulty_corrected,
)
from paretomerge.evaluate.evaluator import Candidate, PerExample, Score, evaluators_in
from paretomerge.record.trial import Trial, pareto_front
from paretomerge.study.goals import Goals, RaceSettings
from paretomerge.types import Array

_MIN_COMPLETE_TRIALS = (
    4  # merges scored on all examples, before anything can be said of others
)
# the models are fitted anew when there are more complete trials by this factor
_REFIT_GROWTH = 1.25
_DRAWS = 512

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _ScoreModel:
    """What earlier trials say of one score.

    Attributes:
        estimator: From some examples to the mean over all.
        order: The order `(N,)` in which the examples are asked.
        scale: The range of the per-example scores.
    """

    estimator: Estimator
    order: NDArray[np.intp]
    scale: float


class Race:
    """Scores candidates, and leaves those that are probably dominated.

    Every decision is a function of the seed and of the finished trials, so a resumed study
    decides alike.
    """

    def __init__(self, goals: Goals, settings: RaceSettings, n_sources: int) -> None:
        self._goals = goals
        self._settings = settings
        self._n_sources = n_sources
        self._models: dict[str, _ScoreModel] = {}
        self._fitted_trials = 0

    def score(
        self, candidate: Candidate, finished: Sequence[Trial]
    ) -> tuple[dict[str, Score], bool]:
        """Score a candidate on the search examples, or on some of them.

        Args:
            candidate: The loaded merge.
            finished: The trials before it.

        Returns:
            The scores, and whether they are of all examples. Where they are not, the candidate
            was left, and they are estimates.

        Raises:
            EvaluationError: Scoring failed.
        """
        complete = [trial for trial in finished if not trial.failure and trial.final]
        models = self._models_of(complete)
        evaluators = [
            part
            for part in evaluators_in(self._goals.evaluator)
            if isinstance(part, PerExample)
        ]
        raced: dict[str, PerExample] = {}
        for evaluator in evaluators:
            for name in evaluator.examples("search"):
                if name in models:
                    raced[name] = evaluator
        sizes = {name: len(models[name].order) for name in raced}
        rivals = self._rivals([trial for trial in complete if trial.feasible], sizes)
        if not raced or not rivals:
            return self._goals.score(candidate, "search"), True
        exact = self._unraced_scores(candidate, evaluators, raced)
        # Seeded by the number of trials, so that a resumed study draws as if never stopped.
        rng = np.random.default_rng([self._settings.seed, len(finished)])
        heat = _Heat(self._goals, models, rivals, exact, rng)
        return self._run(heat, candidate, raced)

    def _run(
        self, heat: "_Heat", candidate: Candidate, raced: Mapping[str, PerExample]
    ) -> tuple[dict[str, Score], bool]:
        """Ask for more and more examples until the candidate is left or all are asked."""
        models, seen = heat.models, heat.seen
        wanted = {
            name: min(self._settings.first, len(models[name].order)) for name in raced
        }
        while True:
            for name, evaluator in raced.items():
                examples = models[name].order[len(seen[name]) : wanted[name]]
                if len(examples):
                    new = evaluator.example_scores(
                        candidate, "search", {name: examples.tolist()}
                    )
                    seen[name] += [float(score) for score in new[name]]
            unfinished = [
                name for name in raced if wanted[name] < len(models[name].order)
            ]
            if not unfinished:
                scores = dict(heat.exact)
                for name, evaluator in raced.items():
                    in_data_order = np.argsort(models[name].order)
                    all_scores = [seen[name][i] for i in in_data_order]
                    scores[name] = evaluator.aggregate("search", name, all_scores)
                return self._goals.in_order(scores), True
            # Drawn anew at each look: the Bayesian bootstrap of what has been seen so far.
            dominated = heat.dominated_draws()
            if heat.probability_dominated(dominated) > self._settings.confidence:
                scores = dict(heat.exact)
                for name in raced:
                    scores[name] = _estimate(seen[name], models[name])
                return self._goals.in_order(scores), False
            name = least_decided(dominated, unfinished)
            more = math.ceil(wanted[name] * self._settings.growth)
            wanted[name] = min(len(models[name].order), more)

    def _rivals(self, trials: Sequence[Trial], sizes: Mapping[str, int]) -> list[Trial]:
        """The front, as far as it has per-example scores to compare with."""
        rivals = []
        for trial in pareto_front(trials, self._goals.objectives):
            lengths = {
                name: len(trial.scores[name].example_scores or ()) for name in sizes
            }
            if lengths == dict(sizes):
                rivals.append(trial)
        return rivals

    def _models_of(self, trials: Sequence[Trial]) -> dict[str, _ScoreModel]:
        """Models of the scores, fitted to the first trials: as many as the last refit had."""
        # Refits happen at fixed numbers of trials, so the models are a function of the record
        # alone.
        count = _MIN_COMPLETE_TRIALS
        while math.ceil(count * _REFIT_GROWTH) <= len(trials):
            count = math.ceil(count * _REFIT_GROWTH)
        if count > len(trials):
            return {}
        if self._fitted_trials != count:
            self._models = self._fit(trials[:count])
            self._fitted_trials = count
        return self._models

    def _fit(self, trials: Sequence[Trial]) -> dict[str, _ScoreModel]:
        models = {}
        for name in self._goals.score_names:
            rows = [trial.scores[name].example_scores for trial in trials]
            lengths = {None if row is None else len(row) for row in rows}
            if None not in lengths and len(lengths) == 1:
                models[name] = self._fit_one(np.array(rows, dtype=float))
        return models

    def _fit_one(self, table: Array) -> _ScoreModel:
        """Fit one score's model to per-example scores `(trials, N)`."""
        # Item-response models need shares of right answers; lengths and the like are corrected by
        # difficulty instead.
        bounded = table.min() >= 0 and table.max() <= 1
        estimator = (
            ItemResponseModel(table).corrected
            if bounded
            else difficulty_corrected(table)
        )
        correct_sources = table[: self._n_sources].sum(0)
        order = stratified_order(correct_sources, self._settings.seed)
        return _ScoreModel(estimator, order, float(np.ptp(table)) or 1.0)

    def _unraced_scores(
        self,
        candidate: Candidate,
        evaluators: Sequence[PerExample],
        raced: Mapping[str, PerExample],
    ) -> dict[str, Score]:
        """The scores that are not raced, on all examples."""
        scores: dict[str, Score] = {}
        for evaluator in evaluators:
            rest: dict[str, Any] = {}
            for name, examples in evaluator.examples("search").items():
                if name not in raced:
                    rest[name] = range(len(examples))
            for name, outcomes in evaluator.example_scores(
                candidate, "search", rest
            ).items():
                scores[name] = evaluator.aggregate("search", name, outcomes)
        for other in evaluators_in(self._goals.evaluator):
            if not isinstance(other, PerExample):
                scores |= other.evaluate(candidate, "search")
        return scores


class _Heat:
    """One candidate against r rivals.

    Attributes:
        models: Score -> its model.
        rivals: The r members of the front.
        exact: The candidate's scores that are not raced.
        seen: Score -> the candidate's per-example scores so far, in the model's order.
    """

    def __init__(
        self,
        goals: Goals,
        models: Mapping[str, _ScoreModel],
        rivals: Sequence[Trial],
        exact: Mapping[str, Score],
        rng: np.random.Generator,
    ) -> None:
        self.models = models
        self.rivals = rivals
        self.exact = exact
        self.seen: dict[str, list[float]] = {name: [] for name in models}
        self._goals = goals
        self._rng = rng

    def dominated_draws(self) -> dict[str, Mask]:
        """Objective -> mask `(draws, r)`.

        In which draws a rival is at least as good on all examples.
        """
        masks = {}
        for objective in self._goals.objectives:
            name = objective.name
            if name in self.exact:
                value = self.exact[name].value
                differences = [
                    rival.scores[name].value - value for rival in self.rivals
                ]
                gaps = np.array([differences] * _DRAWS)
            else:
                gaps = self._drawn_gaps(name)
            masks[name] = (gaps if objective.maximise else -gaps) >= 0
        return masks

    def probability_dominated(self, masks: Mapping[str, Mask]) -> float:
        """The share of the draws in which some rival is at least as good in every objective."""
        by_rival = np.logical_and.reduce(list(masks.values()))
        return float(by_rival.any(1).mean())

    def _drawn_gaps(self, name: str) -> Array:
        model = self.models[name]
        seen = np.array(self.seen[name])
        examples = model.order[: len(seen)]
        rivals = np.array(
            [rival.scores[name].example_scores for rival in self.rivals], dtype=float
        )
        gaps = rivals[:, examples] - seen
        return drawn_gaps(gaps.T, len(model.order), model.scale, self._rng)


def drawn_gaps(
    gaps: Array, total: int, scale: float, rng: np.random.Generator
) -> Array:
    """Draw what the mean gaps to rivals over all examples may be, from those on some of them.

    The Bayesian bootstrap (Rubin 1981) of the examples, the same for all rivals, narrowed as n
    nears `total`, since examples are drawn without replacement. Two imagined examples, with a gap
    of `scale` each way, keep examples without gaps from being a certainty.

    Args:
        gaps: Gaps `(n, r)` to r rivals on n examples.
        total: The number of all examples.
        scale: The range of a per-example score.
        rng: The random generator.

    Returns:
        Mean gaps `(draws, r)`.
    """
    n, r = gaps.shape
    mean = gaps.mean(0)
    if n == total:
        return np.repeat(mean[None], _DRAWS, 0)
    padded = np.vstack([gaps, np.full(r, scale), np.full(r, -scale)])
    drawn = rng.dirichlet(np.ones(n + 2), _DRAWS) @ padded
    correction = math.sqrt(1 - n / total)  # of a finite population
    return np.asarray(mean + correction * (drawn - padded.mean(0)))


def least_decided(masks: Mapping[str, Mask], names: Sequence[str]) -> str:
    """Choose the score of which more examples can decide most.

    That is the one with the most even odds against a rival who is likely ahead in all other
    objectives.

    Args:
        masks: Objective -> mask `(draws, r)` of `dominated_draws`.
        names: Scores to choose from.

    Returns:
        One of `names`.
    """
    chances = {name: mask.mean(0) for name, mask in masks.items()}

    def undecided(name: str) -> float:
        if name not in chances:
            return -1.0  # no objective: it is only bounded or watched
        others = [chance for other, chance in chances.items() if other != name]
        variance = chances[name] * (1 - chances[name])
        return float((variance * np.prod(others, 0)).max())

    return max(names, key=undecided)


def stratified_order(correct: Array, seed: int) -> NDArray[np.intp]:
    """Order examples so that every beginning has the strata in proportion.

    A stratum is the examples that equally many sources get right.

    Args:
        correct: How many sources get each example right, `(N,)`.
        seed: Of the order inside the strata.

    Returns:
        Indices `(N,)`.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(correct))
    # Each stratum's members get evenly spaced places in [0, 1), with a random offset; sorting
    # interleaves the strata.
    place = np.empty(len(correct))
    for stratum in np.unique(correct):
        members = shuffled[correct[shuffled] == stratum]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def _estimate(seen: Sequence[float], model: _ScoreModel) -> Score:
    """Estimate a score over all examples, with both errors.

    Of the estimate, and of the examples as a sample.
    """
    estimate: Estimate = model.estimator(model.order[: len(seen)], np.array(seen))
    sampling_variance = float(np.var(seen)) / len(model.order)
    stderr = math.hypot(estimate.stderr, math.sqrt(sampling_variance))
    return Score(estimate.value, stderr, len(seen))
