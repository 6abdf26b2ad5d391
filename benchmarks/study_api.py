"""How the benchmarks open, run and read studies: the only module here that uses the study API."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from paretomerge.evaluate.evaluator import (
    Candidate,
    PerExample,
    Score,
    Split,
    evaluators_in,
)
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.pareto.ranking import knee
from paretomerge.recipe import Recipe
from paretomerge.record.trial import Trial
from paretomerge.study.build import build_sampler, build_search
from paretomerge.study.checkpoint_scores import score_checkpoint
from paretomerge.study.event import Event
from paretomerge.study.search import Search
from paretomerge.study.study import Study, load_study
from paretomerge.systems.twin import is_twin_folder, score_twin


def run_study(path: Path, overrides: Sequence[str] = ()) -> Search:
    """Run the study of a study.yaml to its end; it continues where it was interrupted."""
    study = build_search(load_study(path, overrides).settings)
    study.run()
    return study


def open_fresh(path: Path, folder: Path, overrides: Sequence[str] = ()) -> Search:
    """The study of a study.yaml, from its beginning, with its record in a folder."""
    settings = load_study(path, overrides).settings
    return build_search(replace(settings, out=folder))


def trial_seconds(path: Path) -> list[Mapping[str, float]]:
    """Run a study from its beginning in a temporary folder; seconds by part of each trial.

    The parts are `ask`, `merge`, `evaluate` and `record`.
    """
    settings = load_study(path).settings
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        study = build_search(replace(settings, out=Path(folder)))
        study.run(settings.budget.trials, events.append)
    return [event.seconds for event in events]


def continued_trials(
    path: Path, overrides: Sequence[str], watch: Callable[[Event], None]
) -> None:
    """Continue a study to the end of its budget; `watch` sees each trial. No held-out scores."""
    settings = load_study(path, overrides).settings
    build_search(settings).run(watch=watch)


def feasible_trials(study: Search) -> list[Trial]:
    """Trials that were scored and satisfy the constraints."""
    return [trial for trial in study.trials() if trial.feasible]


def source_trials(study: Search) -> list[Trial]:
    """The trials of the sources alone, which come first."""
    return list(study.trials()[: len(study.space.sources)])


def knee_of(study: Search, front: Sequence[Trial]) -> Trial:
    """The trial at the front's knee."""
    return front[knee([trial.values(study.goals.objectives) for trial in front])]


def score_held_out(
    study: Search, trials: Iterable[Trial]
) -> dict[int, dict[str, float]]:
    """Score trials on held-out examples: number of the trial -> objective -> score."""
    numbers = {trial.number for trial in trials}
    study.hold_out([trial for trial in study.trials() if trial.number in numbers])
    scored = {}
    for trial in study.trials():
        if trial.number in numbers and trial.held_out is not None:
            scored[trial.number] = plain_scores(trial.held_out)
    return scored


def n_examples_scored(study: Search) -> int:
    """Test examples that the study's trials asked for, duplicates of a recipe not counted."""
    total = 0
    for trial in study.trials():
        if not trial.failure and trial.same_as is None:
            total += sum(trial.scores[o.name].n for o in study.goals.objectives)
    return total


def merged_layers(study: Search, trial: Trial, base_layers: int) -> int:
    """Layers of a trial's merge: those of its slices, or of the base if it has none."""
    ranges = [piece.sources[0].layer_range for piece in study.recipe(trial).slices]
    return sum(r[1] - r[0] for r in ranges if r) or base_layers


def plain_scores(scores: Mapping[str, Score]) -> dict[str, float]:
    """Objective -> value, without its standard error."""
    return {name: score.value for name, score in scores.items()}


class RecipeScorer:
    """The models and tasks of a study.yaml, for recipes that no study proposed.

    Each recipe is scored once per split.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.study: Study = load_study(path, overrides)
        self._settings = self.study.settings
        self._study = self.study.search()
        self._scores: dict[tuple[str, str], dict[str, Score]] = {}

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
        return [objective.name for objective in self._study.goals.objectives]

    @property
    def watched(self) -> list[str]:
        """Names of the tasks that are scored but not searched for."""
        return [task.name for task in self._settings.watch]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The study's search space."""
        return dict(self._study.space.distributions)

    @property
    def baselines(self) -> list[Mapping[str, Any]]:
        """Parameters of the study's baseline recipes."""
        return list(self._study.space.baselines().values())

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of a parameter set."""
        return self._study.space.recipe(params)

    def sampler(self, preset: str, seed: int, n_trials: int) -> BaseSampler:
        """The sampler that `sampler: PRESET` in the study.yaml would set up."""
        budget = replace(self._settings.budget, trials=n_trials)
        settings = replace(self._settings, seed=seed, sampler=preset, budget=budget)
        return build_sampler(settings, self._study.space)

    def __call__(self, recipe: Recipe, split: str) -> dict[str, Score]:
        """Scores of a recipe on `search`, `held_out` or `watched` (held-out examples)."""
        recipe = replace(recipe, dtype=self._settings.dtype)
        key = (recipe.key, split)
        if key not in self._scores:
            goals = self._study.goals
            evaluator = goals.watched if split == "watched" else goals.evaluator
            examples: Split = "search" if split == "search" else "held_out"
            candidate = self._study.first_level.load(recipe)
            assert evaluator is not None
            self._scores[key] = dict(evaluator.evaluate(candidate, examples))
        return self._scores[key]

    def prompts(self, task: str, split: Split) -> list[str]:
        """The prompts of an objective's examples."""
        for part in evaluators_in(self._study.goals.evaluator):
            if isinstance(part, HarnessEvaluator) and task in part.tasks:
                requests = part.examples(split)[task].requests
                return [str(of_example[0].args[0]) for of_example in requests]
        raise KeyError(task)

    def score_model(
        self, model: Any, tokenizer: Any, examples: Split
    ) -> dict[str, float]:
        """Objectives of a loaded model that no recipe describes: name -> score."""
        candidate = Candidate(model, tokenizer, {})
        return plain_scores(self._study.goals.evaluator.evaluate(candidate, examples))

    def held_out_objectives(
        self, recipe: Recipe, n_examples: int | None = None
    ) -> dict[str, float]:
        """Objectives on held-out examples: name -> score.

        n_examples: Only the first so many of each objective, which must all be tasks.
        """
        if n_examples is None:
            return plain_scores(self(recipe, "held_out"))
        recipe = replace(recipe, dtype=self._settings.dtype)
        (harness,) = evaluators_in(self._study.goals.evaluator)
        assert isinstance(harness, PerExample)
        indices = {name: range(n_examples) for name in self.objectives}
        candidate = self._study.first_level.load(recipe)
        scores = {}
        of_examples = harness.example_scores(candidate, "held_out", indices)
        for name, values in of_examples.items():
            scores[name] = harness.aggregate("held_out", name, values).value
        return scores

    def checkpoint(self, model: str) -> dict[str, float]:
        """Objectives and watched tasks of a written model on held-out examples.

        model: A checkpoint, `model+adapter`, or a folder of `paretomerge twin`.
        """
        if is_twin_folder(model):
            return plain_scores(score_twin(self.study, model))
        return plain_scores(score_checkpoint(self._study, model, "held_out"))

    def held_out(self, recipe: Recipe) -> dict[str, float]:
        """Objectives and watched tasks on held-out examples: name -> score."""
        scores = self(recipe, "held_out")
        if self.watched:
            scores = scores | self(recipe, "watched")
        return plain_scores(scores)
