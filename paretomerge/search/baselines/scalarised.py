"""A single-objective sampler in a multi-objective study: it sees one scalar per trial.

This is how mergekit-evolve and Akiba et al. (2025, arXiv 2403.13187) run CMA-ES on several tasks.
The search converges to one compromise, not to a front. The study's front is that of the trials on
the way.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Literal, cast

import numpy as np
from optuna import Study
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.pareto.preference import Preference, Scale, divisors
from paretomerge.search.baselines._optuna import create_silent_study, set_system_attr
from paretomerge.search.encoding import Space
from paretomerge.search.observations import Observations
from paretomerge.search.options import check_option, number_vector, resolve_seed
from paretomerge.search.point_sampler import random_value
from paretomerge.types import Array, Params, ParamValue

SamplerFactory = Callable[..., BaseSampler]
"""Called with `seed=`, returns a single-objective sampler."""

Scalarisation = Literal["sum", "tchebycheff"]

_SCALARISATIONS = ("sum", "tchebycheff")
_SIGMA = 1 / 6  # of the unit cube: Akiba et al. 2025, and Optuna's default
_MIN_POPULATION = 3


class ScalarisedSampler(BaseSampler):
    """Shows a single-objective sampler the trials with one value each, to be maximised.

    Parameters that the inner sampler does not sample, such as choices in the case of CMA-ES, are
    drawn at random.

    Args:
        inner: A class of `optuna.samplers`, or a function that is called with `seed=` and returns a
            sampler. The sampler is created anew for each trial, with a seed of its own. It must
            keep its state in the trials' system attributes or have none (as CmaEsSampler,
            TPESampler and GPSampler do); then a resumed study continues exactly.
        weights: `(m,)`, 0 or more, scaled to a sum of 1. Defaults to equal weights.
        kind: `sum` is the weighted sum of the raw values, as in mergekit-evolve, so objectives
            should have like units. `tchebycheff` is minus the largest weighted shortfall from the
            ideal, each objective scaled by its range over the trials so far (Steuer & Choo 1983,
            augmented); it also reaches non-convex parts of a front.
        ideal: For `tchebycheff`, in the directions of the study, `(m,)`. Defaults to the best value
            of each objective so far.
        seed: Any integer.

    Raises:
        ConfigError: An argument is invalid.
    """

    def __init__(
        self,
        inner: SamplerFactory,
        weights: Sequence[float] | None = None,
        kind: Scalarisation = "sum",
        *,
        ideal: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if kind not in _SCALARISATIONS:
            raise ConfigError(
                f"scalarised: {unknown_name('kind', kind, _SCALARISATIONS)}"
            )
        self._inner = inner
        self._preference: Preference | None = None
        if weights is not None:
            self._preference = Preference(tuple(number_vector(weights)), kind)
        self._kind = kind
        self._ideal: Array | None = None
        if ideal is not None:
            self._ideal = np.asarray(ideal, dtype=float)
        self._seed = resolve_seed(seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what the inner sampler samples jointly."""
        view, view_trial = self._single_objective_view(study, trial)
        return view.sampler.infer_relative_search_space(view, view_trial)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, ParamValue]:
        """Return the inner sampler's proposal, and copy the state that it stores with its trial."""
        view, view_trial = self._single_objective_view(study, trial)
        params: dict[str, ParamValue]
        params = view.sampler.sample_relative(view, view_trial, search_space)
        updated_trial = view.get_trials(deepcopy=False)[view_trial.number]
        for key, value in updated_trial.system_attrs.items():
            set_system_attr(study, trial, key, value)
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> ParamValue:
        """Draw a parameter at random."""
        value: ParamValue
        value = random_value(self._seed, study, trial, param_name, param_distribution)
        return value

    def _single_objective_view(
        self, study: Study, trial: FrozenTrial
    ) -> tuple[Study, FrozenTrial]:
        """A copy of the study in memory with one value per trial, and `trial`'s copy in it."""
        rng = np.random.default_rng([self._seed, trial.number])
        inner_seed = int(rng.integers(2**31))
        sampler = self._inner(seed=inner_seed)
        observations = Observations.of(study)
        # Trials that violate a constraint count as failed.
        feasible = np.flatnonzero(observations.feasible)
        y = observations.y[feasible]
        values = self.scalars(y, observations.signs)
        scalars = {}
        for i, value in zip(feasible, values.tolist(), strict=True):
            number = observations.trials[i].number
            scalars[number] = value
        view = create_silent_study(sampler)
        # A storage may return the trials in another order.
        stored = study.get_trials(deepcopy=False)
        for original in sorted(stored, key=attrgetter("number")):
            scalar = scalars.get(original.number)
            copy = _copy_with_value(original, scalar)
            view.add_trial(copy)
        copies = view.get_trials(deepcopy=False)
        return view, copies[trial.number]

    def scalars(self, y: Array, signs: Array | None = None) -> Array:
        """Reduce the values of each trial to one scalar.

        Args:
            y: `(n, m)`, all maximised.
            signs: `(m,)`: -1 where the study minimises, else 1. Defaults to ones.

        Returns:
            `(n,)`, to be maximised.

        Raises:
            ConfigError: The weights or the ideal do not have m numbers.
        """
        m = y.shape[1]
        if signs is None:
            signs = np.ones(m)
        weights = self._preference.weights if self._preference else None
        vectors = {"weights": weights, "ideal": self._ideal}
        for name, vector in vectors.items():
            if vector is not None and len(vector) != m:
                raise ConfigError(
                    f"scalarised: {name}: expected {m} numbers, one per objective, "
                    f"got {len(vector)}"
                )
        preference = self._preference
        if preference is None:
            preference = Preference((1.0,) * m, self._kind)
        if not len(y):
            return np.zeros(0)
        scale = Scale.of(y)
        if self._ideal is not None:
            ideal = self._ideal * signs
            scale = Scale(ideal, divisors(ideal - y.min(0)))
        return preference.values(y, scale)


