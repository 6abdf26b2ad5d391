"""Order suggested recipes by a few evaluations."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from paretomerge.config.settings import StudySettings
from paretomerge.evaluate.evaluator import Score
from paretomerge.pareto.preference import MEAN
from paretomerge.recipe import Recipe
from paretomerge.space.specs import WeightSpace
from paretomerge.study.build import build_search
from paretomerge.study.search import Search
from paretomerge.suggest.suggestion import Suggestion

Watch = Callable[[str], None]


def score_first(
    suggestion: Suggestion,
    settings: StudySettings,
    count: int,
    watch: Watch = lambda name: None,
) -> Suggestion:
    """Score the sources and the first recipes on a study's search examples.

    Args:
        suggestion: The recipes.
        settings: A study over the same base and sources. Its objectives must be shares of right
            answers; its record is neither read nor written.
        count: How many recipes to score.
        watch: Called with the name of each model before it is scored.

    Returns:
        The suggestion with scores, and with the scored recipes first, the best mean before others.

    Raises:
        ConfigError: An objective has another unit than a share of right answers.
        EvaluationError: A merge cannot be scored.
    """
    with TemporaryDirectory(prefix="paretomerge-") as folder:
        # `prefer: mean` checks that a mean of the objectives means something.
        scoring = replace(
            settings,
            space=WeightSpace(),
            then=None,
            sampler="random",
            prefer=MEAN,
            out=Path(folder),
            storage_url=None,
            workers=1,
        )
        search = build_search(scoring)
        alone = {}
        for name, path in suggestion.sources.items():
            watch(name)
            alone[name] = _scores(search, _unmerged(path))
        scored = []
        for suggested in suggestion.recipes[:count]:
            watch(suggested.method)
            scores = _scores(search, suggested.recipe)
            scored.append(replace(suggested, scores=scores))
    # Stable: of equal means the one with less interference comes first.
    scored.sort(key=lambda suggested: suggested.mean_score or 0.0, reverse=True)
    rest = suggestion.recipes[count:]
    return replace(suggestion, recipes=(*scored, *rest), alone=alone)


def _unmerged(model: str) -> Recipe:
    content = {"merge_method": "passthrough", "models": [{"model": model}]}
    return Recipe.from_dict(content)


def _scores(search: Search, recipe: Recipe) -> Mapping[str, Score]:
    placed = search.placement.apply(recipe)
    candidate = search.first_level.load(placed)
    scores = search.score(candidate, "search")
    names = [objective.name for objective in search.goals.objectives]
    return {name: scores[name] for name in names}
