"""One proposal of MM-MO: surrogate, acquisition, search for its maximum, filter.

The steps of a proposal, in `MMMOProposer.propose`: the points of greatest expected hypervolume
improvement; their weak-to-strong crossing with evaluated elites (Li et al. 2024, sec. 3.2); the
Fisher filter, which takes the most uncertain one of the best points (sec. 3.3). The last two are
off by default: docs/lab/search-benchmark.md has their measured effect.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.random import Generator

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.pareto.preference import MEAN, Prefer, Preference, Scale
from paretomerge.pareto.ranking import ranked, representative
from paretomerge.search.encoding import Encoding, Indices
from paretomerge.search.mmmo import candidates
from paretomerge.search.mmmo.acquisition import (
    Acquisition,
    FeasibilityWeighted,
    evaluate,
    log_ehvi,
    log_preference_ei,
    zero,
)
from paretomerge.search.mmmo.surrogate import DEFAULT_KERNEL, KernelSpec, Surrogate
from paretomerge.search.observations import Observations, count_own
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive
from paretomerge.types import Array

# The Fisher filter may take a point of half the best one's expected improvement, not of less.
_MAX_LOG_LOSS = np.log(2)
# Standard error of "the trial failed": nearly certain, but a process needs some slack.
_SUCCESS_STDERR = 0.1
# The longest study whose hyperparameters are fitted to all trials.
_MOST_FITTED = 300


@dataclass(frozen=True)
class Settings:
    """The settings of `MMMOSampler`; `MMMOSampler.as_published()` has those of the paper.

    Attributes:
        n_startup: Trials before the first fit. Those that are not enqueued are Sobol points.
        centre: Whether the first trial, if it is not enqueued, is the centre of the space, which
            with many parameters is nearer to every point than a random one.
        weak_to_strong: Whether candidates are crossed with elites (Li et al. 2024, sec. 3.2).
        elites: Number of best trials to cross with and to start the search near.
        crossover: CR, the probability that a coordinate is crossed.
        differential: F, the weight of the difference of two elites.
        fisher_filter: Whether the surrogate's uncertainty chooses among the best candidates (Li et
            al. 2024, sec. 3.3).
        shortlist: Number of candidates that the Fisher filter chooses from.
        raw_samples: Points at which the acquisition is evaluated first.
        restarts: Number of those from which it is maximised.
        steps: Greatest number of L-BFGS-B iterations of each.
        refit: The hyperparameters are fitted again when the number of trials has grown by this
            share. 0 fits them at every trial.
        known_noise: Whether the standard errors that trials report are used.
        deterministic: Whether a trial without a standard error counts as one that would give the
            same values again, so that repeating it or its surroundings improves nothing.
        quadratic_trend: Whether a process with a quadratic trend is mixed with a smooth one, each
            weighted by how well it predicts left-out trials.
        prefer_after: Trials before the first proposal that improves the preference, if there is
            one; until then proposals improve the front.

    Raises:
        ConfigError: A setting has a wrong type or lies outside its range.
    """

    n_startup: int = 10
    centre: bool = True
    weak_to_strong: bool = False
    elites: int = 5
    crossover: float = 0.5
    differential: float = 0.5
    fisher_filter: bool = False
    shortlist: int = 3
    raw_samples: int = 256
    restarts: int = 6
    steps: int = 20
    refit: float = 0.1
    known_noise: bool = True
    deterministic: bool = True
    quadratic_trend: bool = True
    prefer_after: int = 0

    def __post_init__(self) -> None:
        check_options("MMMOSampler", self)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                continue
            # Whole numbers are counts; only one whose default is 0 may be 0.
            is_positive_count = isinstance(field.default, int) and field.default > 0
            least = 1 if is_positive_count else 0
            if value < least:
                raise ConfigError(
                    f"MMMOSampler: {field.name}: expected {least} or more, got {value}"
                )
        if self.crossover > 1:
            raise ConfigError(
                f"MMMOSampler: crossover: expected a probability, got {self.crossover}"
            )


@dataclass(frozen=True)
class _ObjectiveModel:
    """The model of the objectives at one proposal.

    Attributes:
        surrogate: Predicts them.
        predicted: `(k, m)`, the predictions at usable and running trials, in units of y.
        elites: `(e, d)`, the points of the best trials.
    """

    surrogate: Surrogate
    predicted: Array
    elites: Array

    @property
    def front(self) -> Array:
        """The nondominated predictions `(f, m)`."""
        return self.predicted[nondominated(self.predicted)]


_Fit = tuple[bytes, Surrogate]
"""The digest of the trials of a fit, and the fit."""


class MMMOProposer:
    """Proposes the points of greatest expected hypervolume improvement.

    Args:
        settings: The parts and constants.
        reference: `(m,)`, the reference point in the study's own directions; None to take the worst
            values of the first trials.
        reference_trials: Number of those trials.
        importance: Parameter -> relative importance.
        prefer: What the user wants: weights `(m,)` of the objectives, or `mean`. Proposals after
            `prefer_after` trials improve it.

    Attributes:
        expected_gain: The expected hypervolume improvement of the last proposal, as a share of the
            hypervolume so far; None if it is unknown.
    """

    def __init__(
        self,
        settings: Settings,
        reference: Array | None,
        reference_trials: int,
        importance: Mapping[str, float],
        prefer: Prefer | None = None,
    ) -> None:
        self.expected_gain: float | None = None
        self._settings = settings
        self._reference = reference
        self._reference_trials = reference_trials
        self._importance = importance
        self._prefer = prefer
        # By the name of the model. A fit is expensive, so it is repeated only for other trials.
        self._fits: dict[str, _Fit] = {}

    def propose(self, archive: Archive, rng: Generator) -> Array:
        """New points `(k, d)`, the best first."""
        self.expected_gain = None
        # One trial has no standard deviation to standardise by.
        if archive.observations.complete.sum() < 2:
            return archive.x[:0]
        reference = self._reference_point(archive.observations)
        model = self._model_objectives(archive, reference)
        improvement: Acquisition = zero
        # While no trial is feasible, only the probability of being feasible counts.
        if len(archive.usable):
            improvement = log_ehvi(model.surrogate, model.front, reference)
        acquisition = self._with_feasibility(improvement, archive)
        improves_front = True
        if len(archive.usable) and self._improves_preference(archive.observations):
            target = self._preference_improvement(model)
            acquisition = self._with_feasibility(target, archive)
            improves_front = False
        maxima = self._search(archive.encoding, acquisition, model.elites, rng)
        points = archive.encoding.project(maxima)
        is_new = archive.is_new(points)
        points = points[is_new]
        if not len(points):
            return points
        values = evaluate(acquisition, points)
        # Stable sorts throughout: ties must not depend on the platform.
        order: Indices = np.argsort(-values, kind="stable")
        if self._settings.fisher_filter:
            order = self._least_informed(points, values, order, model.surrogate)
        ordered: Array = points[order]
        # A proposal for the preference says nothing of what the front has left to gain.
        if improves_front:
            best_value = values[order[0]]
            self.expected_gain = _relative_improvement(best_value, model, reference)
        return ordered

    def _improves_preference(self, observations: Observations) -> bool:
        """Whether the next proposal improves the preference, by the number of trials before it."""
        if self._prefer is None:
            return False
        before = count_own([*observations.trials, *observations.running])
        return before >= self._settings.prefer_after

    def _preference_improvement(self, model: _ObjectiveModel) -> Acquisition:
        """Log expected improvement of the preference's value over the predicted ones."""
        m = model.predicted.shape[1]
        preference = Preference.mean(m)
        if self._prefer is not None and self._prefer != MEAN:
            preference = Preference(tuple(self._prefer))
        if len(preference.weights) != m:
            raise ConfigError(
                f"prefer: expected {m} numbers, one per objective, got {len(preference.weights)}"
            )
        scale = Scale.of(model.front)
        best = float(preference.values(model.predicted, scale).max())
        return log_preference_ei(model.surrogate, preference, scale, best)

    def _model_objectives(self, archive: Archive, reference: Array) -> _ObjectiveModel:
        """Fit the objectives and predict the front.

        The posterior mean stands for the noisy scores, so a lucky score does not become the front.
        While no trial is feasible, the elites are those that violate the constraints least.
        """
        observations = archive.observations
        complete = observations.complete
        x = archive.x[complete]
        y = observations.y[complete]
        stderr = None
        if self._settings.known_noise and observations.stderr is not None:
            stderr = observations.stderr[complete]
        kernels = self._kernels(archive.encoding)
        surrogate = self._fit("objectives", x, y, stderr, kernels)

        usable = archive.usable
        predicted, _ = surrogate.predict(archive.x)
        if len(usable):
            ranking = ranked(predicted[usable], reference)
            order = usable[ranking]
        else:
            order = np.argsort(observations.violation, kind="stable")
        best = order[: self._settings.elites]
        elites = archive.x[best]

        if len(archive.pending):
            surrogate = _with_pending(surrogate, archive.pending, x, y, stderr)
        usable_points = archive.x[usable]
        front_points = np.concatenate([usable_points, archive.pending])
        # None yet, where no trial is feasible.
        front_predicted = predicted[:0]
        if len(front_points):
            front_predicted, _ = surrogate.predict(front_points)
        return _ObjectiveModel(surrogate, front_predicted, elites)

    def _kernels(self, encoding: Encoding) -> list[KernelSpec]:
        """The kernels that are mixed for the objectives."""
        importance = self._coordinate_importance(encoding)
        deterministic = self._settings.deterministic
        smooth = KernelSpec(
            importance, quadratic_trend=False, deterministic=deterministic
        )
        if not self._settings.quadratic_trend:
            return [smooth]
        quadratic = KernelSpec(
            importance, quadratic_trend=True, deterministic=deterministic
        )
        return [quadratic, smooth]

    def _with_feasibility(
        self, improvement: Acquisition, archive: Archive
    ) -> Acquisition:
        """The acquisition with models of the constraints and of failures, where there are any."""
        observations, x = archive.observations, archive.x
        constraints = success = None
        values = observations.constraints
        has_missing = np.isnan(values).any(1)
        reported = ~has_missing & observations.complete
        if values.shape[1] and reported.sum() >= 2:
            violations = values[reported]
            x_reported = x[reported]
            constraints = self._fit("constraints", x_reported, violations, None)
        # Failures are an outcome of 1 or 0 with a process of its own, over all trials.
        if not observations.complete.all():
            completed = observations.complete[:, None].astype(float)
            stderr = np.full(completed.shape, _SUCCESS_STDERR)
            success = self._fit("success", x, completed, stderr)
        if constraints is None and success is None:
            return improvement
        return FeasibilityWeighted(improvement, constraints, success)

    def _search(
        self,
        encoding: Encoding,
        acquisition: Acquisition,
        elites: Array,
        rng: Generator,
    ) -> Array:
        """Candidates `(k, d)` that maximise the acquisition locally, in no order."""
        settings = self._settings
        raw = candidates.scatter(encoding, elites, settings.raw_samples, rng)
        values = evaluate(acquisition, raw)
        order = np.argsort(-values, kind="stable")
        best = order[: settings.restarts]
        start = raw[best]
        points = candidates.climb(encoding, acquisition, start, settings.steps)
        # Gradients cannot change discrete parameters, so they are switched in turn after the climb.
        if encoding.discrete.any():
            projected = encoding.project(points)
            switched = candidates.switch(encoding, acquisition, projected, rng)
            climbed = candidates.climb(encoding, acquisition, switched, settings.steps)
            points = np.concatenate([points, climbed])
        if settings.weak_to_strong:
            children = candidates.cross(
                points, elites, settings.crossover, settings.differential, rng
            )
            points = np.concatenate([points, children])
        return points

    def _least_informed(
        self,
        points: Array,
        values: Array,
        order: Indices,
        surrogate: Surrogate,
    ) -> Indices:
        """Fisher information filter: of the best points, those with the least information first.

        Source: Li et al. 2024, sec. 3.3: the information at a point is the sum over objectives of
        1 / sigma^2, here of standardised objectives.
        """
        shortlist = order[: self._settings.shortlist]
        shortlisted_values = values[shortlist]
        least_value = shortlisted_values[0] - _MAX_LOG_LOSS
        promising = shortlisted_values > least_value
        shortlist = shortlist[promising]
        shortlisted = points[shortlist]
        _, std = surrogate.predict(shortlisted)
        precision = surrogate.y_std**2 / std**2
        information = precision.sum(1)
        order_of_information = np.argsort(information, kind="stable")
        least_first: Indices = shortlist[order_of_information]
        return least_first

    def _fit(
        self,
        name: str,
        x: Array,
        y: Array,
        stderr: Array | None,
        kernels: Sequence[KernelSpec] = (DEFAULT_KERNEL,),
    ) -> Surrogate:
        """A surrogate of all trials with the hyperparameters of the last refit.

        A refit takes the first trials. Their number depends on n alone, so a resumed study has the
        same hyperparameters.

        Args:
            name: Which model it is.
            x: `(n, d)`.
            y: `(n, m)`.
            stderr: `(n, m)`, or None.
            kernels: The priors to mix.
        """
        n = len(y)
        # With refit = 0.1 and n = 37, step is 3, and the last refit was at 36 trials.
        share = self._settings.refit
        step = max(1, int(n * share))
        first = max(2, n - n % step)
        x_first = x[:first]
        y_first = y[:first]
        noise = None
        if stderr is not None:
            noise = stderr[:first]
        digest = _digest(x_first, y_first, noise, kernels[0].importance)
        last_digest, surrogate = self._fits.get(name, (b"", None))
        if surrogate is None or last_digest != digest:
            # Of a long study a few hundred trials determine the hyperparameters: a fit costs the
            # cube of its trials, and all of them count as data below.
            fitted = representative(y_first, _MOST_FITTED)
            fitted_noise = None if noise is None else noise[fitted]
            surrogate = Surrogate.fit_mixture(
                x_first[fitted], y_first[fitted], fitted_noise, kernels
            )
            self._fits[name] = digest, surrogate
        return surrogate.with_trials(x, y, stderr)

    def _coordinate_importance(self, encoding: Encoding) -> Array | None:
        """Importance per coordinate `(d,)`, scaled to a geometric mean of 1 over the parameters."""
        importance = {}
        for name in encoding.columns:
            if name in self._importance:
                importance[name] = float(self._importance[name])
        if not importance:
            return None
        log_importance = np.log(list(importance.values()))
        geometric_mean = np.exp(np.mean(log_importance))
        weights = np.ones(encoding.d)
        for name, value in importance.items():
            columns = encoding.columns[name]
            weights[columns] = value / geometric_mean
        return weights

    def _reference_point(self, observations: Observations) -> Array:
        """The reference point `(m,)`, all objectives maximised."""
        if self._reference is None:
            y = observations.y
            complete = observations.complete
            first = slice(self._reference_trials)
            y_first = y[first][complete[first]]
            # All of the first trials may have failed.
            if not len(y_first):
                y_first = y[complete]
            return reference_point(y_first)
        m = len(observations.signs)
        if len(self._reference) != m:
            raise ConfigError(
                f"reference: expected {m} numbers, one per objective, got {len(self._reference)}"
            )
        return np.asarray(self._reference * observations.signs)


