"""The frame of samplers that propose merges of earlier trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.random import Generator
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Objective
from paretomerge.record.trial import Trial
from paretomerge.space.lineage import SOURCE, LineageSearchSpace
from paretomerge.study.lineage.compare import Compare, check_objectives
from paretomerge.study.lineage.individuals import RecordedIndividuals, scored
from paretomerge.types import Array, Params, ParamValue

_LEAST_SOURCES = 2


@dataclass(frozen=True)
class Lineage:
    """What a breeder sees when a trial asks for parents: search scores, and no held-out ones.

    Attributes:
        space: The space.
        objectives: The study's objectives.
        trials: The trials in the record, in their order; two or more have scores.
        running: The parameters of merges that are being scored.
        products: Returns the inner products `(K, K)` of the sources' deltas, in the order of the
            space's sources.
    """

    space: LineageSearchSpace
    objectives: Sequence[Objective]
    trials: Sequence[Trial]
    running: Sequence[Params]
    products: Callable[[], Array]


@dataclass(frozen=True)
class Proposal:
    """A merge to evaluate.

    Attributes:
        params: Its parameters in the space.
        gain: 0 where the lineage has converged, so that nothing new is expected of it; else None.
    """

    params: dict[str, ParamValue]
    gain: float | None = None


class Breeder(Protocol):
    """Chooses the parents of the next merge."""

    @property
    def compare(self) -> Compare:
        """How it compares models."""
        ...

    def propose(self, lineage: Lineage, rng: Generator) -> Proposal:
        """Choose them.

        Args:
            lineage: What is known.
            rng: The source of randomness.

        Returns:
            The proposal.
        """
        ...


class LineageSampler(BaseSampler):
    """An Optuna sampler that asks a breeder.

    It has no state but the record and the seed, so an interrupted search continues the same
    lineage. Held-out scores are not given to the breeder.

    Args:
        breeder: Chooses parents.
        space: The space.
        individuals: The trials of the record.
        products: See `Lineage`; called when it is first needed.
        seed: The seed.
    """

    def __init__(
        self,
        breeder: Breeder,
        space: LineageSearchSpace,
        individuals: RecordedIndividuals,
        products: Callable[[], Array],
        seed: int,
    ) -> None:
        self.breeder = breeder
        self._space = space
        self._individuals = individuals
        self._products = products
        self._seed = seed
        self._gain: float | None = None

    def check_objectives(self, objectives: Sequence[Objective]) -> None:
        """Raise ConfigError if the breeder cannot compare models by these objectives."""
        check_objectives(self.breeder.compare, objectives)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters of the space."""
        return self._space.distributions

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, ParamValue]:
        """The next merge; nothing for a source, whose parameters are given."""
        self._gain = None
        if "fixed_params" in trial.system_attrs:
            return {}
        lineage = self._lineage(study, trial)
        if len(scored(lineage.trials)) < _LEAST_SOURCES:
            raise StudyError(
                f"a lineage needs {_LEAST_SOURCES} sources with scores to merge; the report says "
                "why trials failed"
            )
        # A generator per trial, so that a proposal does not depend on how many were drawn before.
        rng = np.random.default_rng([self._seed, trial.number])
        proposal = self.breeder.propose(lineage, rng)
        self._gain = proposal.gain
        return proposal.params

    def _lineage(self, study: Study, trial: FrozenTrial) -> Lineage:
        trials = []
        for one in self._individuals.trials():
            # Whoever chooses must not even be able to look at them.
            trials.append(replace(one, held_out=None, selection=None))
        running = []
        for other in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if other.number != trial.number:
                running.append(other.params)
        return Lineage(
            self._space,
            self._individuals.objectives,
            trials,
            running,
            self._products,
        )

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> ParamValue:
        """A parameter that a given trial lacks: that of a source."""
        value: ParamValue = self._space.point(SOURCE)[param_name]
        return value

    def expected_gain(self, study: Study) -> float | None:
        """0 once the lineage has converged, for the study's stopping rule; else None."""
        return self._gain
