"""What samplers that think in points of the unit cube have in common: the archive that they read, start and finish.

`PointSampler` asks a `Proposer` for points and does the rest: the first points, parameters that come and go, other
trials that still run, points that were evaluated already.
"""

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from types import MappingProxyType
from typing import Any, Protocol

import moocore
import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial
from scipy.stats import qmc

from paretomerge.search.encoding import Conditions, Encoding, infer_conditions
from paretomerge.search.observations import Observations
from paretomerge.search.options import check_option, resolve_seed

Array = NDArray[np.float64]
_log = logging.getLogger(__name__)
_TRIES = 512  # random points looked at before a space counts as exhausted


@dataclass(frozen=True)
class Archive:
    """The n finished trials in the order of their numbers, as points of the unit cube, when trial `number` is asked for.

    x: `(n, d)`. pending: `(p, d)`, the points of trials that still run, as far as they are known.
    """

    encoding: Encoding
    observations: Observations
    x: Array
    pending: Array
    number: int

    @classmethod
    def of(
        cls,
        observations: Observations,
        encoding: Encoding,
        number: int,
        proposed: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
    ) -> "Archive":
        """proposed: trial's number -> what it was given: of a trial that runs, Optuna knows only what it has used so far. Trials that
        have no place in the space, for it was another one when they were made, are left out.
        """
        running = [{**proposed.get(t.number, {}), **t.params} for t in observations.running]
        x, pending = (
            encoding.encode(observations.params),
            encoding.encode([params for params in running if params]),
        )
        placed = np.asarray(np.isfinite(x).all(1), dtype=bool)
        return cls(
            encoding,
            observations.only(placed),
            x[placed],
            pending[np.isfinite(pending).all(1)],
            number,
        )

    @property
    def y(self) -> Array:
        """`(n, m)`, all maximised; NaN where a trial failed."""
        return self.observations.y

    @cached_property
    def usable(self) -> NDArray[np.intp]:
        """Indices of the trials to learn from: complete, and breaking no constraint."""
        return np.flatnonzero(self.observations.feasible)

    @cached_property
    def widths(self) -> NDArray[np.intp]:
        """How many coordinates each parameter has, in their order."""
        return np.array(
            [columns.stop - columns.start for columns in self.encoding.columns.values()]
        )

    def is_new(self, x: Array) -> NDArray[np.bool_]:
        """Mask of the points `(k, d)` that were not evaluated, tried in vain, or are being evaluated."""
        known = np.concatenate([self.x, self.pending])
        return np.array(
            [not np.isclose(known, point, rtol=0, atol=1e-6).all(1).any() for point in x],
            dtype=bool,
        )


class Proposer(Protocol):
    """One way to choose the next point."""

    def propose(self, archive: Archive, rng: np.random.Generator) -> Array:
        """Points `(k, d)`, the best first; none as long as too little is known. They need not be settled or new."""
        ...