def cma(
    seed: int = 0,
    *,
    space: Space | None = None,
    start: Params | None = None,
    weights: Sequence[float] | None = None,
    kind: Scalarisation = "sum",
    sigma: float = _SIGMA,
    population_size: int | None = None,
) -> ScalarisedSampler:
    """CMA-ES (Hansen & Ostermeier 2001) on one scalar of several objectives.

    Args:
        seed: Any integer.
        space: The parameters.
        start: Where the search starts, moved inside the bounds by at least `sigma`. Defaults to the
            middle of the space.
        weights: As for `ScalarisedSampler`.
        kind: As for `ScalarisedSampler`.
        sigma: The standard deviation of the first generation in units of the ranges, in (0, 0.5].
        population_size: Defaults to 4 + 3 ln(d).

    Returns:
        The sampler.

    Raises:
        ConfigError: An argument is invalid.
    """
    if not 0 < sigma <= 0.5:
        raise ConfigError(
            f"cma: expected 0 < sigma <= 0.5, in units of the bounds, got {sigma}"
        )
    if population_size is not None and population_size < _MIN_POPULATION:
        raise ConfigError(
            f"cma: expected a population_size of {_MIN_POPULATION} or more, got {population_size}"
        )
    mean = None
    if space and start is not None:
        _check_start(space, start)
        mean = _inside(space, start, sigma)
    inner = partial(_create_cma_es, x0=mean, sigma0=sigma, popsize=population_size)
    return ScalarisedSampler(inner, weights, kind, seed=seed)


def _create_cma_es(**options: Any) -> CmaEsSampler:
    with warnings.catch_warnings():
        # Optuna 5 deprecates x0 and sigma0 without giving another way to set them.
        warnings.simplefilter("ignore", FutureWarning)
        return CmaEsSampler(warn_independent_sampling=False, **options)


def _copy_with_value(trial: FrozenTrial, value: float | None) -> FrozenTrial:
    """A copy of the trial; one that is finished but has no finite value counts as failed."""
    has_failed = value is None and trial.state.is_finished()
    try:
        return create_trial(
            state=TrialState.FAIL if has_failed else trial.state,
            value=value,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
            system_attrs=trial.system_attrs,
        )
    except ValueError:
        # Optuna evaluates an enqueued value that is out of its range, but refuses to copy it.
        return create_trial(
            state=TrialState.FAIL,
            user_attrs=trial.user_attrs,
            system_attrs=trial.system_attrs,
        )


def _check_start(space: Space, start: Params) -> None:
    if not isinstance(start, Mapping):
        raise ConfigError(
            f"cma: start: expected parameters and their values, got {shorten(start)}"
        )
    for name, value in start.items():
        if name not in space:
            raise ConfigError(f"cma: start: {unknown_name('parameter', name, space)}")
        if not isinstance(space[name], CategoricalDistribution):
            check_option(f"cma: start: {name}", 0.0, value)


def _inside(
    space: Space,
    start: Params,
    sigma: float,
) -> dict[str, float]:
    """The numbers of `start`, moved away from the bounds of the space."""
    # A bound would cut off half of the first generation.
    point: dict[str, float] = {}
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution) or distribution.single():
            continue
        assert isinstance(distribution, (FloatDistribution, IntDistribution))
        # `_check_start` has refused anything but numbers here.
        value = cast("float | None", start.get(name))
        point[name] = _move_inside(distribution, value, sigma)
    return point


def _move_inside(
    distribution: FloatDistribution | IntDistribution,
    value: float | None,
    sigma: float,
) -> float:
    """`value` at least `sigma` ranges away from the bounds; by default the middle."""
    low = _to_linear(distribution, distribution.low)
    high = _to_linear(distribution, distribution.high)
    margin = sigma * (high - low)
    if value is None:
        middle = (low + high) / 2
        value = _from_linear(distribution, middle)
    linear = _to_linear(distribution, value)
    raised = max(linear, low + margin)
    clipped = min(raised, high - margin)
    moved = _from_linear(distribution, clipped)
    if isinstance(distribution, IntDistribution):
        return round(moved)
    return moved


def _to_linear(
    distribution: FloatDistribution | IntDistribution, value: float
) -> float:
    if distribution.log:
        return float(np.log(value))
    return float(value)


def _from_linear(
    distribution: FloatDistribution | IntDistribution, value: float
) -> float:
    if distribution.log:
        return float(np.exp(value))
    return float(value)
