"""An earlier study, read from its record alone, and what a new one over the same sources can use of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import nondominated, reference_point
from paretomerge.pareto.ranking import ranked
from paretomerge.recipe import Recipe
from paretomerge.record.record import Trial, thawed
from paretomerge.record.storage import Storage
from paretomerge.space.space import SearchSpace
from paretomerge.study.known import Known

_MOST_STARTS = 10  # of a front: each costs an evaluation


@dataclass(frozen=True)
class Earlier:
    """name: as the user calls it. identity: as its record keeps it. home: the folder that its paths started from when it was
    last opened; "" where the record does not say. trials: those of the first level that have scores. best: its front, the greatest
    hypervolume contribution first.
    """

    name: str
    identity: Mapping[str, Any]
    home: str
    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]

    @classmethod
    def read(cls, name: str, storage: Storage) -> "Earlier":
        """Open a record to read; ConfigError where there is none."""
        if storage.file and not storage.file.is_file():
            raise ConfigError(
                f"expected the folder, study.db or study.yaml of an earlier study, got no {storage.file}"
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with storage.opened() as database:
            try:
                study = optuna.load_study(study_name=storage.name, storage=database)
            except KeyError as error:
                there = ", ".join(optuna.get_all_study_names(database)) or "none"
                raise ConfigError(
                    f"expected a study named {storage.name!r} in {storage.place}, got {there}; of one with another name give the study.yaml"
                ) from error
            attributes, frozen, trials = (
                study.user_attrs,
                study.get_trials(deepcopy=False),
                thawed(study),
            )
        values = {
            t.number: t.values
            for t in frozen
            if trials[t.number].feasible and trials[t.number].final and not trials[t.number].level
        }
        best = [trials[number] for number in _best(values)]
        return cls(
            name,
            attributes.get("identity", {}),
            attributes.get("home", ""),
            tuple(t for t in trials if not t.failure and t.final and not t.level),
            tuple(best),
        )

    def known(
        self, space: SearchSpace, recipe: Callable[[Mapping[str, Any]], Recipe], changed: str
    ) -> Known:
        """Its trials in `space`'s parameters, `recipe` being its own: with their scores, or where something has `changed`
        that gives them another meaning, the best of its front as points to be evaluated. What lies outside is left out.
        """
        found: dict[int, Trial] = {}
        wanted = self.best[:_MOST_STARTS] if changed else self.trials
        for trial in wanted:
            try:
                params = space.warm(recipe(trial.params))
            except ConfigError:
                continue
            label = f"warm: {self.name} {trial.number}"
            found[trial.number] = Trial(
                -1,
                params,
                trial.scores,
                label,
                held_out=trial.held_out,
                warm=f"{self.name} {trial.number}",
            )
        outside = (
            f"; {len(wanted) - len(found)} lie outside the space"
            if len(found) < len(wanted)
            else ""
        )
        if changed:
            starts = {trial.label: trial.params for trial in found.values()}
            return Known(
                starts,
                (),
                (
                    f"{self.name}: other {changed}: {len(starts)} of its front to be evaluated as starts{outside}",
                ),
            )
        told = f"{self.name}: {len(found)} of {len(wanted)} trials taken over with their scores, beside the budget{outside}"
        return Known({}, tuple(found.values()), (told,))


def _best(values: Mapping[int, Any]) -> list[int]:
    """Numbers of the nondominated trials, the greatest contribution first."""
    numbers, points = np.array(list(values)), np.array(list(values.values()), dtype=float)
    if not len(numbers):
        return []
    best = ranked(points, reference_point(points))[: nondominated(points).sum()]
    return [int(number) for number in numbers[best]]
