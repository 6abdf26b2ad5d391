"""A single-objective sampler in a multi-objective study: it is shorten one number per trial.

So CMA-ES can be run on several tasks at once, as mergekit-evolve and Akiba et al. (2025, arXiv 2403.13187) do. It gets
one compromise, not a front; the trials on the way there are the front that one has.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.trial import FrozenTrial, TrialState

from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.search.observations import Observations
from paretomerge.search.options import check_option, number_vector, resolve_seed
from paretomerge.search.point_sampler import random_value

Array = NDArray[np.float64]
Inner = Callable[..., BaseSampler]
Kind = Literal["sum", "tchebycheff"]
_KINDS = ("sum", "tchebycheff")
_AUGMENTATION = (
    1e-3  # share of the weighted sum in the Tchebycheff scalar: tells weakly dominated points apart
)
_SIGMA = 1 / 6  # of the unit cube: Akiba et al. 2025, and the default of Optuna


class Scalarised(BaseSampler):
    """Shows `inner` the trials with one value each, to be maximised.

    inner: a class of `optuna.samplers`, or any function that is called with `seed=` and gives a sampler. It is made anew for
        each trial, with a seed of its own, and must keep its state in the trials' system attributes or nowhere
        (CmaEsSampler, TPESampler, GPSampler do): then a resumed study goes on exactly.
    weights: `(m,)`, 0 or more, scaled to a sum of 1; equal by default.
    kind: `sum` is the weighted sum of the raw values, as in mergekit-evolve: bring objectives to like units. `tchebycheff`
        is minus the largest weighted shortfall from the ideal, each objective scaled by the range of the trials so far
        (Steuer & Choo 1983, augmented); it also reaches the hollow parts of a front.
    ideal: for `tchebycheff`, in the study's own directions; by default the best seen of each objective.
    What the inner sampler does not sample, choices in the case of CMA-ES, is drawn at random.
    """

    def __init__(
        self,
        inner: Inner,
        weights: Sequence[float] | None = None,
        kind: Kind = "sum",
        *,
        ideal: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if kind not in _KINDS:
            raise ConfigError(f"scalarised: {unknown_name('kind', kind, _KINDS)}")
        self._inner = inner
        self._weights = None if weights is None else checked_weights(weights)
        self._kind = kind
        self._ideal = None if ideal is None else np.asarray(ideal, dtype=float)
        self._seed = resolve_seed(seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        view, asking = self._view(study, trial)
        return view.sampler.infer_relative_search_space(view, asking)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return random_value(self._seed, study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What the inner sampler proposes; the state that it notes at its trial is noted at ours."""
        view, asking = self._view(study, trial)
        params = view.sampler.sample_relative(view, asking, search_space)
        for key, value in view.get_trials(deepcopy=False)[asking.number].system_attrs.items():
            study._storage.set_trial_system_attr(trial._trial_id, key, value)
        return params

    def _view(self, study: Study, trial: FrozenTrial) -> tuple[Study, FrozenTrial]:
        """A single-objective copy of the study in memory, and `trial` in it under the same number."""
        sampler = self._inner(
            seed=int(np.random.default_rng([self._seed, trial.number]).integers(2**31))
        )
        known = Observations.of(study)
        usable = np.flatnonzero(known.feasible)  # what breaks a constraint is shorten as failed
        scalars = dict(
            zip(
                (known.trials[i].number for i in usable),
                self.scalars(known.y[usable], known.signs),
                strict=True,
            )
        )
        view = _quiet_study(sampler)
        view.add_trials(
            [
                _copied(t, scalars)
                for t in sorted(study.get_trials(deepcopy=False), key=lambda t: t.number)
            ]
        )
        return view, view.get_trials(deepcopy=False)[trial.number]

    def scalars(self, y: Array, signs: Array | None = None) -> Array:
        """y `(n, m)`, maximised -> `(n,)`, to be maximised. signs `(m,)`: -1 where the study minimises."""
        m = y.shape[1]
        signs = np.ones(m) if signs is None else signs
        for name, given in (("weights", self._weights), ("ideal", self._ideal)):
            if given is not None and len(given) != m:
                raise ConfigError(
                    f"scalarised: {name}: expected {m} numbers, one per objective, got {len(given)}"
                )
        weights = np.full(m, 1 / m) if self._weights is None else self._weights
        if self._kind == "sum" or not len(y):
            return np.asarray(y @ weights)
        ideal = y.max(0) if self._ideal is None else self._ideal * signs
        extent = ideal - y.min(0)
        shortfall = weights * (ideal - y) / np.where(extent > 1e-12, extent, 1.0)
        return np.asarray(-shortfall.max(1) - _AUGMENTATION * shortfall.sum(1))


