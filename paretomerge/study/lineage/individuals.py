"""The individuals of a lineage: the trials in the study's record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import Objective
from paretomerge.recipe import Recipe
from paretomerge.record.record import Record
from paretomerge.record.storage import Storage
from paretomerge.record.trial import Trial
from paretomerge.space.lineage import SOURCE
from paretomerge.types import Params


@dataclass(frozen=True)
class RecordedIndividuals:
    """Trials of a record, by number and by recipe.

    The record and not the sampler's copy in memory: there a trial may have another number.

    Attributes:
        storage: Where the record is.
    """

    storage: Storage

    def __reduce__(self) -> tuple[type, tuple[Storage]]:
        # A worker process opens the record itself.
        return type(self), (self.storage,)

    @cached_property
    def _record(self) -> Record:
        return Record.read(self.storage)

    @cached_property
    def _recipes(self) -> dict[int, Recipe]:
        """Recipes that were parsed before: a trial's never changes."""
        return {}

    @property
    def objectives(self) -> Sequence[Objective]:
        """The study's objectives, with their directions."""
        return self._record.objectives

    def trials(self) -> list[Trial]:
        """Read the finished trials of the lineage, failed ones included, by their numbers."""
        file = self.storage.file
        # A study that has not begun has no record.
        if file is not None and not file.is_file():
            return []
        return [trial for trial in self._record.trials() if trial.level == 0]

    def recipe(self, number: int) -> Recipe:
        """The recipe of a trial that was scored; see `Individuals.recipe`."""
        if number not in self._recipes:
            self._read()
        if number not in self._recipes:
            raise ConfigError(
                f"trial {number}: the study has no such trial with scores to merge from"
            )
        return self._recipes[number]

    def number(self, recipe: Recipe) -> int:
        """The number of the first trial with a recipe; see `Individuals.number`."""
        self._read()
        wanted = _key(recipe)
        for number, known in self._recipes.items():
            if _key(known) == wanted:
                return number
        raise ConfigError(
            "the study has no trial with the recipe of one of the parents"
        )

    def _read(self) -> None:
        for trial in self.trials():
            if trial.number not in self._recipes and not trial.failure:
                self._recipes[trial.number] = trial.recipe


def _key(recipe: Recipe) -> str:
    """A key of a recipe, or of a step of another one, which has no chat template."""
    return replace(recipe, chat_template=None).key


def parents(params: Params) -> tuple[int, ...]:
    """The numbers of the trials that a trial is merged from; none for a source.

    Args:
        params: The parameters of a trial of a lineage.
    """
    if params["method"] == SOURCE:
        return ()
    numbers = (params["first"], params["second"])
    return tuple(number for number in numbers if isinstance(number, int))


def scored(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that others may be merged from: scored on all search examples, each merge once.

    Args:
        trials: The trials of a lineage.
    """
    return [trial for trial in trials if is_parent(trial)]


def is_parent(trial: Trial) -> bool:
    """Whether others may be merged from a trial."""
    return not trial.failure and trial.final and trial.same_as is None
