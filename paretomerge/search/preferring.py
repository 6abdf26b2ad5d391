"""Let any sampler leave its last trials to one that improves what the user prefers."""

from collections.abc import Sequence

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from paretomerge.search.observations import count_own
from paretomerge.types import ParamValue


class PreferringSampler(BaseSampler):
    """Leaves the trials from a number on to another sampler.

    Both see all trials. Which one proposes depends on the number of trials before it alone, so a
    resumed study goes on as if it had not stopped.

    Args:
        inner: The sampler of the user's choice.
        toward: A sampler that improves the preference.
        first: Trials of this study before the first one that `toward` proposes.
    """

    def __init__(self, inner: BaseSampler, toward: BaseSampler, first: int) -> None:
        self.inner = inner
        self.toward = toward
        self._first = first

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what the proposing sampler samples jointly."""
        return self._proposing(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, ParamValue]:
        """Return the proposal of the sampler whose turn it is."""
        params: dict[str, ParamValue]
        params = self._proposing(study, trial).sample_relative(
            study, trial, search_space
        )
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> ParamValue:
        """Return one parameter from the sampler whose turn it is."""
        value: ParamValue = self._proposing(study, trial).sample_independent(
            study, trial, param_name, param_distribution
        )
        return value

    def reseed_rng(self) -> None:
        """Reseed both samplers."""
        self.inner.reseed_rng()
        self.toward.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tell the sampler whose turn it is."""
        self._proposing(study, trial).before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the inner sampler, which may store what its next proposals need."""
        self.inner.after_trial(study, trial, state, values)

    def _proposing(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        others = [
            t for t in study.get_trials(deepcopy=False) if t.number < trial.number
        ]
        return self.toward if count_own(others) >= self._first else self.inner
