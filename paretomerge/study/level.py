"""One level of a study: where it searches, with which live model and which sampler."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from optuna.samplers import BaseSampler

from paretomerge.evaluate.evaluator import Candidate
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.live.routed import RoutedModel
from paretomerge.recipe import Recipe
from paretomerge.record.trial import Trial
from paretomerge.space.space import SearchSpace
from paretomerge.study.placement import DEFAULT_PLACEMENT, Placement
from paretomerge.types import Params

LiveModel = ResidentModel | RoutedModel
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
        load_model: Loads the live model; called once, when the first candidate is merged.
        weights_key: Identifies the content of the models' files.
        placement: The dtype and the tokenizer of the merges.
        agenda: Finished trials -> what is evaluated before the sampler proposes. Trials with scores
            are taken over.
        shown_first: Trials of another level that the sampler sees as if they belonged to this one.
    """

    number: int
    space: SearchSpace
    sampler: BaseSampler
    load_model: Callable[[], LiveModel]
    weights_key: str = ""
    placement: Placement = DEFAULT_PLACEMENT
    agenda: Agenda = field(default=_empty_agenda)
    shown_first: tuple[Trial, ...] = ()

    @cached_property
    def model(self) -> LiveModel:
        """The live model."""
        # Loaded late: a study that only reads its record must not load gigabytes of weights.
        return self.load_model()

    def recipe(self, params: Params) -> Recipe:
        """The recipe of a point, with the dtype and the tokenizer that are scored."""
        return self.placement.apply(self.space.recipe(params))

    def load(self, recipe: Recipe) -> Candidate:
        """Merge a recipe into the live model.

        Args:
            recipe: A recipe of this level.

        Returns:
            What evaluators score; it is valid until the next recipe is loaded.

        Raises:
            ParetoMergeError: The recipe cannot be merged.
        """
        merged = self.model.load(recipe)
        # A recipe names its models. Caches also need to know which weights those names stand for,
        # since a model may be trained again in the same folder.
        key = f"{recipe.key} {self.weights_key}"
        return Candidate(merged.model, self.model.tokenizer, merged.facts, key)
