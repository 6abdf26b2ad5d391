"""MM-MO: multi-objective Bayesian optimisation for model merging (Li et al. 2024, arXiv 2407.00487), mended.

Three steps make a proposal: the acquisition's best points; the weak-to-strong crossing of them with evaluated elites (sec.
3.2); the Fisher filter, which of the best keeps the one that the surrogate knows least (3.3). The latter two are switches, and
off: docs/search-benchmark.md has what they bring.

The published program fits standardised objectives and leaves the reference point in raw units, so its improvement is
zero everywhere. Here both are standardised, the reference point is explicit, and scores carry their noise.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers._base import _process_constraints_after_trial
from optuna.trial import FrozenTrial, TrialState

from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.pareto.ranking import ranked
from paretomerge.search import variation as look
from paretomerge.search.encoding import Conditions, Encoding
from paretomerge.search.mmmo.acquisition import (
    Acquisition,
    Feasible,
    expected_gain,
    nothing,
    values,
)
from paretomerge.search.mmmo.surrogate import PLAIN, Shape, Surrogate
from paretomerge.search.observations import Observations, told_stderr
from paretomerge.search.options import check_kind, list_of_numbers, of_kind
from paretomerge.search.point_sampler import Archive, PointSampler

Array = NDArray[np.float64]
_WORSE = np.log(
    2
)  # the filter may choose a point of half the best one's expected gain, not a hopeless one
_FAILURE_NOISE = (
    0.1  # standard error of "it failed": as good as certain, and yet a process can bend
)


@dataclass(frozen=True)
class Settings:
    """The parts of the sampler and their constants; the paper's are those of `MMMOSampler.as_published()`.

    n_startup: trials before the first fit; what is not enqueued is drawn from a Sobol sequence.
    centre: of a study without enqueued trials, the first is the middle of the space: with many parameters it is nearer to
        everything than any point drawn.
    weak_to_strong, elites, crossover, differential: the paper's crossing, with the 5, CR = 0.5 and F = 0.5 it takes.
    fisher_filter, shortlist: of how many best candidates the filter takes the least known.
    raw_samples, restarts, steps: where the acquisition is looked at, from how many it is climbed, and how far.
    refit: hyperparameters are fitted anew when the trials have grown by this share, and kept in between.
    known_noise: trials' standard errors are used where they are told. repeatable: where they are not, a trial would come out the
        same again, so that nothing is to be gained next to it. parabola: processes with one are mixed with smooth ones,
        objective by objective, as each foresees the trials.
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
    repeatable: bool = True
    parabola: bool = True

    def __post_init__(self) -> None:
        of_kind("MMMOSampler", self)
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if isinstance(field.default, int) else 0
            if not isinstance(field.default, bool) and value < least:
                raise ConfigError(
                    f"MMMOSampler: {field.name}: expected {least} or more, got {value}"
                )
        if self.crossover > 1:
            raise ConfigError(
                f"MMMOSampler: crossover: expected a probability, got {self.crossover}"
            )


