"""The frame of samplers that propose points of the unit cube.

A `Proposer` chooses points from an `Archive` of finished trials. `PointSampler` makes an Optuna
sampler of it: it adds the first points, conditional parameters, and the rule that no point is
proposed twice.
"""

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from types import MappingProxyType
from typing import Protocol

import moocore
import numpy as np
from numpy.random import Generator
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from paretomerge.search.encoding import (
    Encoding,
    Indices,
    Mask,
    ParamDict,
    Space,
    infer_conditions,
)
from paretomerge.search.observations import Observations
from paretomerge.search.options import check_option, resolve_seed
from paretomerge.types import Array, Conditions, Params, ParamValue

_log = logging.getLogger(__name__)

# Random points that are tried before a space counts as exhausted.
_RANDOM_TRIES = 512
# Coordinates closer than this are equal: decoding and encoding rounds by less.
_SAME_COORDINATE = 1e-6
_NOTHING_PROPOSED: Mapping[int, Params] = MappingProxyType({})


@dataclass(frozen=True)
class Archive:
    """What a proposer sees when a trial asks for parameters: n finished trials as points.

    Attributes:
        encoding: Between parameters and points.
        observations: The n finished trials that have a place in the space.
        x: `(n, d)`, their points, in the order of the trials' numbers.
        pending: `(p, d)`, the points of running trials.
        number: The number of the trial that asks for parameters.
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
        proposed: Mapping[int, Params] = _NOTHING_PROPOSED,
    ) -> "Archive":
        """Encode trials, without those that do not lie in the space.

        A study may have trials of an earlier space.

        Args:
            observations: The trials of the study.
            encoding: Between parameters and points.
            number: The number of the trial that asks for parameters.
            proposed: Trial number -> the parameters that were proposed for it. Of a running trial,
                Optuna knows only the parameters that it has suggested so far.
        """
        x = encoding.encode(observations.params)
        in_space = np.asarray(np.isfinite(x).all(1))
        running = []
        for trial in observations.running:
            suggested = trial.params
            params = {**proposed.get(trial.number, {}), **suggested}
            if params:
                running.append(params)
        pending = encoding.encode(running)
        pending_in_space = np.isfinite(pending).all(1)
        return cls(
            encoding=encoding,
            observations=observations.only(in_space),
            x=x[in_space],
            pending=pending[pending_in_space],
            number=number,
        )

    @property
    def y(self) -> Array:
        """The objectives `(n, m)`, all maximised; NaN where a trial is not complete."""
        return self.observations.y

    @cached_property
    def usable(self) -> Indices:
        """Indices of the trials to learn from: complete, and violating no constraint."""
        return np.flatnonzero(self.observations.feasible)

    def is_new(self, x: Array) -> Mask:
        """Mask `(k,)` of the points `x` `(k, d)` that no finished, failed or running trial has."""
        seen = np.concatenate([self.x, self.pending])
        mask = np.zeros(len(x), dtype=bool)
        for i, point in enumerate(x):
            is_close = np.isclose(seen, point, rtol=0, atol=_SAME_COORDINATE)
            is_same = is_close.all(1)
            mask[i] = not is_same.any()
        return mask


class Proposer(Protocol):
    """A rule that chooses the next points."""

    def propose(self, archive: Archive, rng: Generator) -> Array:
        """Choose points for one trial.

        Args:
            archive: The trials so far.
            rng: A generator that depends on the seed and the trial's number only.

        Returns:
            `(k, d)`, the best first; k is 0 while there are too few trials. The points may lie
            between the values that parameters can have, and may repeat earlier ones.
        """
        ...


class PointSampler(BaseSampler):
    """An Optuna sampler that takes its points from a proposer.

    The first `n_startup` points come from a Sobol sequence scrambled by the seed, and so does a
    point where the proposer has nothing new. No point is proposed twice unless the space has no
    other, nor to two threads of one process. A parameter outside the space, or one that a trial
    suggests before the space is known, is drawn at random. Every proposal is a function of the seed
    and the trials so far, so a resumed study goes on as if it had not stopped.

    Args:
        proposer: Chooses the points; None goes through the Sobol sequence only.
        seed: Any integer; None draws one.
        space: Parameter -> distribution. By default, the parameters of the finished trials whose
            distribution is the same in all of them.
        conditions: When parameters are active (see `Encoding`). By default, and without `space`,
            they are inferred from the complete trials.
        n_startup: Finished trials before the proposer is asked.
        require_feasible: Whether the proposer needs a trial that violates no constraint; otherwise
            a complete one is enough.
        centre: Whether the first trial of the study, if it is not enqueued, is the centre of the
            space.

    Raises:
        ConfigError: `seed` or `n_startup` is not an integer.
    """

    def __init__(
        self,
        proposer: Proposer | None,
        *,
        seed: int | None = 0,
        space: Space | None = None,
        conditions: Conditions | None = None,
        n_startup: int = 10,
        require_feasible: bool = True,
        centre: bool = False,
    ) -> None:
        check_option("n_startup", 0, n_startup)
        self.proposer = proposer
        self.n_startup = n_startup
        self._require_feasible = require_feasible
        self._centre = centre
        self._seed = resolve_seed(seed)
        self._space = dict(space) if space else None
        self._conditions = conditions
        self._proposed: dict[int, ParamDict] = {}
        self._lock = Lock()

    def __getstate__(self) -> dict[str, object]:
        """The state without the lock and the proposals, which belong to this process."""
        return {**self.__dict__, "_lock": None, "_proposed": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore the state, with a lock of this process."""
        self.__dict__.update(state, _lock=Lock())

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The space, or the parameters that have one distribution in all finished trials."""
        if self._space:
            return dict(self._space)
        first: dict[str, BaseDistribution] = {}
        changing = set()
        for finished in Observations.of(study, trial).trials:
            for name, distribution in finished.distributions.items():
                if first.setdefault(name, distribution) != distribution:
                    changing.add(name)
        space = {}
        # Sorted, because a storage does not keep the order of a trial's parameters.
        for name in sorted(first):
            if name not in changing and not first[name].single():
                space[name] = first[name]
        return space

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> ParamValue:
        """A random value; for the first trial of a define-by-run study, the centre if wanted."""
        if self._centre and trial.number == 0 and not self._space:
            encoding = Encoding({param_name: param_distribution})
            middle = np.full(encoding.d, 0.5)
            value: ParamValue = encoding.decode(middle)[param_name]
            return value
        return random_value(self._seed, study, trial, param_name, param_distribution)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> ParamDict:
        """The next point. Threads wait for each other, and each sees the others' proposals."""
        if not search_space:
            return {}
        # Optuna calls this from several threads (`n_jobs`), which must not get the same point.
        with self._lock:
            observations = Observations.of(study, trial)
            running = {other.number for other in observations.running}
            finished = self._proposed.keys() - running
            for number in finished:
                del self._proposed[number]
            conditions = self._conditions_of(observations, search_space)
            encoding = Encoding(search_space, conditions)
            archive = Archive.of(observations, encoding, trial.number, self._proposed)
            params = self._next(archive)
            self._proposed[trial.number] = params
            return dict(params)

    def _next(self, archive: Archive) -> ParamDict:
        """The first new point of the proposer, of the Sobol sequence, or of random ones."""
        encoding = archive.encoding
        # A generator per trial, so that a proposal does not depend on how many were drawn before.
        rng = np.random.default_rng([self._seed, archive.number])
        proposals = self._proposals(archive, rng)
        # The proposer comes first, so the Sobol point is taken only if no proposal is new.
        sobol = self._sobol_point(encoding.d, archive.number)
        candidates = np.concatenate([proposals, sobol])
        points = encoding.project(candidates)
        is_new = archive.is_new(points)
        if not is_new.any():
            random = rng.random((_RANDOM_TRIES, encoding.d))
            others = encoding.project(random)
            others_are_new = archive.is_new(others)
            points = np.concatenate([others, points])
            is_new = np.concatenate([others_are_new, is_new])
        if not is_new.any():
            _log.warning(
                "Every point that was drawn has been evaluated before; the space may be used up."
            )
        # Where no point is new, this is the first one: a full space repeats points, and goes on.
        first_new = is_new.argmax()
        return encoding.decode(points[first_new])

    def _proposals(self, archive: Archive, rng: Generator) -> Array:
        """The proposer's points `(k, d)`; none until it has enough trials."""
        observations = archive.observations
        needed = observations.complete
        if self._require_feasible:
            needed = observations.feasible
        n = len(archive.x)
        started = n >= self.n_startup and needed.any()
        if self.proposer is None or not started:
            return np.zeros((0, archive.encoding.d))
        return self.proposer.propose(archive, rng)

    def _conditions_of(self, observations: Observations, space: Space) -> Conditions:
        if self._conditions is not None or self._space:
            return self._conditions or {}
        # Complete trials only: one that failed may lack a parameter just because it failed.
        complete = np.flatnonzero(observations.complete)
        params = observations.params
        return infer_conditions([params[i] for i in complete], space)

    def _sobol_point(self, d: int, number: int) -> Array:
        """Point `number` of the Sobol sequence, `(1, d)`."""
        if self._centre and number == 0:
            return np.full((1, d), 0.5)
        # Here, for it takes a second, and whoever reads a record imports this module.
        from scipy.stats import qmc

        # The sequence starts again for each trial: a resumed study has no state but its trials.
        scrambling = np.random.default_rng(self._seed)
        sequence = qmc.Sobol(d, rng=scrambling)
        if number:
            sequence.fast_forward(number)
        return np.asarray(sequence.random(1))


