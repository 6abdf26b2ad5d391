"""The population of Evolver: which trials are its members, as a function of the trials alone.

It is replayed from the record at each proposal, so an interrupted search continues the same
lineage. Only search scores are read. (Du et al.'s program keeps the population with the best TEST
score; held-out scores would then be no estimate.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paretomerge.evaluate.evaluator import Objective
from paretomerge.pareto.front import nondominated
from paretomerge.record.trial import Trial
from paretomerge.study.lineage.compare import Compare, best_first, values_of
from paretomerge.study.lineage.individuals import is_parent, parents
from paretomerge.types import Array


@dataclass(frozen=True)
class Population:
    """A population and how many children have challenged it.

    With `mean` a child replaces its parent if its mean score is higher: the greedy acceptance
    of the paper. With `dominance` it does so if no score is lower, and is dropped if no score is
    higher; where neither holds, both stay until the generation ends, and the population is then cut
    to its size by nondominated sorting and crowding distance (GDE3, Kukkonen & Lampinen 2005). With
    one objective both are the same.

    Attributes:
        size: The number of members.
        objectives: The study's objectives.
        compare: How a child is compared with its parent.
        members: The members. Between two generations there may be more than `size` of them.
        challenges: The number of children so far.
    """

    size: int
    objectives: Sequence[Objective]
    compare: Compare
    members: tuple[Trial, ...] = ()
    challenges: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether there are `size` members; until then each trial with scores becomes one."""
        return len(self.members) >= self.size

    @property
    def generation(self) -> int:
        """The number of generations that are over."""
        return self.challenges // self.size

    def next_parent(self, running: int = 0) -> Trial:
        """The member whose turn it is to have a child.

        Args:
            running: The number of children that are being scored.
        """
        return self.members[(self.challenges + running) % self.size]

    def after(self, trials: Sequence[Trial]) -> "Population":
        """Replay trials.

        Args:
            trials: All trials of the study, in their order.

        Returns:
            The population after them.
        """
        members = list(self.members)
        challenges = self.challenges
        for trial in trials:
            if len(members) < self.size:
                if is_parent(trial):
                    members.append(trial)
                continue
            if trial.same_as is not None:
                continue
            self._challenge(members, trial)
            # A child that failed has had its turn.
            challenges += 1
            if challenges % self.size == 0:
                members = self._truncated(members)
        return Population(
            self.size, self.objectives, self.compare, tuple(members), challenges
        )

    def best_of(self, members: Sequence[Trial], rng: np.random.Generator) -> Trial:
        """The best of some members; with `dominance` one of their front, at random.

        Args:
            members: One or more members.
            rng: The source of randomness.
        """
        if self.compare == "mean":
            return max(members, key=self._mean)
        values = np.array([self._values(member) for member in members])
        front = np.flatnonzero(nondominated(values))
        return members[int(rng.choice(front))]

    def _challenge(self, members: list[Trial], child: Trial) -> None:
        """Let a child take the place of its first parent, or join it."""
        if not is_parent(child):
            return
        numbers = [member.number for member in members]
        first = parents(child.params)[:1]
        # With several workers, a parent may have been replaced while its child was scored.
        place = numbers.index(first[0]) if first and first[0] in numbers else None
        if place is None:
            if self.compare == "dominance":
                members.append(child)
            return
        parent = members[place]
        if self.compare == "mean":
            if self._mean(child) > self._mean(parent):
                members[place] = child
            return
        child_values = self._values(child)
        parent_values = self._values(parent)
        if (child_values >= parent_values).all():
            members[place] = child
        elif not (parent_values >= child_values).all():
            members.append(child)

    def _truncated(self, members: Sequence[Trial]) -> list[Trial]:
        """The best `size` members, in their order."""
        if len(members) <= self.size:
            return list(members)
        ranked = best_first(members, self.objectives, self.compare)
        best = {member.number for member in ranked[: self.size]}
        # In their order, because a member's place decides when it has a child.
        return [member for member in members if member.number in best]

    def _values(self, trial: Trial) -> Array:
        return values_of(trial, self.objectives)

    def _mean(self, trial: Trial) -> float:
        return float(self._values(trial).mean())
