"""Racing: stop scoring a candidate once the front probably dominates it.

A candidate is scored on more and more examples. All trials see the same examples in the same
order, so the candidate and the front are compared pair by pair on the examples that it has seen so
far (racing: Maron and Moore 1997; with paired tests: Birattari et al. 2002). If a candidate is left
early, an item-response model estimates its scores over all examples. The model is fitted to the
trials that were scored on all of them (`evaluate/estimators.py`).
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

# Below this number of completely scored trials there is nothing to fit a model to: no race is run.
_MIN_COMPLETE_TRIALS = 4
# The models are refitted when the number of complete trials has grown by this factor.
_REFIT_GROWTH = 1.25
_DRAWS = 512  # bootstrap draws: a probability near 0.95 has a standard error of 0.01

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _ScoreModel:
    """What earlier trials say about one score.

    Attributes:
        estimator: Estimates the mean over all examples from some of them.
        order: The order `(N,)` in which the examples are scored.
        scale: The range of the per-example scores.
    """

    estimator: Estimator
    order: NDArray[np.intp]
    scale: float


class Race:
    """Scores candidates, and leaves those that are probably dominated.

    Every decision depends on the seed and the finished trials alone, so a resumed study makes the
    same decisions.
    """

    def __init__(
        self, goals: Goals, settings: RaceSettings, sources: Sequence[str]
    ) -> None:
        self._goals = goals
        self._settings = settings
        self._sources = sources
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
            The scores, and whether they cover all examples. If they do not, the candidate was left
            early and the scores are estimates.

        Raises:
            EvaluationError: Scoring failed.
        """
        # Estimates must not feed the models that make estimates.
        complete = []
        for trial in finished:
            if trial.final and not trial.failure:
                complete.append(trial)
        models = self._models_of(complete)
        evaluators: list[PerExample] = []
        for part in evaluators_in(self._goals.evaluator):
            if isinstance(part, PerExample):
                evaluators.append(part)
        raced: dict[str, PerExample] = {}
        for evaluator in evaluators:
            for name in evaluator.examples("search"):
                if name in models:
                    raced[name] = evaluator
        sizes: dict[str, int] = {}
        for name in raced:
            sizes[name] = len(models[name].order)
        # An infeasible trial is never on the front, so being dominated by one is no loss.
        feasible = [trial for trial in complete if trial.feasible]
        rivals = self._rivals(feasible, sizes)
        if not raced or not rivals:
            return self._goals.score(candidate, "search"), True
        # Scores without per-example values, such as sparsity, have no cheaper version: they are
        # measured first and are exact from the start.
        exact = self._unraced_scores(candidate, evaluators, raced)
        # Seeded by the number of trials, so that a resumed study draws the same numbers.
        seed = [self._settings.seed, len(finished)]
        rng = np.random.default_rng(seed)
        heat = _Heat(self._goals, models, rivals, exact, rng)
        return self._run(heat, candidate, raced)

    def _run(
        self, heat: "_Heat", candidate: Candidate, raced: Mapping[str, PerExample]
    ) -> tuple[dict[str, Score], bool]:
        """Score more and more examples until the candidate is left or all are scored."""
        models, seen = heat.models, heat.seen
        totals: dict[str, int] = {}
        wanted: dict[str, int] = {}
        for name in raced:
            totals[name] = len(models[name].order)
            wanted[name] = min(self._settings.first, totals[name])
        while True:
            _score_wanted(heat, candidate, raced, wanted)
            unfinished = []
            for name in raced:
                if wanted[name] < totals[name]:
                    unfinished.append(name)
            if not unfinished:
                scores = dict(heat.exact)
                for name, evaluator in raced.items():
                    # The record holds examples in the order of the data: comparisons pair them by
                    # position, and later races read them through their own order.
                    in_data_order = np.argsort(models[name].order)
                    all_scores = [seen[name][i] for i in in_data_order]
                    scores[name] = evaluator.aggregate("search", name, all_scores)
                return self._goals.in_order(scores), True
            # New draws for each check: a Bayesian bootstrap of the examples seen so far.
            dominated = heat.dominated_draws()
            if heat.probability_dominated(dominated) > self._settings.confidence:
                scores = dict(heat.exact)
                for name in raced:
                    scores[name] = _estimate(seen[name], models[name])
                return self._goals.in_order(scores), False
            # Only one score grows: examples of a score that is decided would be wasted.
            name = least_decided(dominated, unfinished)
            more = math.ceil(wanted[name] * self._settings.growth)
            wanted[name] = min(totals[name], more)

    def _rivals(self, trials: Sequence[Trial], sizes: Mapping[str, int]) -> list[Trial]:
        """The front's members that have per-example scores to compare with."""
        rivals = []
        for trial in pareto_front(trials, self._goals.objectives):
            lengths: dict[str, int] = {}
            for name in sizes:
                example_scores = trial.scores[name].example_scores or ()
                lengths[name] = len(example_scores)
            # A rival is compared example by example, so it needs a score for each of them.
            if lengths == dict(sizes):
                rivals.append(trial)
        return rivals

    def _models_of(self, trials: Sequence[Trial]) -> dict[str, _ScoreModel]:
        """Models of the scores, fitted to as many of the first trials as the last refit used."""
        # Refits happen at fixed numbers of trials. Otherwise a resumed study, which fits at once,
        # would use other models than one that was never stopped.
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
            # A score without per-example values is not raced, nor is one whose examples differ in
            # number: the table of the model has one column for each example.
            lengths = {None if row is None else len(row) for row in rows}
            if None not in lengths and len(lengths) == 1:
                table = np.array(rows, dtype=float)
                # The sources are part of every refit, so the order stays.
                is_source = [trial.label in self._sources for trial in trials]
                models[name] = self._fit_one(table, table[is_source])
        return models

    def _fit_one(self, table: Array, of_sources: Array) -> _ScoreModel:
        """Fit one score's model to per-example scores `(trials, N)`, the sources' among them."""
        estimator = _estimator_of(table)
        order = stratified_order(of_sources.sum(0), self._settings.seed)
        # Where all scores are equal, any scale above 0 keeps the next example uncertain.
        scale = float(np.ptp(table)) or 1.0
        return _ScoreModel(estimator, order, scale)

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
            scored = evaluator.example_scores(candidate, "search", rest)
            for name, outcomes in scored.items():
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
        self.seen: dict[str, list[float]] = {}
        for name in models:
            self.seen[name] = []
        self._goals = goals
        self._rng = rng

    def dominated_draws(self) -> dict[str, Mask]:
        """In which draws a rival is at least as good over all examples, for each objective.

        Returns:
            Objective -> mask `(draws, r)`.
        """
        masks = {}
        for objective in self._goals.objectives:
            name = objective.name
            if name in self.exact:
                value = self.exact[name].value
                differences = []
                for rival in self.rivals:
                    differences.append(rival.scores[name].value - value)
                gaps = np.array([differences] * _DRAWS)
            else:
                gaps = self._drawn_gaps(name)
            # Scores are in the user's direction here, so a minimised gap is turned round.
            advantage = gaps if objective.maximise else -gaps
            masks[name] = advantage >= 0
        return masks

    def probability_dominated(self, masks: Mapping[str, Mask]) -> float:
        """The share of the draws in which some rival is at least as good in every objective."""
        # Per draw and rival first: a candidate is dominated by one rival, not by several together.
        by_rival = np.logical_and.reduce(list(masks.values()))
        return float(by_rival.any(1).mean())

    def _drawn_gaps(self, name: str) -> Array:
        model = self.models[name]
        seen = np.array(self.seen[name])
        examples = model.order[: len(seen)]
        rows = [rival.scores[name].example_scores for rival in self.rivals]
        rivals = np.array(rows, dtype=float)
        # Paired: the difficulty of an example, which both share, cancels in the difference.
        gaps = rivals[:, examples] - seen
        total = len(model.order)
        return drawn_gaps(gaps.T, total, model.scale, self._rng)


