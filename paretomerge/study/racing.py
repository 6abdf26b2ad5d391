"""Racing: a candidate is scored on more and more items, and left once the front dominates it with enough probability.

All trials are asked the same items in the same order, so a candidate and the front are compared pair by pair on the items that it
has seen so far, as races of models are run (Maron and Moore 1997; Birattari et al. 2002 with paired tests). What it would score on
all items is then told by an item-response model of the trials that were scored on all (`evaluate/estimators.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paretomerge.evaluate.estimators import (
    Estimate,
    Estimator,
    ItemResponseModel,
    difficulty_corrected,
)
from paretomerge.evaluate.evaluator import Candidate, PerExample, Score, evaluators_in
from paretomerge.record.record import Trial, on_front

if TYPE_CHECKING:
    from paretomerge.study.study import Study

Array = NDArray[np.float64]
_LEAST_KNOWN = 4  # merges scored on all items, before anything can be told of others
_REFIT = 1.25  # by how much more of them the models are fitted anew
_DRAWS = 512


@dataclass(frozen=True)
class Racing:
    """confidence: the probability of being dominated above which a candidate is left, at each of the looks: of those that nearly tie
    with the front more are left wrongly. first: items of each score to begin with; growth: by what the items of the least decided
    score are multiplied then. seed: of their order.
    """

    confidence: float = 0.95
    first: int = 24
    growth: float = 1.5
    seed: int = 0


@dataclass(frozen=True)
class _Known:
    """What is known of one score: the estimator, the order in which its items are asked, and the range of their outcomes."""

    estimate: Estimator
    order: NDArray[np.intp]
    unit: float


class Race:
    """The race of one study. Everything that it decides is a function of the seed and of the finished trials."""

    def __init__(self, study: "Study", settings: Racing) -> None:
        self._study, self._settings = study, settings
        self._known: tuple[int, dict[str, _Known]] = (0, {})

    def score(self, live: Candidate, finished: Sequence[Trial]) -> tuple[dict[str, Score], bool]:
        """Scores on the search items, and whether they are of all; where they are not, the candidate was left, and they are estimates."""
        whole = [t for t in finished if not t.failure and t.final]
        known = self._models(whole)
        itemised = [
            part
            for part in evaluators_in(self._study.goals.evaluator)
            if isinstance(part, PerExample)
        ]
        raced = {
            name: part for part in itemised for name in part.examples("search") if name in known
        }
        rivals = self._rivals(
            [t for t in whole if t.feasible], {name: len(known[name].order) for name in raced}
        )
        if not raced or not rivals:
            return self._study.score(live, "search"), True
        exact = self._others(live, itemised, raced)
        rng = np.random.default_rng([self._settings.seed, len(finished)])
        outcomes: dict[str, list[float]] = {name: [] for name in raced}
        sizes = {name: min(self._settings.first, len(known[name].order)) for name in raced}
        while True:
            for name, part in raced.items():
                wanted = known[name].order[len(outcomes[name]) : sizes[name]]
                if len(wanted):
                    outcomes[name] += [
                        float(x)
                        for x in part.example_scores(live, "search", {name: wanted.tolist()})[name]
                    ]
            open_ = [name for name in raced if sizes[name] < len(known[name].order)]
            if not open_:
                scores = {
                    name: self._whole(part, name, known[name].order, outcomes[name])
                    for name, part in raced.items()
                }
                return self._ordered(exact | scores), True
            beaten = self._beaten(outcomes, exact, known, rivals, rng)
            if (
                np.logical_and.reduce(list(beaten.values())).any(1).mean()
                > self._settings.confidence
            ):
                return self._ordered(
                    exact | {name: _estimated(outcomes[name], known[name]) for name in raced}
                ), False
            name = least_decided(beaten, open_)
            sizes[name] = min(
                len(known[name].order), math.ceil(sizes[name] * self._settings.growth)
            )

    def _rivals(self, trials: Sequence[Trial], items: Mapping[str, int]) -> list[Trial]:
        """The front, as far as it has outcomes to compare with. items: score's name -> their number."""
        front = on_front(trials, self._study.objectives)
        return [
            t
            for t in front
            if all(len(t.scores[name].example_scores or ()) == n for name, n in items.items())
        ]

    def _beaten(
        self,
        outcomes: Mapping[str, Sequence[float]],
        exact: Mapping[str, Score],
        known: Mapping[str, _Known],
        rivals: Sequence[Trial],
        rng: np.random.Generator,
    ) -> dict[str, NDArray[np.bool_]]:
        """Objective -> in which of the draws `(draws, r)` each of the r rivals is at least as good in it, on all items."""
        beaten = {}
        for o in self._study.objectives:
            if o.name in outcomes:
                seen, order = np.array(outcomes[o.name]), known[o.name].order
                theirs = np.array([t.scores[o.name].example_scores for t in rivals], dtype=float)[
                    :, order[: len(seen)]
                ]
                gaps = drawn_gaps((theirs - seen).T, len(order), known[o.name].unit, rng)
            else:
                gaps = np.array(
                    [[t.scores[o.name].value - exact[o.name].value for t in rivals]] * _DRAWS
                )
            beaten[o.name] = (gaps if o.maximise else -gaps) >= 0
        return beaten

    def _models(self, trials: Sequence[Trial]) -> dict[str, _Known]:
        """Of every score whose items are known of enough merges; fitted to the first of them, as many as the last refit had."""
        count = _LEAST_KNOWN
        while math.ceil(count * _REFIT) <= len(trials):
            count = math.ceil(count * _REFIT)
        if count > len(trials):
            return {}
        if self._known[0] != count:
            first = trials[:count]
            names = [
                name
                for name in self._study.goals.scores
                if all(t.scores[name].example_scores is not None for t in first)
            ]
            tables = {name: [t.scores[name].example_scores for t in first] for name in names}
            self._known = (
                count,
                {
                    name: self._model(np.array(t, dtype=float))
                    for name, t in tables.items()
                    if len({len(r or ()) for r in t}) == 1
                },
            )
        return self._known[1]

    def _model(self, table: Array) -> _Known:
        bounded = table.min() >= 0 and table.max() <= 1
        starts = table[: len(self._study.space.sources)].sum(0)
        estimate = ItemResponseModel(table).corrected if bounded else difficulty_corrected(table)
        return _Known(
            estimate, stratified_order(starts, self._settings.seed), float(np.ptp(table)) or 1.0
        )

    def _others(
        self, live: Candidate, itemised: Sequence[PerExample], raced: Mapping[str, Any]
    ) -> dict[str, Score]:
        """The scores that are not raced, whole."""
        scores: dict[str, Score] = {}
        for part in itemised:
            rest = {
                name: range(len(items))
                for name, items in part.examples("search").items()
                if name not in raced
            }
            scores |= {
                name: part.aggregate("search", name, found)
                for name, found in part.example_scores(live, "search", rest).items()
            }
        for other in evaluators_in(self._study.goals.evaluator):
            if not isinstance(other, PerExample):
                scores |= other.evaluate(live, "search")
        return scores

    def _whole(
        self, part: PerExample, name: str, order: NDArray[np.intp], outcomes: Sequence[float]
    ) -> Score:
        """In the order of the data."""
        return part.aggregate("search", name, [outcomes[i] for i in np.argsort(order)])

    def _ordered(self, scores: Mapping[str, Score]) -> dict[str, Score]:
        return {name: scores[name] for name in self._study.goals.scores} | dict(scores)


