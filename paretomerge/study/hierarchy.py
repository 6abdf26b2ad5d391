"""Two levels in one study (HM3, arXiv 2409.18893): merged parameters first, then routes through the sources and the best merges."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.samplers import BaseSampler

from paretomerge.evaluate.evaluator import Objective
from paretomerge.pareto.front import reference_point
from paretomerge.pareto.ranking import preferred, ranked
from paretomerge.recipe import Recipe
from paretomerge.record.record import Trial, on_front
from paretomerge.space.routes.space import RouteSearchSpace
from paretomerge.space.space import SearchSpace

POOL = "pool"
"""Where a record notes the numbers of the trials that the second level takes from."""


@dataclass(frozen=True)
class Then:
    """The second level. after: trials of the first.

    front: at most so many of the first level's front enter the pool, those that add most to the hypervolume first.
    prefer: `(m,)` weights of the objectives, in place of `front`: the one merge that this preference picks (HM3's form).
    space: of the pool's recipes by name. sampler: of that space. notes: what to tell the user about the space.
    """

    after: int
    space: Callable[[Mapping[str, Recipe]], RouteSearchSpace]
    sampler: Callable[[SearchSpace], BaseSampler]
    front: int = 4
    prefer: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    def chosen(
        self,
        trials: Sequence[Trial],
        objectives: Sequence[Objective],
        reference: Sequence[float] | None,
        sources: Collection[str],
    ) -> list[int]:
        """Numbers of the feasible `trials` that enter the pool, in their order; never a source, which is a model there anyway. Where
        no source could be scored, there is no `reference`, and the pool stands for them.
        """
        front = on_front(trials, objectives)
        if self.prefer and front:
            front = [front[preferred([t.values(objectives) for t in front], self.prefer)]]
        merges = [t for t in front if t.label not in sources]
        if not merges:
            return []
        values = [t.values(objectives) for t in merges]
        order = ranked(values, reference_point(values) if reference is None else reference)
        return sorted(merges[i].number for i in order[: self.front])


def pool_name(number: int) -> str:
    """What a merge of the first level is called in the second, and in recipes that take from it."""
    return f"trial-{number}"


def scored_already(space: SearchSpace, trials: Sequence[Trial]) -> dict[str, Trial]:
    """The second level's starts that the first has scored, by name: each source alone, and each member of the pool."""
    first = {pool_name(t.number): t for t in trials} | {t.label: t for t in trials if t.label}
    starts = space.starts()
    scored = {
        name: first[name] for name in space.sources if name in first and not first[name].failure
    }
    return {name: replace(trial, params=starts[name], level=1) for name, trial in scored.items()}