def _score_wanted(
    heat: _Heat,
    candidate: Candidate,
    raced: Mapping[str, PerExample],
    wanted: Mapping[str, int],
) -> None:
    """Score each of the `wanted` first examples that has no score yet."""
    for name, evaluator in raced.items():
        seen = heat.seen[name]
        examples = heat.models[name].order[len(seen) : wanted[name]]
        if len(examples):
            indices = {name: examples.tolist()}
            new = evaluator.example_scores(candidate, "search", indices)
            for score in new[name]:
                seen.append(float(score))


def drawn_gaps(
    gaps: Array, total: int, scale: float, rng: np.random.Generator
) -> Array:
    """Draw mean gaps to rivals over all examples, given the gaps on some of them.

    This is a Bayesian bootstrap of the examples (Rubin 1981), with the same draws for all rivals.
    It narrows as n approaches `total`, since examples are drawn without replacement. Two
    pseudo-examples, with a gap of `scale` each way, prevent certainty where no gap has been seen.

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
    rival_ahead = np.full(r, scale)
    candidate_ahead = np.full(r, -scale)
    padded = np.vstack([gaps, rival_ahead, candidate_ahead])
    # One set of weights for all rivals keeps the correlation between their gaps.
    concentrations = np.ones(n + 2)
    weights = rng.dirichlet(concentrations, _DRAWS)
    drawn = weights @ padded
    correction = math.sqrt(1 - n / total)  # for a finite population
    # Centred on the observed mean: the pseudo-examples widen the spread but move nothing.
    deviations = drawn - padded.mean(0)
    return np.asarray(mean + correction * deviations)


def least_decided(masks: Mapping[str, Mask], names: Sequence[str]) -> str:
    """Choose the score for which more examples help most to decide.

    That is the score with the most even odds against a rival that is likely ahead in all other
    objectives.

    Args:
        masks: Objective -> mask `(draws, r)` of `dominated_draws`.
        names: Scores to choose from.

    Returns:
        One of `names`.
    """
    chances: dict[str, Array] = {}
    for name, mask in masks.items():
        chances[name] = mask.mean(0)

    def undecided(name: str) -> float:
        if name not in chances:
            return -1.0  # not an objective: it cannot decide who dominates
        others = []
        for other, chance in chances.items():
            if other != name:
                others.append(chance)
        # Even odds in one objective do not matter against a rival that is behind in another.
        variance = chances[name] * (1 - chances[name])
        undecided_by_rival = variance * np.prod(others, 0)
        return float(undecided_by_rival.max())

    # Of equally undecided scores `max` takes the first, so the choice is reproducible.
    return max(names, key=undecided)


def stratified_order(correct: Array, seed: int) -> NDArray[np.intp]:
    """Order examples so that every prefix holds the strata in proportion.

    A stratum holds the examples that the same number of sources get right.

    Args:
        correct: How many sources get each example right, `(N,)`.
        seed: Seed of the order inside the strata.

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
        size = len(members)
        offset = rng.random()
        place[members] = (np.arange(size) + offset) / size
    # Stable, so that equal places keep one order whatever sorting routine numpy chooses.
    return np.argsort(place, kind="stable")


def _estimator_of(table: Array) -> Estimator:
    """The estimator that suits per-example scores `(trials, N)`."""
    # Item-response models need shares of right answers. Other scores, such as lengths, are
    # corrected by the difficulty of each example instead.
    bounded = table.min() >= 0 and table.max() <= 1
    if bounded:
        # Uncorrected, the model is biased against merges that are better than all that it was
        # fitted to (docs/lab/evaluation.md).
        return ItemResponseModel(table).corrected
    return difficulty_corrected(table)


def _estimate(seen: Sequence[float], model: _ScoreModel) -> Score:
    """Estimate a score over all examples.

    Its standard error combines that of the estimate and that of the examples as a sample.
    """
    indices = model.order[: len(seen)]
    estimate: Estimate = model.estimator(indices, np.array(seen))
    # Scores on all examples have the second error too, so estimates and scores stay comparable.
    variance = float(np.var(seen))
    sampling_variance = variance / len(model.order)
    stderr = math.hypot(estimate.stderr, math.sqrt(sampling_variance))
    return Score(estimate.value, stderr, len(seen))