def drawn_gaps(gaps: Array, total: int, unit: float, rng: np.random.Generator) -> Array:
    """What the mean gaps to r rivals over all `total` items may be, from those on n of them, `(n, r)`: draws `(draws, r)`.

    The Bayesian bootstrap (Rubin 1981) of the items, the same for all rivals, narrowed as n nears `total` (items are not put back).
    Two imagined items, with a gap of a unit each way, keep items without gaps from being a certainty.
    """
    n, r = gaps.shape
    if n == total:
        return np.repeat(gaps.mean(0)[None], _DRAWS, 0)
    padded = np.vstack([gaps, np.full(r, unit), np.full(r, -unit)])
    drawn = rng.dirichlet(np.ones(n + 2), _DRAWS) @ padded
    return np.asarray(gaps.mean(0) + math.sqrt(1 - n / total) * (drawn - padded.mean(0)))


def least_decided(beaten: Mapping[str, NDArray[np.bool_]], names: Sequence[str]) -> str:
    """Of the scores `names`, the one that more items can decide most about: even odds against a rival who is likely ahead in the rest."""
    chances = {name: drawn.mean(0) for name, drawn in beaten.items()}

    def undecided(name: str) -> float:
        if name not in chances:
            return -1.0  # no objective: it only bounds or is looked at
        others = [c for other, c in chances.items() if other != name]
        return float((chances[name] * (1 - chances[name]) * np.prod(others, 0)).max())

    return max(names, key=undecided)


def stratified_order(correct: Array, seed: int) -> NDArray[np.intp]:
    """Items `(N,)` in an order whose every beginning has the strata, items that equally many sources get right, in proportion."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(correct))
    place = np.empty(len(correct))
    for level in np.unique(correct):
        members = shuffled[correct[shuffled] == level]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def _estimated(outcomes: Sequence[float], known: _Known) -> Score:
    """With both errors: of taking the mean over all items from some, and of those items for all that could be asked."""
    told: Estimate = known.estimate(known.order[: len(outcomes)], np.array(outcomes))
    return Score(
        told.value,
        math.hypot(told.stderr, math.sqrt(float(np.var(outcomes)) / len(known.order))),
        len(outcomes),
    )
