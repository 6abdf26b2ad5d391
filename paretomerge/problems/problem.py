"""A test problem: an objective function for Optuna whose Pareto front's hypervolume is known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import hypervolume, nondominated
from paretomerge.types import Array, Conditions, Params, ParamValue

N_EXAMPLES = 200
"""Test examples behind a noisy value, unless a problem is asked for another number."""

Noise = Callable[[Array, np.random.Generator], tuple[Array, Array]]
"""True values `(m,)` and a generator -> observed values `(m,)` and their standard errors `(m,)`."""


@dataclass(frozen=True)
class Problem:
    """m objectives over a search space; an instance is an objective for `optuna.Study.optimize`.

    All objectives are maximised; functions that the literature minimises are negated.

    Attributes:
        name: what `problems.get` calls it.
        space: parameter name -> Optuna distribution.
        evaluate: n parameter sets -> true values `(n, m)`, without noise.
        reference_point: `(m,)`, in the units of the values; the hypervolume is measured above it.
        ideal_point: `(m,)`, the best value of each objective on the true front.
        front_hypervolume: hypervolume of the true Pareto front above the reference point.
        noise: turns true values into observed ones; None if the observed values are exact.
        conditions: parameter -> (parent, values) pairs. The parameter is active where each parent
            has one of its values.
        starts: parameter sets that a search evaluates first, such as each model alone. They are
            for `study.enqueue_trial`, and count as evaluations.
        seed: of the noise.
    """

    name: str
    space: Mapping[str, BaseDistribution]
    evaluate: Callable[[Sequence[Params]], Array]
    reference_point: Array
    ideal_point: Array
    front_hypervolume: float
    noise: Noise | None = None
    conditions: Conditions = field(default_factory=dict)
    starts: Sequence[Params] = ()
    seed: int = 0

    @property
    def n_objectives(self) -> int:
        """The number of objectives, m."""
        return len(self.reference_point)

    @property
    def directions(self) -> list[Literal["maximize"]]:
        """One direction per objective, for `optuna.create_study`."""
        return ["maximize"] * self.n_objectives

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """Suggest the active parameters, and observe their values.

        Where the problem is noisy, the trial's user attribute `stderr` holds the standard errors.

        Args:
            trial: a running trial of a study with `directions`.

        Returns:
            The m observed values.
        """
        params = self._suggest(trial)
        values, stderr = self.observe(params, trial.number)
        if stderr is not None:
            trial.set_user_attr("stderr", stderr.tolist())
        # Plain floats: Optuna stores no NumPy numbers.
        return tuple(values.tolist())

    def observe(self, params: Params, number: int = 0) -> tuple[Array, Array | None]:
        """Observe one parameter set once.

        Args:
            params: one value per active parameter.
            number: of the evaluation. The noise depends on it and on `seed` alone, so that a
                search is repeatable, and all searches meet the same noise.

        Returns:
            Observed values `(m,)` and their standard errors `(m,)`, or None where they are exact.
        """
        true_values = self.evaluate([params])[0]
        if self.noise is None:
            return true_values, None
        # Seeded per trial: one shared stream would give a resumed or parallel search other noise.
        rng = np.random.default_rng([self.seed, number])
        return self.noise(true_values, rng)

    def hypervolume(self, study: optuna.Study) -> float:
        """The share of the true front's hypervolume that a study has reached.

        The share is computed from the true values, without noise (see `hypervolume_share`).

        Args:
            study: a study of this problem. Only its complete trials count.

        Returns:
            0 to 1 (above 1 only where the known front is itself a numerical one).
        """
        # Failed and running trials have no values.
        complete = (TrialState.COMPLETE,)
        trials = study.get_trials(deepcopy=False, states=complete)
        if not trials:
            return 0.0
        params = [trial.params for trial in trials]
        values = [trial.values for trial in trials]
        # The user chooses from the front that the noisy values show, and gets the true ones.
        true_values = self.evaluate(params)
        return self.hypervolume_share(true_values, np.array(values))

    def hypervolume_share(
        self, true_values: Array, observed: Array | None = None
    ) -> float:
        """Share of the true front's hypervolume, by the TRUE values of the OBSERVED front.

        This is what a user gets who chooses from the front that noisy scores show.

        Args:
            true_values: `(n, m)`.
            observed: `(n, m)`; None: the true values.

        Returns:
            0 to 1.
        """
        if observed is None:
            observed = true_values
        # Noise may put dominated points on the observed front; they add nothing to the volume.
        is_chosen = nondominated(observed)
        front = true_values[is_chosen]
        volume = hypervolume(front, self.reference_point)
        return volume / self.front_hypervolume

    def as_accuracies(self, n_examples: int = N_EXAMPLES) -> "Problem":
        """The same problem with each objective measured as an accuracy over some test examples.

        The accuracy is 1 at the ideal point, 1/2 at the reference point, and clipped to 0 as far
        beyond the reference point again.

        Args:
            n_examples: per value; see `binomial`.

        Returns:
            A noisy problem with values between 0 and 1.
        """
        # Twice the distance, so that the reference point has accuracy 1/2 and not 0: a search can
        # still compare the points below it.
        span = 2 * (self.ideal_point - self.reference_point)

        def evaluate(params: Sequence[Params]) -> Array:
            shortfall = self.ideal_point - self.evaluate(params)
            return np.clip(1 - shortfall / span, 0.0, 1.0)

        ones = np.ones(self.n_objectives)
        # An affine map divides every volume above the reference point by the product of the spans.
        volume = self.front_hypervolume / float(np.prod(span))
        return replace(
            self,
            evaluate=evaluate,
            reference_point=ones / 2,
            ideal_point=ones,
            front_hypervolume=volume,
            noise=partial(binomial, n_examples=n_examples),
        )

    def _suggest(self, trial: optuna.Trial) -> dict[str, ParamValue]:
        params: dict[str, ParamValue] = {}
        for name, distribution in self.space.items():
            # A parent stands before its children in `space`, so its value is already set.
            parents = self.conditions.get(name, ())
            is_active = True
            for parent, values in parents:
                # An inactive parent has no value, so its children are inactive too.
                if params.get(parent) not in values:
                    is_active = False
            if is_active:
                params[name] = _suggest_one(trial, name, distribution)
        return params


def binomial(
    accuracy: Array, rng: np.random.Generator, n_examples: int = N_EXAMPLES
) -> tuple[Array, Array]:
    """The accuracy that is observed on some test examples.

    Args:
        accuracy: true accuracies `(m,)`, each between 0 and 1.
        rng: source of randomness.
        n_examples: test examples, each right or wrong independently of the others.

    Returns:
        Observed accuracies p `(m,)`, and their standard errors sqrt(p (1 - p) / n) `(m,)`.
    """
    n_correct = rng.binomial(n_examples, accuracy)
    observed = n_correct / n_examples
    variance = observed * (1 - observed)
    # Not n - 1: the published searches were run with this standard error.
    stderr = np.sqrt(variance / n_examples)
    return observed, stderr


def _suggest_one(
    trial: optuna.Trial, name: str, distribution: BaseDistribution
) -> ParamValue:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, FloatDistribution):
        return trial.suggest_float(
            name,
            distribution.low,
            distribution.high,
            step=distribution.step,
            log=distribution.log,
        )
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name,
            distribution.low,
            distribution.high,
            step=distribution.step,
            log=distribution.log,
        )
    raise ConfigError(f"{name}: a {type(distribution).__name__} cannot be suggested")