def _quiet_study(sampler: BaseSampler) -> Study:
    """A new study in memory, without the line that Optuna logs for each: there is one per ask."""
    logger = logging.getLogger("optuna.storages._in_memory")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        return optuna.create_study(direction="maximize", sampler=sampler)
    finally:
        logger.setLevel(level)


def _copied(trial: FrozenTrial, scalars: Mapping[int, float]) -> FrozenTrial:
    """The trial with one value; one that is finished and has none, or an infinite one, has failed."""
    value = scalars.get(trial.number)
    create = partial(
        optuna.trial.create_trial, user_attrs=trial.user_attrs, system_attrs=trial.system_attrs
    )
    try:
        return create(
            state=TrialState.FAIL if value is None and trial.state.is_finished() else trial.state,
            value=None if value is None else float(value),
            params=trial.params,
            distributions=trial.distributions,
        )
    except ValueError:  # it was enqueued with a value from outside its range, which Optuna takes, and then does not copy
        return create(state=TrialState.FAIL)


def checked_weights(weights: Sequence[float]) -> Array:
    """Scaled to a sum of 1."""
    given = number_vector(weights)
    if not np.isfinite(given).all() or (given < 0).any() or not given.sum() > 0:
        raise ConfigError(
            f"weights: expected a list of numbers of 0 or more, one of them above 0, got {shorten(weights)}"
        )
    return np.asarray(given / given.sum())


def cma(
    seed: int = 0,
    *,
    space: Mapping[str, BaseDistribution] | None = None,
    start: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    kind: Kind = "sum",
    sigma: float = _SIGMA,
    population_size: int | None = None,
) -> Scalarised:
    """CMA-ES (Hansen & Ostermeier 2001) on one scalar of several objectives.

    start: parameters to begin at, moved at least `sigma` inside the bounds; the middle of the space by default.
    sigma: of the first generation, in units of the bounds. population_size: 4 + 3 ln(d) by default.
    """
    if not 0 < sigma <= 0.5:
        raise ConfigError(f"cma: expected 0 < sigma <= 0.5, in units of the bounds, got {sigma}")
    if population_size is not None and population_size < 3:
        raise ConfigError(f"cma: expected a population_size of 3 or more, got {population_size}")
    middle = (
        _inside(space, _checked_start(space, start), sigma) if space and start is not None else None
    )
    return Scalarised(
        partial(_cma_es, x0=middle, sigma0=sigma, popsize=population_size), weights, kind, seed=seed
    )


def _cma_es(**options: Any) -> CmaEsSampler:
    with warnings.catch_warnings():
        # Optuna 5 deprecates the start and its spread without giving another way to say them
        warnings.simplefilter("ignore", FutureWarning)
        return CmaEsSampler(warn_independent_sampling=False, **options)


def _checked_start(
    space: Mapping[str, BaseDistribution], start: Mapping[str, Any]
) -> Mapping[str, Any]:
    if not isinstance(start, Mapping):
        raise ConfigError(f"cma: start: expected parameters and their values, got {shorten(start)}")
    for name, value in start.items():
        if name not in space:
            raise ConfigError(f"cma: start: {unknown_name('parameter', name, space)}")
        distribution = space[name]
        if not isinstance(distribution, CategoricalDistribution):
            check_option(f"cma: start: {name}", 0.0, value)
    return start


def _inside(
    space: Mapping[str, BaseDistribution], start: Mapping[str, Any], sigma: float
) -> dict[str, Any]:
    """The numbers of `start`, off the bounds: at a bound half of the first generation would be cut."""
    point: dict[str, Any] = {}
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution) or distribution.single():
            continue
        assert isinstance(distribution, (FloatDistribution, IntDistribution))
        low, high = distribution.low, distribution.high
        forth, back = (np.log, np.exp) if distribution.log else (float, float)
        margin = sigma * (forth(high) - forth(low))
        value = back(
            min(
                max(
                    forth(start.get(name, back((forth(low) + forth(high)) / 2))),
                    forth(low) + margin,
                ),
                forth(high) - margin,
            )
        )
        point[name] = round(value) if isinstance(distribution, IntDistribution) else float(value)
    return point