def random_value(
    seed: int,
    study: Study,
    trial: FrozenTrial,
    name: str,
    distribution: BaseDistribution,
) -> ParamValue:
    """Draw one parameter at random.

    The value is a function of the seed, the trial's number and the parameter's name, so a resumed
    study draws the same.
    """
    # crc32, because Python's hash of a text differs between processes.
    name_hash = zlib.crc32(name.encode())
    address = [resolve_seed(seed), trial.number, name_hash]
    rng = np.random.default_rng(address)
    sampler_seed = int(rng.integers(2**31))
    sampler = RandomSampler(seed=sampler_seed)
    value: ParamValue = sampler.sample_independent(study, trial, name, distribution)
    return value


def crowding_order(y: Array) -> Indices:
    """Sort points by nondominated front, then by crowding distance.

    Source: NSGA-II, Deb et al. 2002, sec. III-A and III-B.

    Args:
        y: `(n, m)`, all maximised.

    Returns:
        Indices `(n,)`, the best first: the first front, then the second; inside a front the most
        isolated point first.
    """
    ranks = np.asarray(moocore.pareto_rank(y, maximise=True))
    distance = np.zeros(len(y))
    for rank in np.unique(ranks):
        front = ranks == rank
        y_front = y[front]
        distance[front] = _crowding_distance(y_front)
    return np.lexsort((-distance, ranks))


def _crowding_distance(y: Array) -> Array:
    """The gap between both neighbours, summed over objectives; infinite at the ends."""
    distance = np.zeros(len(y))
    for values in y.T:
        # Stable, so that the order of ties does not depend on the platform.
        order = values.argsort(kind="stable")
        extent = float(np.ptp(values))
        spread = max(extent, 1e-12)
        ascending = values[order]
        following = ascending[2:]
        preceding = ascending[:-2]
        gaps = following - preceding
        inner = order[1:-1]
        ends = order[[0, -1]]
        distance[inner] += gaps / spread
        distance[ends] = np.inf
    return distance
