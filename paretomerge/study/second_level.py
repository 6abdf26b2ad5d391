"""Two levels in one study, as in HM3 (arXiv 2409.18893).

The first level merges weights. The second searches routes through the sources and the best merges.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.samplers import BaseSampler

from paretomerge.evaluate.evaluator import Objective
from paretomerge.pareto.front import reference_point
from paretomerge.pareto.preference import Preference, Scale
from paretomerge.pareto.ranking import ranked
from paretomerge.recipe import Recipe
from paretomerge.record.trial import Trial, pareto_front
from paretomerge.space.routes.space import (
    RouteSearchSpace,
    handover_label,
    without_middle_label,
)
from paretomerge.space.space import SearchSpace

POOL = "pool"
"""Key of the record's note that lists the trials whose merges the second level uses."""
_DEFAULT_FRONT = 4


@dataclass(frozen=True)
class SecondLevelPlan:
    """The part of the second level that is fixed before the first level has ended.

    Attributes:
        after: Trials of the first level.
        space: Makes its space from the recipes of the pool, by name.
        sampler: Makes its sampler for that space.
        front: The most merges of the first level's front that enter the pool. Those that add most
            to the hypervolume enter first.
        prefer: Weights `(m,)` of the objectives, in place of `front`: only the merge that this
            preference picks enters (as in HM3).
        notes: Messages for the user.
    """

    after: int
    space: Callable[[Mapping[str, Recipe]], RouteSearchSpace]
    sampler: Callable[[SearchSpace], BaseSampler]
    front: int = _DEFAULT_FRONT
    prefer: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    def choose_pool(
        self,
        trials: Sequence[Trial],
        objectives: Sequence[Objective],
        reference: Sequence[float] | None,
        sources: Collection[str],
    ) -> list[int]:
        """Choose the merges that enter the pool.

        A source never enters, since the second level has all sources anyway.

        Args:
            trials: The feasible trials of the first level.
            objectives: The study's objectives.
            reference: The hypervolume's reference point; None where no source could be scored. Then
                the front itself gives one.
            sources: The sources' names.

        Returns:
            The trials' numbers, ascending.
        """
        front = pareto_front(trials, objectives)
        if self.prefer and front:
            values = [trial.values(objectives) for trial in front]
            preference = Preference(tuple(self.prefer))
            best = preference.values(values, Scale.of(values)).argmax()
            front = [front[best]]
        merges = [trial for trial in front if trial.label not in sources]
        if not merges:
            return []
        values = [trial.values(objectives) for trial in merges]
        if reference is None:
            reference = reference_point(values).tolist()
        order = ranked(values, reference)
        # Ascending numbers: the order of the pool decides which hand-overs are tried.
        numbers = [merges[i].number for i in order[: self.front]]
        return sorted(numbers)


def pool_name(number: int) -> str:
    """The name of a first-level trial in the second level and in recipes that use its merge."""
    return f"trial-{number}"


def already_scored(space: SearchSpace, trials: Sequence[Trial]) -> dict[str, Trial]:
    """Find the second level's baselines that the first level has scored.

    Args:
        space: The second level's space.
        trials: The finished trials.

    Returns:
        Baseline (each source alone, each member of the pool) -> its trial, in the second level's
        parameters.
    """
    # Sources are found by label, and members of the pool by number.
    first_level = {pool_name(trial.number): trial for trial in trials}
    first_level |= {trial.label: trial for trial in trials if trial.label}
    baselines = space.baselines()
    scored = {}
    for name in space.sources:
        trial = first_level.get(name)
        if trial is not None and not trial.failure:
            params = baselines[name]
            scored[name] = replace(trial, params=params, level=1)
    return scored


def second_agenda(
    space: RouteSearchSpace,
    pool: Collection[str],
    finished: Sequence[Trial],
    scored: Collection[str],
    with_shorter: bool,
) -> list[Trial]:
    """Line up what the second level evaluates before its sampler proposes.

    First come sources that the first level could not score, then hand-overs from each member of the
    pool to the next one. Where size is a goal, each member without its middle block follows. All
    trials before these have the same depth, so they do not show what a layer is worth.

    Args:
        space: The second level's space.
        pool: Names of the pool's members.
        finished: The trials in the record.
        scored: Baselines that the first level has scored.
        with_shorter: Whether to add the members without their middle blocks.

    Returns:
        Trials without scores.
    """
    members = list(pool)
    # A cycle: every member leads once and follows once, for n evaluations and not n (n - 1).
    following = members[1:] + members[:1]
    hand_overs = []
    for one, other in zip(members, following, strict=True):
        hand_overs.append(handover_label(one, other))
    baselines = space.baselines()
    starts = {}
    for name in (*space.sources, *hand_overs):
        # A pool of one model hands over to itself, which is no baseline of the space.
        if name in baselines:
            starts[name] = baselines[name]
    for name in members if with_shorter else ():
        point = space.point_without_middle(name)
        if point:
            starts[without_middle_label(name)] = point
    # Labels of the first level do not count: its sources are in `scored` if they have scores.
    labels = {trial.label for trial in finished if trial.level}
    done = {*scored, *labels}
    agenda = []
    for name, point in starts.items():
        if name not in done:
            trial = Trial(-1, point, label=name, level=1)
            agenda.append(trial)
    return agenda
