"""`MMMOSampler`: MM-MO (Li et al. 2024, arXiv 2407.00487) with corrections, as an Optuna sampler.

The published program standardises the objectives but leaves the reference point in raw units, so
its improvement is zero everywhere. Here both are standardised, the reference point is explicit, and
the surrogate knows the noise of the scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.pareto.preference import MEAN, Prefer, Preference
from paretomerge.search._optuna import ConstraintsFunction, store_constraints
from paretomerge.search.encoding import Space
from paretomerge.search.mmmo.proposer import MMMOProposer, Settings
from paretomerge.search.observations import reported_stderr
from paretomerge.search.options import check_option, number_vector
from paretomerge.search.point_sampler import PointSampler
from paretomerge.types import Array, Conditions

__all__ = ["MMMOSampler", "Settings"]


class MMMOSampler(PointSampler):
    """Multi-objective Bayesian optimisation for expensive, noisy objectives.

    An Optuna sampler for 1 to 6 objectives and any search space: floats, integers, categorical and
    conditional parameters. It fits Gaussian processes to the trials and proposes the point of
    greatest expected hypervolume improvement.

    - Standard errors of a trial's values are read from its user attribute `stderr`: one number per
      objective, None where it is not known.
    - Running trials count as if they had given the predicted values, so parallel trials differ.
    - Failed and pruned trials teach the sampler where trials fail.
    - Constraints (`trial.set_constraint` or `constraints_func`) have models of their own.
    - Every proposal is a function of the seed and the trials so far: a resumed study goes on as if
      it had not stopped. No point is proposed twice.

    Example:
        >>> import optuna
        >>> from paretomerge import MMMOSampler
        >>> def objective(trial):
        ...     x = trial.suggest_float("x", 0, 1)
        ...     y = trial.suggest_float("y", 0, 1)
        ...     trial.set_user_attr("stderr", [0.01, 0.01])
        ...     return x - (y - 0.5) ** 2, 1 - x**2 - (y - 0.5) ** 2
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> sampler = MMMOSampler(seed=0, n_startup=4, reference=[0, 0])
        >>> study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
        >>> study.optimize(objective, n_trials=6)
        >>> len(study.trials)
        6

    Args:
        seed: Any integer; None draws one.
        space: Parameter -> distribution, if it is known in advance. By default, the parameters that
            all finished trials have; new ones are drawn at random.
        conditions: Parameter -> pairs (parent, values): the parameter is active only where each
            parent, categorical or an integer, is active and has one of its values. By default they
            are inferred from the trials.
        reference: The worst acceptable value of each objective, in the study's own directions: only
            points that are better in all of them count. By default, the worst values of the first
            `reference_trials` trials, less a tenth of their range.
        reference_trials: Number of trials that define the default reference point; by default
            `n_startup`. Enqueue trials that you know (`study.enqueue_trial`) to make it meaningful.
        importance: Parameter -> how much it matters, relative to the others. The prior
            length-scale is divided by it.
        prefer: What you want: a weight for each objective, or `mean`. Proposals then improve it,
            after `prefer_after` trials that improve the front.
        constraints_func: As in Optuna's samplers: it takes a finished trial and returns numbers
            that are at most 0 where the trial is feasible.
        **settings: Fields of `Settings`, such as `n_startup`, `raw_samples`, `weak_to_strong` or
            `fisher_filter`; see docs/samplers.md.

    Raises:
        ConfigError: An argument has a wrong type or an unknown name.

    Source:
        MM-MO: Li et al. 2024, arXiv 2407.00487. Expected hypervolume improvement: Yang et al. 2019;
        Daulton et al. 2021; in logarithms, Ament et al. 2023. Running trials: the "Kriging
        believer", Ginsbourger et al. 2010. Constraints: Gardner et al. 2014.
    """

    def __init__(
        self,
        seed: int | None = 0,
        *,
        space: Space | None = None,
        conditions: Conditions | None = None,
        reference: Sequence[float] | None = None,
        reference_trials: int | None = None,
        importance: Mapping[str, float] | None = None,
        prefer: Prefer | None = None,
        constraints_func: ConstraintsFunction | None = None,
        **settings: Any,
    ) -> None:
        self.settings = _settings(settings)
        # As given: `study_yaml` leaves out what the user has not set.
        reference_trials_option = reference_trials
        reference_trials = reference_trials or self.settings.n_startup
        check_option("MMMOSampler: reference_trials", 0, reference_trials)
        self._mmmo = MMMOProposer(
            self.settings,
            _checked_reference(reference),
            reference_trials,
            _checked_importance(importance or {}),
            _checked_preference(prefer),
        )
        super().__init__(
            self._mmmo,
            seed=seed,
            space=space,
            conditions=conditions,
            n_startup=self.settings.n_startup,
            # While no trial is feasible, the proposer searches for a feasible point.
            require_feasible=False,
            centre=self.settings.centre,
        )
        self._constraints_func = constraints_func
        self._options = {
            "seed": seed,
            "reference": None if reference is None else list(reference),
            "reference_trials": reference_trials_option,
            "importance": dict(importance) if importance else None,
            "prefer": prefer if prefer is None or prefer == MEAN else list(prefer),
            **settings,
        }
        # A study gives the sampler its own space, and a YAML file cannot hold a function.
        given = (space, conditions, constraints_func)
        self._is_bound = any(value is not None for value in given)

    @property
    def parameter_names(self) -> set[str]:
        """The parameters that the arguments `space` and `importance` name."""
        return {*(self._space or {}), *(self._options["importance"] or {})}

    @property
    def study_yaml(self) -> dict[str, Any] | None:
        """The sampler as the `sampler:` section of a study.yaml.

        A study gives such a sampler its own search space. None if the sampler has a space or a
        constraints function already: then a study uses it as it is.
        """
        if self._is_bound:
            return None
        options = {}
        for name, value in self._options.items():
            if value is not None:
                options[name] = value
        return {"name": "mmmo", **options}

    @classmethod
    def as_published(cls, seed: int = 0, **options: Any) -> "MMMOSampler":
        """The constants of the paper (Li et al. 2024, sec. 4.1), with consistent units.

        The first 10 points are Sobol points. After them, each proposal has 10 candidates from 512
        raw samples, crosses them with the 5 elites, and takes the most uncertain one of the 10
        best.

        Args:
            seed: Any integer.
            **options: Other arguments of `MMMOSampler`; they override the paper's constants.
        """
        published = {
            "centre": False,
            "weak_to_strong": True,
            "fisher_filter": True,
            "shortlist": 10,
            "deterministic": False,
            "raw_samples": 512,
            "restarts": 10,
            "refit": 0.0,
        }
        return cls(seed, **(published | options))

    def expected_gain(self, study: Study) -> float | None:
        """The expected hypervolume improvement of the last proposal.

        Returns:
            The improvement as a share of the hypervolume so far; None while it is unknown.
        """
        return self._mmmo.expected_gain

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Check the standard errors of a finished trial and store its constraints.

        Raises:
            ConfigError: The user attribute `stderr` is not a list of one number per objective.
        """
        reported_stderr(trial, len(study.directions))
        if self._constraints_func is not None:
            store_constraints(self._constraints_func, study, trial, state)


def _settings(options: Mapping[str, Any]) -> Settings:
    names = [field.name for field in fields(Settings)]
    for name in options:
        if name not in names:
            raise ConfigError(f"MMMOSampler: {unknown_name('setting', name, names)}")
    return Settings(**options)


def _checked_importance(importance: Mapping[str, float]) -> dict[str, float]:
    for name, value in importance.items():
        check_option(f"MMMOSampler: importance: {name}", 0.0, value)
        # Written so that NaN is an error, too.
        if not value > 0:
            raise ConfigError(
                f"MMMOSampler: importance: expected positive numbers, got {value} for {name}"
            )
    return dict(importance)


def _checked_preference(prefer: Prefer | None) -> Prefer | None:
    if prefer is None or prefer == MEAN:
        return prefer
    return Preference(tuple(number_vector(prefer))).weights


def _checked_reference(reference: Sequence[float] | None) -> Array | None:
    if reference is None:
        return None
    numbers = number_vector(reference)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ConfigError(
            "reference: expected a list of finite numbers, one per objective, "
            f"got {shorten(reference)}"
        )
    return numbers
