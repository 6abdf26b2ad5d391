"""Racing: a candidate is scored on more and more items, and left where finishing is not expected to add to the front.

Fewer items for the same front: what a candidate would score on all is told from some by an item-response model of those that were
scored on all (`evaluate/estimators.py`), and the expected gain in hypervolume says whether to go on (Maron and Moore 1997 raced
models so, by bounds on single scores).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, qmc

from paretomerge.evaluate.estimators import Estimate, Estimator, Responses, by_difficulty
from paretomerge.evaluate.evaluator import Itemised, Live, Score, parts_of
from paretomerge.pareto.front import hypervolume, nondominated
from paretomerge.study.record import Trial

if TYPE_CHECKING:
    from paretomerge.study.study import Study

Array = NDArray[np.float64]
_LEAST_KNOWN = 4  # merges scored on all items, before anything can be told of others
_REFIT = 1.25  # by how much more of them the models are fitted anew
_DRAWS = 64
_SETTLED = 0.25  # of the tolerance: many small gains add up, and the best of them are worth their items


@dataclass(frozen=True)
class Racing:
    """tolerance: the expected gain, as a share of the hypervolume, below which a candidate is left. first: items of each score to
    begin with; growth: by what the items of the least certain score are multiplied then. seed: of their order.
    """

    tolerance: float = 0.02
    first: int = 24
    growth: float = 1.5
    seed: int = 0


@dataclass(frozen=True)
class _Known:
    """What is known of one score: the estimator, and the order in which its items are asked."""

    estimate: Estimator
    order: NDArray[np.intp]


class Race:
    """The race of one study. Everything that it decides is a function of the seed and of the finished trials."""

    def __init__(self, study: "Study", settings: Racing) -> None:
        self._study, self._settings = study, settings
        self._known: tuple[int, dict[str, _Known]] = (0, {})

    def score(self, live: Live, finished: Sequence[Trial]) -> tuple[dict[str, Score], bool]:
        """Scores on the search items, and whether they are of all; where they are not, the candidate was left, and they are estimates."""
        goals, whole = self._study.goals, [t for t in finished if t.feasible and t.final]
        known = self._models([t for t in finished if not t.failure and t.final])
        itemised = [part for part in parts_of(goals.evaluator) if isinstance(part, Itemised)]
        raced = {name: part for part in itemised for name in part.items("search") if name in known}
        if not raced or self._study.reference is None or not whole:
            return self._study.score(live, "search"), True
        exact = self._others(live, itemised, raced)
        front, worst = self._front(whole), np.asarray(self._study.reference)
        outcomes: dict[str, list[float]] = {name: [] for name in raced}
        sizes = {name: min(self._settings.first, len(known[name].order)) for name in raced}
        while True:
            for name, part in raced.items():
                wanted = known[name].order[len(outcomes[name]) : sizes[name]]
                if len(wanted):
                    outcomes[name] += [float(x) for x in part.outcomes(live, "search", {name: wanted.tolist()})[name]]
            if all(sizes[name] == len(known[name].order) for name in raced):
                scores = {name: self._whole(part, name, known[name].order, outcomes[name]) for name, part in raced.items()}
                return self._ordered(exact | scores), True
            told = {name: known[name].estimate(known[name].order[: sizes[name]], np.array(outcomes[name])) for name in raced}
            if self._gain(told, exact, front, worst) < self._settings.tolerance:
                return self._ordered(exact | {name: _estimated(told[name], outcomes[name], known[name]) for name in raced}), False
            name = self._least_certain(told, sizes, known, front, worst)
            sizes[name] = min(len(known[name].order), math.ceil(sizes[name] * self._settings.growth))

    def settle(self) -> None:
        """Score on all items, the most promising first, whoever was left and is expected to add a quarter of the tolerance."""
        study = self._study
        while study.reference is not None:
            trials = [t for t in study.trials if t.feasible]
            whole, left = [t for t in trials if t.final], [t for t in trials if not t.final]
            if not whole or not left:
                return
            front, worst = self._front(whole), np.asarray(study.reference)
            gains = [expected_gain(*self._believed(t, whole), front, worst) for t in left]
            if max(gains) < self._settings.tolerance * _SETTLED:
                return
            best = left[int(np.argmax(gains))]
            scores = study.score(study.load(best), "search")
            study.record.settle(replace(best, scores=scores, constraints=study.goals.excesses(scores)))

    def _believed(self, trial: Trial, whole: Sequence[Trial]) -> tuple[Array, Array]:
        """The estimates of a trial that was left, and their errors less that of the items themselves, which all trials share."""
        objectives = self._study.objectives
        stderr = np.array([trial.scores[o.name].stderr for o in objectives])
        shared = np.mean([[t.scores[o.name].stderr ** 2 for o in objectives] for t in whole], 0)
        return np.array(trial.values(objectives)), np.sqrt(np.maximum(stderr**2 - shared, 0.0))

    def _models(self, trials: Sequence[Trial]) -> dict[str, _Known]:
        """Of every score whose items are known of enough merges; fitted to the first of them, as many as the last refit had."""
        count = _LEAST_KNOWN
        while math.ceil(count * _REFIT) <= len(trials):
            count = math.ceil(count * _REFIT)
        if count > len(trials):
            return {}
        if self._known[0] != count:
            first = trials[:count]
            names = [name for name in self._study.goals.scores if all(t.scores[name].items is not None for t in first)]
            tables = {name: [t.scores[name].items for t in first] for name in names}
            self._known = (
                count,
                {name: self._model(np.array(t, dtype=float)) for name, t in tables.items() if len({len(r or ()) for r in t}) == 1},
            )
        return self._known[1]

    def _model(self, table: Array) -> _Known:
        bounded = table.min() >= 0 and table.max() <= 1
        starts = table[: len(self._study.space.sources)].sum(0)
        return _Known(Responses(table).corrected if bounded else by_difficulty(table), stratified_order(starts, self._settings.seed))

    def _others(self, live: Live, itemised: Sequence[Itemised], raced: Mapping[str, Any]) -> dict[str, Score]:
        """The scores that are not raced, whole."""
        scores: dict[str, Score] = {}
        for part in itemised:
            rest = {name: range(len(items)) for name, items in part.items("search").items() if name not in raced}
            scores |= {name: part.score("search", name, found) for name, found in part.outcomes(live, "search", rest).items()}
        for other in parts_of(self._study.goals.evaluator):
            if not isinstance(other, Itemised):
                scores |= other.evaluate(live, "search")
        return scores

    def _front(self, trials: Sequence[Trial]) -> Array:
        values = np.array([t.values(self._study.objectives) for t in trials])
        return np.asarray(values[nondominated(values)])

    def _gain(self, told: Mapping[str, Estimate], exact: Mapping[str, Score], front: Array, worst: Array) -> float:
        """What the candidate is expected to add, over what its scores may turn out to be."""
        objectives = self._study.objectives
        mean = np.array([o.inside((told.get(o.name) or exact[o.name]).value) for o in objectives])
        error = np.array([told[o.name].stderr if o.name in told else 0.0 for o in objectives])
        return expected_gain(mean, error, front, worst)

    def _least_certain(
        self, told: Mapping[str, Estimate], sizes: Mapping[str, int], known: Mapping[str, _Known], front: Array, worst: Array
    ) -> str:
        """The score that more items tell most about: the largest standard error, in units of the front's range."""
        span = {o.name: max(float(s), 1e-12) for o, s in zip(self._study.objectives, front.max(0) - worst, strict=True)}
        left = [name for name in told if sizes[name] < len(known[name].order)]
        return max(left, key=lambda name: told[name].stderr / span.get(name, math.inf))

    def _whole(self, part: Itemised, name: str, order: NDArray[np.intp], outcomes: Sequence[float]) -> Score:
        """In the order of the data."""
        return part.score("search", name, [outcomes[i] for i in np.argsort(order)])

    def _ordered(self, scores: Mapping[str, Score]) -> dict[str, Score]:
        return {name: scores[name] for name in self._study.goals.scores} | dict(scores)


def expected_gain(mean: Array, error: Array, front: Array, worst: Array) -> float:
    """Expected hypervolume that independent normal values `(m,)` add to the front `(k, m)`, as a share of the front's."""
    now = hypervolume(front, worst)
    if now <= 0:
        return math.inf
    draws = mean + error * norm.ppf(qmc.Sobol(len(mean), rng=0).random(_DRAWS).clip(1e-6, 1 - 1e-6))
    better = [v for v in draws if (v > worst).all() and not (front >= v).all(1).any()]
    return sum(hypervolume(np.vstack([front, v]), worst) - now for v in better) / _DRAWS / now


def stratified_order(correct: Array, seed: int) -> NDArray[np.intp]:
    """Items `(N,)` in an order whose every beginning has the strata, items that equally many sources get right, in proportion."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(correct))
    place = np.empty(len(correct))
    for level in np.unique(correct):
        members = shuffled[correct[shuffled] == level]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def _estimated(told: Estimate, outcomes: Sequence[float], known: _Known) -> Score:
    """With both errors: of taking the mean over all items from some, and of those items for all that could be asked."""
    spread = float(np.var(outcomes)) / len(known.order)
    return Score(told.value, math.sqrt(told.stderr**2 + spread), len(outcomes))