class MMMOSampler(PointSampler):
    """Expected hypervolume improvement, with MM-MO's steps as switches, for any Optuna study.

    space: the parameters, if known up front (else every parameter that finished trials had).
    conditions: name -> (categorical parent, values) pairs; under all of them the parameter counts.
    reference: worst acceptable values `(m,)` in the study's own directions; by default the worst of the first
        `reference_trials` trials less a tenth of their range: let these be the sources (`study.enqueue_trial`).
    importance: name -> relative size of what the parameter moves; its expected length-scale is divided by that.
    constraints_func: as of Optuna's samplers; `trial.set_constraint` works as well, and without it.
    settings: the fields of `Settings`.

    Standard errors of a trial's values are read from its user attribute `stderr`. Running trials count as having come
    out as predicted; failed ones teach where failures are. Every proposal is a function of the seed and of the trials
    so far: a study that is resumed goes on as if never stopped, and no point is proposed twice.
    """

    def __init__(
        self,
        seed: int | None = 0,
        *,
        space: Mapping[str, BaseDistribution] | None = None,
        conditions: Conditions | None = None,
        reference: Sequence[float] | None = None,
        reference_trials: int | None = None,
        importance: Mapping[str, float] | None = None,
        constraints_func: Callable[[FrozenTrial], Sequence[float]] | None = None,
        **settings: Any,
    ) -> None:
        known = [field.name for field in fields(Settings)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"MMMOSampler: {unknown_name('setting', name, known)}")
        self.settings = Settings(**settings)
        n_startup, centre = self.settings.n_startup, self.settings.centre
        super().__init__(
            self,
            seed=seed,
            space=space,
            conditions=conditions,
            n_startup=n_startup,
            usable=False,
            centre=centre,
        )
        self._reference = None if reference is None else _checked_reference(reference)
        self._reference_trials = reference_trials or self.settings.n_startup
        check_kind("MMMOSampler: reference_trials", 0, self._reference_trials)
        self._importance = dict(importance or {})
        for name, value in self._importance.items():
            check_kind(f"MMMOSampler: importance: {name}", 0.0, value)
            if not value > 0:
                raise ConfigError(
                    f"MMMOSampler: importance: expected positive numbers, got {value} for {name}"
                )
        self._constraints_func = constraints_func
        self._fits: dict[str, tuple[bytes, Surrogate]] = {}
        self._gain: float | None = None

    @classmethod
    def as_published(cls, seed: int = 0, **options: Any) -> "MMMOSampler":
        """The paper's constants (sec. 4.1), with units made right: 10 Sobol starts, 10 candidates from 512 raw samples, each
        crossed with the 5 elites, and of the ten best of all, the least known evaluated next.
        """
        steps = {
            "centre": False,
            "weak_to_strong": True,
            "fisher_filter": True,
            "shortlist": 10,
            "repeatable": False,
        }
        constants = {"raw_samples": 512, "restarts": 10, "refit": 0.0} | steps
        return cls(seed, **(constants | options))

    def expected_gain(self, study: Study) -> float | None:
        """What the last proposal was expected to add to the hypervolume, as a share of it; None while that is unknown_name."""
        return self._gain

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """ConfigError for standard errors that mean nothing, at the trial that has them."""
        told_stderr(trial, len(study.directions))
        if self._constraints_func is not None:
            _process_constraints_after_trial(self._constraints_func, study, trial, state)

    def propose(self, archive: Archive, rng: np.random.Generator) -> Array:
        """New points `(k, d)` to evaluate next, the best first."""
        encoding, seen, x = archive.encoding, archive.observations, archive.x
        self._gain = None
        if seen.complete.sum() < 2:
            return x[:0]
        reference = self._reference_point(seen)
        surrogate, front, elites = self._believe(archive, reference)
        gain_of = (
            expected_gain(surrogate, front, reference) if len(archive.usable) else nothing
        )  # first find what is allowed
        acquisition = self._feasible(gain_of, seen, x)
        points = encoding.settle(self._search(encoding, acquisition, elites, rng))
        points = points[archive.is_new(points)]
        if not len(points):
            return points
        gain = values(acquisition, points)
        short = np.argsort(-gain, kind="stable")
        if self.settings.fisher_filter:
            short = short[: self.settings.shortlist]
            short = short[gain[short] > gain[short[0]] - _WORSE]
            information = (surrogate.scale**2 / surrogate.predict(points[short])[1] ** 2).sum(
                1
            )  # Li et al. 2024, sec. 3.3
            short = short[np.argsort(information, kind="stable")]
        self._gain = _relative(gain[short[0]], surrogate, front, reference)
        return np.asarray(points[short])

    def _believe(self, archive: Archive, reference: Array) -> tuple[Surrogate, Array, Array]:
        """The surrogate, the front that it believes in, `(k, m)`, and the elites among `x`, `(e, d)`: while no trial is allowed, those
        that break the least.

        The posterior mean stands for the noisy scores, so a lucky score does not become the front. Running trials count
        as having come out as predicted (Ginsbourger et al. 2010).
        """
        seen, x, pending = archive.observations, archive.x, archive.pending
        done = seen.complete
        y = seen.y[done]
        stderr = (
            seen.stderr[done] if seen.stderr is not None and self.settings.known_noise else None
        )
        weights, repeatable = self._weights(archive.encoding), self.settings.repeatable
        shapes = [
            Shape(weights, parabola, repeatable)
            for parabola in ((True, False) if self.settings.parabola else (False,))
        ]
        surrogate = self._fit("objectives", x[done], y, stderr, shapes)
        expected = surrogate.predict(x)[0]
        good = archive.usable
        order = (
            good[ranked(expected[good], reference)]
            if len(good)
            else np.argsort(seen.violation, kind="stable")
        )
        elites = order[: self.settings.elites]
        if len(pending):
            imagined = surrogate.predict(pending)[0]
            noise = (
                None
                if stderr is None
                else np.concatenate([stderr, 0 * stderr[:1].repeat(len(imagined), axis=0)])
            )  # NaN stays
            everything = np.concatenate([x[done], pending]), np.concatenate([y, imagined]), noise
            surrogate = surrogate.again(*everything)
        front = (
            surrogate.predict(np.concatenate([x[good], pending]))[0]
            if len(good) + len(pending)
            else expected[:0]
        )
        return surrogate, front[nondominated(front)], x[elites]

    def _feasible(self, inner: Acquisition, seen: Observations, x: Array) -> Acquisition:
        """`inner` where it can be had: constraints and failures are outcomes with models of their own."""
        told = ~np.isnan(seen.constraints).any(1) & seen.complete
        constraints = success = None
        if seen.constraints.shape[1] and told.sum() >= 2:
            constraints = self._fit("constraints", x[told], seen.constraints[told], None)
        if not seen.complete.all():
            labels = seen.complete[:, None].astype(float)
            success = self._fit("success", x, labels, np.full(labels.shape, _FAILURE_NOISE))
        return Feasible(inner, constraints, success) if constraints or success else inner

    def _search(
        self, encoding: Encoding, acquisition: Acquisition, elites: Array, rng: np.random.Generator
    ) -> Array:
        """Candidates from everywhere, climbed, switched and crossed; not in order."""
        s = self.settings
        raw = look.scatter(encoding, elites, s.raw_samples, rng)
        start = raw[np.argsort(-values(acquisition, raw), kind="stable")[: s.restarts]]
        points = look.climb(encoding, acquisition, start, s.steps)
        if encoding.discrete.any():
            switched = look.switch(encoding, acquisition, encoding.settle(points), rng)
            points = np.concatenate([points, look.climb(encoding, acquisition, switched, s.steps)])
        if s.weak_to_strong:
            points = np.concatenate(
                [points, look.cross(points, elites, s.crossover, s.differential, rng)]
            )
        return points

    def _fit(
        self,
        what: str,
        x: Array,
        y: Array,
        stderr: Array | None,
        shapes: Sequence[Shape] = (PLAIN,),
    ) -> Surrogate:
        """A surrogate whose shape and hyperparameters come from the first of the trials, as many as the last refit had.

        The number depends on n alone, so that a resumed study fits to the same ones.
        """
        n = len(y)
        step = max(1, int(n * self.settings.refit))
        first = max(2, n - n % step)
        noise = None if stderr is None else stderr[:first]
        told = [a for a in (x[:first], y[:first], noise, shapes[0].importance) if a is not None]
        key = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in told)).digest()
        if what not in self._fits or self._fits[what][0] != key:
            self._fits[what] = key, Surrogate.average(x[:first], y[:first], noise, shapes)
        return self._fits[what][1].again(x, y, stderr)

    def _weights(self, encoding: Encoding) -> Array | None:
        """Importance per coordinate, with a geometric mean of 1 over those that have one."""
        known = {
            name: float(self._importance[name])
            for name in encoding.columns
            if name in self._importance
        }
        if not known:
            return None
        centre = np.exp(np.mean(np.log(list(known.values()))))
        weights = np.ones(encoding.d)
        for name, value in known.items():
            weights[encoding.columns[name]] = value / centre
        return weights

    def _reference_point(self, seen: Observations) -> Array:
        if self._reference is None:
            first = seen.y[: self._reference_trials][seen.complete[: self._reference_trials]]
            return reference_point(first if len(first) else seen.y[seen.complete])
        if len(self._reference) != len(seen.signs):
            raise ConfigError(
                f"reference: expected {len(seen.signs)} numbers, one per objective, got {len(self._reference)}"
            )
        return np.asarray(self._reference * seen.signs)


def _checked_reference(reference: Sequence[float]) -> Array:
    given = list_of_numbers(reference)
    if not len(given) or not np.isfinite(given).all():
        raise ConfigError(
            f"reference: expected a list of finite numbers, one per objective, got {shorten(reference)}"
        )
    return given


def _relative(
    log_gain: float, surrogate: Surrogate, front: Array, reference: Array
) -> float | None:
    """Expected gain over the hypervolume of the front, in the standardised units of both; None above nothing."""
    volume = (
        hypervolume(surrogate.standardise(front), surrogate.standardise(reference))
        if len(front)
        else 0.0
    )
    return float(np.exp(log_gain) / volume) if volume > 0 else None
