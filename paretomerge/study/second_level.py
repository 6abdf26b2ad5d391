"""Two levels in one study (HM3, arXiv 2409.18893).

Merged weights first, then routes through the sources and the best merges.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.samplers import BaseSampler

from paretomerge.evaluate.evaluator import Objective
from paretomerge.pareto.front import reference_point
from paretomerge.pareto.ranking import preferred, ranked
from paretomerge.recipe import Recipe
from paretomerge.record.trial import Trial, pareto_front
from paretomerge.space.routes.space import (
    RouteSearchSpace,
    handover_label,
    without_middle_label,
)
from paretomerge.space.space import SearchSpace

POOL = "pool"
"""The record's note of the first level's trials that the second level takes from, by number."""
_DEFAULT_FRONT = 4


@dataclass(frozen=True)
class SecondLevelPlan:
    """What is known of the second level before the first has ended.

    Attributes:
        after: Trials of the first level.
        space: Makes its space of the pool's recipes, by name.
        sampler: Makes its sampler for that space.
        front: The most merges of the first level's front that enter the pool, those that add most
            to the hypervolume first.
        prefer: Weights `(m,)` of the objectives, in place of `front`: one merge enters, the one
            that this preference picks (HM3's form).
        notes: For the user.
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

        Never a source, which is a model of the second level anyway.

        Args:
            trials: The feasible trials of the first level.
            objectives: The study's objectives.
            reference: The hypervolume's reference point; None where no source could be scored,
                and the pool stands for them.
            sources: The sources' names.

        Returns:
            The trials' numbers, in their order.
        """
        front = pareto_front(trials, objectives)
        if self.prefer and front:
            values = [trial.values(objectives) for trial in front]
            front = [front[preferred(values, self.prefer)]]
        merges = [trial for trial in front if trial.label not in sources]
        if not merges:
            return []
        values = [trial.values(objectives) for trial in merges]
        order = ranked(
            values, reference_point(values) if reference is None else reference
        )
        return sorted(merges[i].number for i in order[: self.front])


def pool_name(number: int) -> str:
    """What a trial of the first level is called in the second, and in recipes that take from it."""
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
    first_level = {pool_name(trial.number): trial for trial in trials}
    first_level |= {trial.label: trial for trial in trials if trial.label}
    baselines = space.starts()
    scored = {}
    for name in space.sources:
        trial = first_level.get(name)
        if trial is not None and not trial.failure:
            scored[name] = replace(trial, params=baselines[name], level=1)
    return scored


def second_agenda(
    space: RouteSearchSpace,
    pool: Collection[str],
    finished: Sequence[Trial],
    scored: Collection[str],
    with_shorter: bool,
) -> list[Trial]:
    """Line up what the second level evaluates before its sampler proposes.

    Sources that the first level could not score; then hand-overs from each member of the pool to
    the next, which are near each other; and where size is an objective, the members without their
    middle blocks: all that came before are equally deep, and say nothing of what a layer is worth.

    Args:
        space: The second level's space.
        pool: Names of the pool's members.
        finished: The trials in the record.
        scored: Baselines that the first level has scored.
        with_shorter: Whether size is a goal.

    Returns:
        Trials without scores.
    """
    members = list(pool)
    following = members[1:] + members[:1]
    hand_overs = [
        handover_label(one, other)
        for one, other in zip(members, following, strict=True)
    ]
    baselines = space.starts()
    starts = {}
    for name in (*space.sources, *hand_overs):
        if name in baselines:
            starts[name] = baselines[name]
    for name in members if with_shorter else ():
        point = space.point_without_middle(name)
        if point:
            starts[without_middle_label(name)] = point
    done = {*scored, *(trial.label for trial in finished if trial.level)}
    return [
        Trial(-1, point, label=name, level=1)
        for name, point in starts.items()
        if name not in done
    ]
