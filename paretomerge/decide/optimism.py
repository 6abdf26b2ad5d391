"""How much better search scores look than they are: measured on held-out items, and expected from having chosen the best of many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paretomerge.pareto.front import nondominated
from paretomerge.record.record import Trial
from paretomerge.study.study import Study

Array = NDArray[np.float64]
_DRAWS = 200


@dataclass(frozen=True)
class Optimism:
    """Of one objective, means over the front, in the objective's units; above 0 the search scores look too good.

    measured, stderr: search less held-out, both of finitely many items. expected: what choosing the front by these search items
    alone brings on average, by drawing the items anew and choosing again (the bootstrap's optimism; Efron and Gong 1983, sec. 7).
    corrected: the search score less what was expected.
    """

    objective: str
    search: float
    held_out: float
    measured: float
    stderr: float
    expected: float
    maximise: bool = True

    @property
    def corrected(self) -> float:
        return self.search - self.expected if self.maximise else self.search + self.expected


def optimism(study: Study) -> list[Optimism]:
    """Of every objective whose items are known on both splits; none before the front was scored on held-out items."""
    front = [t for t in study.front() if t.held_out]
    trials = [t for t in study.trials if t.feasible and t.final]
    itemised = [o.name for o in study.objectives if _have_items(trials, front, o.name)]
    if not front or not itemised:
        return []
    expected = _expected(study, trials, itemised)
    found = []
    for objective in study.objectives:
        name = objective.name
        if name in itemised:
            sign = 1 if objective.maximise else -1
            sides = (
                np.mean([t.scores[name].example_scores or () for t in front], 0),
                np.mean([(t.held_out or {})[name].example_scores or () for t in front], 0),
            )
            error = math.sqrt(sum(float(np.var(side, ddof=1)) / len(side) for side in sides))
            search, held_out = (float(side.mean()) for side in sides)
            found.append(
                Optimism(
                    name,
                    search,
                    held_out,
                    sign * (search - held_out),
                    error,
                    expected[name],
                    objective.maximise,
                )
            )
    return found


def _have_items(trials: Sequence[Trial], front: Sequence[Trial], name: str) -> bool:
    """Of all trials, and as many of each: else they cannot be drawn anew together."""
    searched = {len(t.scores[name].example_scores or ()) for t in trials}
    held_out = {
        len((t.held_out or {})[name].example_scores or ()) if name in (t.held_out or {}) else 0
        for t in front
    }
    return len(searched) == len(held_out) == 1 and min(searched | held_out) > 1


def _expected(study: Study, trials: Sequence[Trial], itemised: Sequence[str]) -> dict[str, float]:
    """By how much the drawn scores of the front that they choose exceed its true ones, which are here those of all items."""
    rng = np.random.default_rng(0)
    values = np.array([t.values(study.objectives) for t in trials])
    columns = {k: o for k, o in enumerate(study.objectives) if o.name in itemised}
    tables = {
        k: np.array([t.scores[o.name].example_scores for t in trials], dtype=float)
        * (1 if o.maximise else -1)
        for k, o in columns.items()
    }
    gains = np.zeros(values.shape[1])
    for _ in range(_DRAWS):
        drawn = values.copy()
        for k, table in tables.items():
            n = table.shape[1]
            drawn[:, k] = table @ rng.multinomial(n, np.full(n, 1 / n)) / n
        chosen = nondominated(drawn)
        gains += (drawn - values)[chosen].mean(0) / _DRAWS
    return {o.name: float(gains[k]) for k, o in columns.items()}