def _with_pending(
    surrogate: Surrogate, pending: Array, x: Array, y: Array, stderr: Array | None
) -> Surrogate:
    """The surrogate as if running trials had given the predicted values (Kriging believer).

    Source: Ginsbourger et al. 2010.
    """
    predicted, _ = surrogate.predict(pending)
    if stderr is not None:
        # Times 0, so that the column of an objective without standard errors stays NaN.
        first_row = stderr[:1]
        exact = 0 * first_row.repeat(len(predicted), axis=0)
        stderr = np.concatenate([stderr, exact])
    every_x = np.concatenate([x, pending])
    every_y = np.concatenate([y, predicted])
    return surrogate.with_trials(every_x, every_y, stderr)


def _relative_improvement(
    log_improvement: float, model: _ObjectiveModel, reference: Array
) -> float | None:
    """The improvement over the hypervolume of the front; None where that is 0."""
    if not len(model.front):
        return None
    # The improvement is in standardised units, so the volume must be, too.
    standardise = model.surrogate.standardise
    front = standardise(model.front)
    volume = hypervolume(front, standardise(reference))
    if volume > 0:
        improvement = np.exp(log_improvement)
        return float(improvement / volume)
    return None


def _digest(*arrays: Array | None) -> bytes:
    """A digest of the arrays that are not None."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            contiguous = np.ascontiguousarray(array)
            digest.update(contiguous.tobytes())
    return digest.digest()
