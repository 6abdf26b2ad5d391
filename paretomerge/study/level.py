"""One level of a study: where it searches, with which live model and which sampler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from optuna.samplers import BaseSampler

from paretomerge.evaluate.evaluator import Candidate
from paretomerge.recipe import Recipe
from paretomerge.record.trial import Trial
from paretomerge.space.space import SearchSpace
from paretomerge.study.live_models import LiveModel, LiveModels
from paretomerge.study.placement import DEFAULT_PLACEMENT, Placement
from paretomerge.types import Params

Agenda = Callable[[list[Trial]], list[Trial]]


def _empty_agenda(finished: list[Trial]) -> list[Trial]:
    return []


@dataclass(frozen=True)
class Level:
    """A search space, the model that its recipes are loaded into, and its sampler.

    Attributes:
        number: 0 for the first level, 1 for the second.
        space: The search space.
        sampler: The sampler.
        models: Loads the live model when the first candidate is merged.
        placement: The dtype and the tokenizer of the merges.
        pool: Name -> recipe of the first level's merges that this level takes from.
        agenda: Finished trials -> what is evaluated before the sampler proposes. Trials with scores
            are taken over.
        shown_first: Trials of another level that the sampler sees as if they belonged to this one.
    """

    number: int
    space: SearchSpace
    sampler: BaseSampler
    models: LiveModels
    placement: Placement = DEFAULT_PLACEMENT
    pool: Mapping[str, Recipe] = field(default_factory=dict)
    agenda: Agenda = field(default=_empty_agenda)
    shown_first: tuple[Trial, ...] = ()

    @property
    def model(self) -> LiveModel:
        """The live model."""
        return self.models.of_level(self.number, self.pool)

    def recipe(self, params: Params) -> Recipe:
        """The recipe of a point, with the dtype and the tokenizer that are scored."""
        return self.placement.apply(self.space.recipe(params))

    def load(self, recipe: Recipe) -> Candidate:
        """Merge a recipe into the live model; see `LiveModels.load`."""
        return self.models.load(self.model, recipe)
