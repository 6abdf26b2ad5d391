"""How the benchmarks open, run and read studies: the only module here that uses the study API."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from paretomerge.config.build import load_study, make_sampler
from paretomerge.evaluate.evaluator import Score
from paretomerge.pareto.front import knee
from paretomerge.recipe import Recipe
from paretomerge.record.record import Trial
from paretomerge.study.loop import Event
from paretomerge.study.study import Placement, Study

Scores = dict[str, Score]
"""Task -> score."""


def run_study(path: Path) -> Study:
    """Run the study of a study.yaml to its end; it continues where it was interrupted."""
    study, config = load_study(path)
    study.run(config.limit)
    return study


def trial_seconds(path: Path) -> list[Mapping[str, float]]:
    """Run a study from its beginning in a temporary folder; seconds by part of each trial.

    The parts are `ask`, `merge`, `evaluate` and `record`.
    """
    template, config = load_study(path)
    placement = Placement(template.dtype, template.device)
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        study = Study(folder, template.space, template.goals, template.sampler, placement=placement)
        study.run(config.trials, events.append)
    return [event.seconds for event in events]


def feasible_trials(study: Study) -> list[Trial]:
    """Trials that were scored and satisfy the constraints."""
    return [trial for trial in study.trials if trial.feasible]


def source_trials(study: Study) -> list[Trial]:
    """The trials of the sources alone, which come first."""
    return list(study.trials[: len(study.space.sources)])


def knee_of(study: Study, front: Sequence[Trial]) -> Trial:
    """The trial at the front's knee."""
    return front[knee([trial.values(study.objectives) for trial in front])]


def score_held_out(study: Study, trials: Iterable[Trial]) -> dict[int, dict[str, float]]:
    """Score trials on held-out examples: number of the trial -> objective -> score."""
    numbers = {trial.number for trial in trials}
    study.hold_out([trial for trial in study.trials if trial.number in numbers])
    scored = {}
    for trial in study.trials:
        if trial.number in numbers and trial.held_out is not None:
            scored[trial.number] = plain_scores(trial.held_out)
    return scored


def n_examples_scored(study: Study) -> int:
    """Test examples that the study's trials asked for, duplicates of a recipe not counted."""
    names = [objective.name for objective in study.objectives]
    total = 0
    for trial in study.trials:
        if not trial.failure and trial.same_as is None:
            total += sum(trial.scores[name].n for name in names)
    return total


def merged_layers(study: Study, trial: Trial, base_layers: int) -> int:
    """Layers of a trial's merge: those of its slices, or of the base if it has none."""
    total = 0
    for piece in study.recipe(trial).slices:
        layer_range = piece.sources[0].layer_range
        if layer_range:
            start, end = layer_range
            total += end - start
    return total or base_layers


def plain_scores(scores: Mapping[str, Score]) -> dict[str, float]:
    """Objective -> value, without its standard error."""
    return {name: score.value for name, score in scores.items()}


class RecipeScorer:
    """The models and tasks of a study.yaml, for recipes that no study proposed.

    Each recipe is scored once per split.
    """

    def __init__(self, path: Path) -> None:
        self._study, self._config = load_study(path)
        self._scores: dict[tuple[str, str], Scores] = {}

    @property
    def base(self) -> str:
        """Path of the base model."""
        return str(self._study.space.base)

    @property
    def sources(self) -> Mapping[str, str]:
        """Name -> path of the fine-tuned models."""
        return self._study.space.sources

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives."""
        return [objective.name for objective in self._study.objectives]

    @property
    def watched(self) -> list[str]:
        """Names of the tasks that are scored but not searched for."""
        return list(self._config.watch)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The study's search space."""
        return dict(self._study.space.distributions)

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        """Parameters of the study's baseline recipes."""
        return list(self._study.space.starts().values())

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of a parameter set."""
        return self._study.space.recipe(params)

    def sampler(self, preset: str, seed: int, n_trials: int) -> BaseSampler:
        """The sampler that `sampler: PRESET` in the study.yaml would set up."""
        changes = {"seed": seed, "sampler": preset, "trials": n_trials}
        return make_sampler(self._config.model_copy(update=changes), self._study.space)

    def __call__(self, recipe: Recipe, split: str) -> Scores:
        """Scores of a recipe on `search`, `held_out` or `watched` (held-out examples)."""
        recipe = replace(recipe, dtype=self._study.dtype)
        key = (recipe.key, split)
        if key not in self._scores:
            evaluator = self._study.watched if split == "watched" else self._study.evaluator
            examples = "search" if split == "search" else "held_out"
            candidate = self._study.live(recipe)
            assert evaluator is not None
            self._scores[key] = dict(evaluator.evaluate(candidate, examples))
        return self._scores[key]

    def held_out(self, recipe: Recipe) -> dict[str, float]:
        """Objectives and watched tasks on held-out examples: name -> score."""
        return plain_scores(self(recipe, "held_out") | self(recipe, "watched"))
