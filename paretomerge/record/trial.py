"""One finished evaluation of a study, and the comparison of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.pareto.front import nondominated
from paretomerge.recipe import Recipe
from paretomerge.types import Params

Scores = Mapping[str, Score]
"""Name of a score -> the score, in the user's direction."""


@dataclass(frozen=True, repr=False)
class Trial:
    """One finished evaluation of a merge.

    Attributes:
        number: Its number in the record, from 0.
        params: The parameters that make its recipe.
        scores: Scores on the search examples, in the user's directions; empty where the trial
            failed.
        label: The name of a baseline recipe (`uniform soup`, a source's name); empty for a proposal
            of the sampler.
        failure: Why it failed; empty if it did not.
        seconds: Wall-clock seconds by stage: ask, merge, evaluate, record.
        held_out: Scores on the held-out examples; None until they are measured.
        selection: Scores on the selection examples, by which a pick among the best trials was made;
            None until they are measured.
        constraints: Each constraint's text -> its violation; 0 or less where it is satisfied.
        warm_start: The study and trial number that the scores were taken from; empty for trials
            of this study.
        same_as: The number of an earlier trial with the same recipe, whose scores these are.
        gain: The share of the hypervolume that the sampler expected it to add.
        final: False where a race stopped it before all examples were scored; its scores are
            estimates then.
        level: 1 for trials of a study's second level, else 0.
        recipe_yaml: The recipe that was scored, in mergekit's YAML.
        retried: Why its first evaluation was lost; empty if it was not.
        traceback: Where a failure was raised, in the process that scored it. Only the run that made
            the trial knows it; the record does not.

    Example:
        >>> from paretomerge.evaluate.evaluator import Score
        >>> trial = Trial(17, {"weight.math": 0.5}, {"math": Score(0.82)})
        >>> trial.name, trial.scores["math"].value
        ('trial 17', 0.82)
        >>> trial
        Trial(17, math=0.820)
    """

    number: int
    params: Params
    scores: Scores = field(default_factory=dict)
    label: str = ""
    failure: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    held_out: Scores | None = None
    selection: Scores | None = None
    constraints: Mapping[str, float] = field(default_factory=dict)
    warm_start: str = ""
    same_as: int | None = None
    gain: float | None = None
    level: int = 0
    final: bool = True
    recipe_yaml: str = ""
    retried: str = ""
    traceback: str = field(default="", compare=False)

    def __repr__(self) -> str:
        parts = [str(self.number)]
        if self.label:
            parts.append(repr(self.label))
        if self.failure:
            parts.append(f"failed: {self.failure[:80]}")
        if self.violations:
            parts.append(f"infeasible: {self.violations}")
        for name, score in self.scores.items():
            error = f" ± {score.stderr:.3f}" if score.stderr else ""
            parts.append(f"{name}={score.text}{error}")
        return f"Trial({', '.join(parts)})"

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that was scored."""
        # From the record and not from the parameters: reading must not need the space, whose models
        # may have gone.
        return Recipe.from_yaml(self.recipe_yaml, f"the recipe of trial {self.number}")

    @property
    def name(self) -> str:
        """The baseline's name, or `trial 17`."""
        return self.label or f"trial {self.number}"

    @property
    def is_baseline(self) -> bool:
        """Whether this is a baseline recipe, or a start that the user named."""
        # A trial of another study is labelled with its origin, unless it is a baseline here too.
        origin = f"warm: {self.warm_start}"
        return bool(self.label) and self.label != origin

    @property
    def violations(self) -> str:
        """The constraints that it breaks, and by how much, as text; empty where it breaks none."""
        broken = []
        for name, violation in self.constraints.items():
            if violation > 0:
                broken.append(f"{name} (by {violation:.3g})")
        return ", ".join(broken)

    @property
    def feasible(self) -> bool:
        """Whether it was scored and satisfies the constraints."""
        return not self.failure and not self.violations

    @property
    def can_be_on_front(self) -> bool:
        """Whether it is feasible and scored on all examples."""
        return self.feasible and self.final

    def values(self, objectives: Sequence[Objective]) -> list[float]:
        """Return the objectives' scores as the search sees them.

        Args:
            objectives: The study's m objectives.

        Returns:
            m values, all to be maximised.
        """
        values = []
        for objective in objectives:
            score = self.scores[objective.name]
            values.append(objective.inside(score.value))
        return values


def pareto_front(
    trials: Sequence[Trial], objectives: Sequence[Objective]
) -> list[Trial]:
    """Select the trials that no other of them dominates.

    Args:
        trials: Trials with scores.
        objectives: The study's objectives.

    Returns:
        The non-dominated trials, in their order.
    """
    # Of trials with equal values only the first stays (see `nondominated`).
    mask = nondominated([trial.values(objectives) for trial in trials])
    front = []
    for trial, on_front in zip(trials, mask, strict=True):
        if on_front:
            front.append(trial)
    return front


def count_evaluated(trials: Sequence[Trial]) -> int:
    """Count the trials that use up the budget: merges that the study scored itself, each once."""
    count = 0
    for trial in trials:
        if not trial.warm_start and trial.same_as is None:
            count += 1
    return count
