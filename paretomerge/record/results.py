"""The results of a study so far, as a snapshot of its record."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from optuna.distributions import BaseDistribution

from paretomerge.evaluate.evaluator import Objective
from paretomerge.pareto.front import (
    RunningHypervolume,
    hypervolume,
    reference_point,
)
from paretomerge.record.trial import Scores, Trial, count_evaluated, pareto_front
from paretomerge.types import Conditions


@dataclass(frozen=True)
class Parameters:
    """The parameters of the trials of one level.

    Attributes:
        distributions: Parameter -> its distribution.
        conditions: When each is active; see `Conditions`.
    """

    distributions: Mapping[str, BaseDistribution]
    conditions: Conditions = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The finished trials of a study, and what follows from them.

    Reading it needs no model, task or data.

    Attributes:
        objectives: The study's m objectives, with their directions.
        sources: Names of the models that are merged, which are baselines of the first level.
        trials: Every finished trial in the order of their numbers, failed ones included.
        end_reason: Why the latest run ended; empty if a trial has been added since.
        place: Where the record is, for messages.
        parameters: Level -> the parameters of its trials.
    """

    objectives: tuple[Objective, ...]
    sources: tuple[str, ...]
    trials: tuple[Trial, ...]
    end_reason: str = ""
    place: str = ""
    parameters: Mapping[int, Parameters] = field(default_factory=dict)

    @cached_property
    def front(self) -> list[Trial]:
        """The feasible trials that no other dominates on the search examples, by number."""
        # Estimates of a race may be too high, so a trial that was left early is never on the front.
        candidates = [trial for trial in self.trials if trial.can_be_on_front]
        return pareto_front(candidates, self.objectives)

    @cached_property
    def baselines(self) -> list[Trial]:
        """The baseline recipes that could be scored.

        The sources come first, as they are listed, then the others by number.

        Those of a second level are left out: they contain what the first level has found.
        """
        baselines = []
        for trial in self.trials:
            if trial.is_baseline and not trial.failure and not trial.level:
                baselines.append(trial)

        def place(trial: Trial) -> int:
            # Several workers may have scored another baseline before the last source.
            if trial.label in self.sources:
                return self.sources.index(trial.label)
            return len(self.sources)

        return sorted(baselines, key=place)

    @cached_property
    def reference(self) -> list[float] | None:
        """The hypervolume's reference point `(m,)`, all objectives maximised.

        None before a source is scored.
        """
        # The sources' trials alone: later trials must not move the reference, or hypervolumes of
        # different times could not be compared.
        sources = trials_of_sources(self.trials, self.sources)
        return reference_of(sources, self.objectives)

    @property
    def evaluated(self) -> int:
        """The number of trials that used up the budget."""
        return count_evaluated(self.trials)

    @property
    def score_names(self) -> list[str]:
        """Names of the objectives, then of whatever else was scored on held-out examples."""
        names = [objective.name for objective in self.objectives]
        for trial in self.trials:
            names += trial.held_out or {}
        return list(dict.fromkeys(names))

    @property
    def has_mean(self) -> bool:
        """Whether the mean of the scores says how good merges are; see `mean`."""
        return any(self.mean(trial.scores) is not None for trial in self.trials)

    def mean(self, scores: Scores | None) -> float | None:
        """Average the objectives' scores.

        Args:
            scores: Scores of one trial.

        Returns:
            The mean; None where a score is missing, and where the objectives have different units:
            where one is minimised, is no mean over examples (sparsity), or is outside 0 to 1.
        """
        if not scores:
            return None
        values = []
        for objective in self.objectives:
            score = scores.get(objective.name)
            if score is None or not objective.maximise:
                return None
            if score.n == 1 or not 0 <= score.value <= 1:
                return None
            values.append(score.value)
        return sum(values) / len(values)

    def hypervolume(self, trials: Sequence[Trial] | None = None) -> float:
        """The hypervolume that trials dominate above the reference point.

        Args:
            trials: Some of the study's trials; all by default.

        Returns:
            The hypervolume, in the product of the objectives' units; 0 before the sources are
            scored.
        """
        trials = self.trials if trials is None else trials
        return hypervolume_of(trials, self.objectives, self.reference)

    def hypervolumes(self) -> list[float]:
        """The hypervolume after each trial, as `hypervolume` gives it for all of them."""
        if self.reference is None:
            return [0.0] * len(self.trials)
        running = RunningHypervolume(self.reference)
        volumes = []
        for trial in self.trials:
            if trial.can_be_on_front:
                running.add(trial.values(self.objectives))
            volumes.append(running.volume)
        return volumes

    def trial(self, number: int) -> Trial | None:
        """The trial with a number; None where there is none."""
        for trial in self.trials:
            if trial.number == number:
                return trial
        return None


def trials_of_sources(trials: Iterable[Trial], sources: Collection[str]) -> list[Trial]:
    """Select the first level's trials of the sources alone, failed ones included.

    Args:
        trials: Finished trials. Sources that are scored at a time finish in any order.
        sources: Names of the models that are merged.

    Returns:
        Their trials.
    """
    found = []
    for trial in trials:
        if trial.label in sources and not trial.level:
            found.append(trial)
    return found


def reference_of(
    sources: Sequence[Trial], objectives: Sequence[Objective]
) -> list[float] | None:
    """The worst of the sources in each objective, less a margin.

    Args:
        sources: The trials of the sources alone.
        objectives: The study's m objectives.

    Returns:
        The reference point `(m,)`, all objectives maximised; None where no source was scored.
    """
    # A source that failed is skipped: the reference is then that of the others, and the search
    # goes on.
    scored = [trial for trial in sources if not trial.failure]
    values = [trial.values(objectives) for trial in scored]
    if not values:
        return None
    reference: list[float] = reference_point(values).tolist()
    return reference


class SearchHypervolume:
    """The hypervolume of a search's trials, which grow: each new trial is looked at once.

    Args:
        objectives: The study's m objectives.
        sources: Names of the models that are merged. Their trials define the reference point.
    """

    def __init__(
        self, objectives: Sequence[Objective], sources: Collection[str]
    ) -> None:
        self._objectives = objectives
        self._sources = sources
        self._reference: list[float] | None = None
        self._running: RunningHypervolume | None = None
        self._n_seen = 0

    def of(self, trials: Sequence[Trial]) -> float:
        """The hypervolume that feasible trials dominate.

        Args:
            trials: The trials of the last call, and those that have finished since.

        Returns:
            The hypervolume; 0 while no source is scored.
        """
        of_sources = trials_of_sources(trials, self._sources)
        reference = reference_of(of_sources, self._objectives)
        if reference is None:
            return 0.0
        if self._running is None or reference != self._reference:
            # Another source was scored, and the reference has moved.
            self._running = RunningHypervolume(reference)
            self._reference = reference
            self._n_seen = 0
        for trial in trials[self._n_seen :]:
            if trial.can_be_on_front:
                self._running.add(trial.values(self._objectives))
        self._n_seen = len(trials)
        return self._running.volume


def hypervolume_of(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    reference: Sequence[float] | None,
) -> float:
    """The hypervolume that the feasible trials dominate.

    Args:
        trials: Finished trials.
        objectives: The study's m objectives.
        reference: The reference point `(m,)`, all objectives maximised.

    Returns:
        The hypervolume; 0 without a reference or without a feasible trial.
    """
    candidates = [trial for trial in trials if trial.can_be_on_front]
    values = [trial.values(objectives) for trial in candidates]
    if not values or reference is None:
        return 0.0
    return hypervolume(values, reference)