class PointSampler(BaseSampler):
    """An Optuna sampler that asks `proposer` once `n_startup` trials are known.

    proposer: None goes on through the Sobol sequence for ever.
    space: the parameters, if known up front; else all that finished trials had, and new ones at random. So are those whose
        range changes between trials.
    conditions: when a parameter counts, as of `Encoding`; without them and a space, what the trials show.
    usable: whether the proposer needs a trial that keeps the constraints; else one with values will do.
    centre: whether the study's first trial, if it is not enqueued, is the middle of the space.
    Until then, and when the proposer has nothing new, points come from a Sobol sequence scrambled by `seed` (None: by chance). No
    point is proposed twice, unless the space has no other, nor to two threads of one process; what a trial suggests before the
    space is known is drawn at random. Every proposal is a function of the seed and the trials so far.
    """

    def __init__(
        self,
        proposer: Proposer | None,
        *,
        seed: int | None = 0,
        space: Mapping[str, BaseDistribution] | None = None,
        conditions: Conditions | None = None,
        n_startup: int = 10,
        usable: bool = True,
        centre: bool = False,
    ) -> None:
        self.proposer = proposer
        self.n_startup = n_startup
        self._usable = usable
        self._centre = centre
        self._seed = resolve_seed(seed)
        self._space = dict(space) if space else None
        self._conditions = conditions
        self._proposed: dict[int, dict[str, Any]] = {}
        self._lock = Lock()
        check_option("n_startup", 0, n_startup)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the threads of this process."""
        return {**self.__dict__, "_lock": None, "_proposed": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if self._space:
            return dict(self._space)
        seen: dict[str, list[BaseDistribution]] = {}
        for done in Observations.of(study, trial).trials:
            for name, distribution in done.distributions.items():
                seen.setdefault(name, []).append(distribution)
        same = {
            name: every[0]
            for name, every in seen.items()
            if all(other == every[0] for other in every)
        }
        return {
            name: same[name] for name in sorted(same) if not same[name].single()
        }  # a storage may forget their order

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        if self._centre and trial.number == 0 and not self._space:
            encoding = Encoding({param_name: param_distribution})
            return encoding.decode(np.full(encoding.d, 0.5))[param_name]
        return random_value(self._seed, study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point of the study; of several threads one after the other, each knowing what the others were given."""
        if not search_space:
            return {}
        with self._lock:
            seen = Observations.of(study, trial)
            running = {t.number for t in seen.running}
            self._proposed = {
                number: params for number, params in self._proposed.items() if number in running
            }
            encoding = Encoding(search_space, self._known_conditions(seen, search_space))
            self._proposed[trial.number] = self._next(
                Archive.of(seen, encoding, trial.number, self._proposed)
            )
            return dict(self._proposed[trial.number])

    def _next(self, archive: Archive) -> dict[str, Any]:
        encoding, seen = archive.encoding, archive.observations
        rng = np.random.default_rng([self._seed, archive.number])
        points = np.zeros((0, encoding.d))
        known = seen.feasible if self._usable else seen.complete
        if self.proposer is not None and len(archive.x) >= self.n_startup and known.any():
            points = self.proposer.propose(archive, rng)
        points = encoding.project(np.concatenate([points, self._drawn(encoding.d, archive.number)]))
        new = archive.is_new(points)
        if not new.any():
            others = encoding.project(rng.random((_TRIES, encoding.d)))
            points, new = (
                np.concatenate([others, points]),
                np.concatenate([archive.is_new(others), new]),
            )
        if not new.any():
            _log.warning(
                "every point that was drawn has been evaluated before; the space may be used up"
            )
        return encoding.decode(points[new.argmax()])

    def _known_conditions(
        self, seen: Observations, space: Mapping[str, BaseDistribution]
    ) -> Conditions:
        if self._conditions is not None or self._space:
            return self._conditions or {}
        # a trial that failed may have lacked a parameter for that alone
        return infer_conditions(
            [params for params, whole in zip(seen.params, seen.complete, strict=True) if whole],
            space,
        )

    def _drawn(self, d: int, number: int) -> Array:
        """Point `number` of the sequence, `(1, d)`."""
        if self._centre and number == 0:
            return np.full((1, d), 0.5)
        sequence = qmc.Sobol(d, rng=np.random.default_rng(self._seed))
        if number:
            sequence.fast_forward(number)
        return np.asarray(sequence.random(1))


def random_value(
    seed: int, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
) -> Any:
    """A value of one parameter, a function of the seed, the trial's number and the name: a resume changes nothing."""
    rng = np.random.default_rng([resolve_seed(seed), trial.number, zlib.crc32(name.encode())])
    return RandomSampler(seed=int(rng.integers(2**31))).sample_independent(
        study, trial, name, distribution
    )


def crowding_order(y: Array) -> NDArray[np.intp]:
    """Indices of `y` `(n, m)`, maximised: front after front, inside a front by crowding distance, the loneliest first."""
    ranks = np.asarray(moocore.pareto_rank(y, maximise=True))
    crowding = np.zeros(len(y))
    for rank in np.unique(ranks):
        crowding[ranks == rank] = _crowding(y[ranks == rank])
    return np.lexsort((-crowding, ranks))


def _crowding(y: Array) -> Array:
    """Deb et al. 2002 (NSGA-II), sec. III-B: per objective the gap between the neighbours; infinite at the ends."""
    distance = np.zeros(len(y))
    for values in y.T:
        order = values.argsort(kind="stable")
        spread = max(float(np.ptp(values)), 1e-12)
        distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / spread
        distance[order[[0, -1]]] = np.inf
    return distance
