"""Rank recipes for a family of models, with the reasons."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from paretomerge.arguments import model as read_model
from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import Score
from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.plan.plan import Plan
from paretomerge.recipe import Recipe
from paretomerge.space.sources import read_sources
from paretomerge.suggest.candidates import (
    candidates,
    needs_scale,
    with_scale,
)
from paretomerge.suggest.facts import DeltaFacts, FactSums
from paretomerge.suggest.interference import Interference
from paretomerge.suggest.reasons import findings_of, reasons_for
from paretomerge.suggest.sample import (
    Directions,
    Sample,
    SampledMatrix,
    leading_directions,
    take_sample,
)

_LEAST_SCALE = 0.05
_MOST_SCALE = 3.0  # beyond, the measure extrapolates a line far from the models

Watch = Callable[[str], None]


@dataclass(frozen=True)
class SuggestedRecipe:
    """A recipe, and what speaks for it.

    Attributes:
        method: Its merge method, or a source's name.
        recipe: The recipe.
        interference: The mean over the sources of the interference of the merge with them: 0 keeps
            all that each does to its own inputs, 1 is as bad as the base.
        by_source: Source -> its interference.
        scale: The `lambda` that was set; None where the method's default stays.
        reasons: Sentences.
        scores: Task -> score on search examples; empty where nothing was evaluated.
    """

    method: str
    recipe: Recipe
    interference: float
    by_source: Mapping[str, float]
    scale: float | None
    reasons: tuple[str, ...]
    scores: Mapping[str, Score]

    @property
    def mean_score(self) -> float | None:
        """The mean of the scores; None where there are none."""
        if not self.scores:
            return None
        values = [score.value for score in self.scores.values()]
        return sum(values) / len(values)


@dataclass(frozen=True)
class Suggestion:
    """Recipes for a family of models, the best first.

    Attributes:
        base: The base.
        sources: Name -> path of the fine-tunes.
        facts: What their deltas are like.
        findings: What that means for a merge, in sentences.
        recipes: All recipes that were compared.
        alone: Source -> its scores, where tasks were evaluated.
        layers: The layers that were measured.
    """

    base: str
    sources: Mapping[str, str]
    facts: DeltaFacts
    findings: tuple[str, ...]
    recipes: tuple[SuggestedRecipe, ...]
    alone: Mapping[str, Mapping[str, Score]]
    layers: tuple[int, ...]


def suggest(
    base: str, models: list[str] | Mapping[str, str], watch: Watch = lambda step: None
) -> Suggestion:
    """Rank merge methods for a family of models, from the models' weights alone.

    Every method is tried on a sample of matrices and judged by its interference with the sources
    (`suggest.interference`). Where a method adds deltas up, the `lambda` with the least
    interference is set. What the models can do is not looked at: see `suggest.scores`.

    Args:
        base: The base model.
        models: Two or more fine-tunes of it, or name -> path.
        watch: Called with the name of each step.

    Returns:
        The recipes, those with the least interference first.

    Raises:
        ConfigError: There are fewer than two models, or two of one name.
        CheckpointError: A model cannot be read, or does not seem to come from the base.
    """
    base, sources = read_model("base", base), read_sources(models)
    if len(sources) < 2:
        raise ConfigError("suggest: name the base and two or more fine-tunes of it")
    if base in sources.values():
        raise ConfigError(
            f"suggest: {base} is the base and one of the models; name fine-tunes of it alone"
        )
    sample = take_sample(base, sources)
    compared = candidates(base, sources)
    plans = _plans(sample, compared)
    sums = FactSums(tuple(sources))
    measured = {method: Interference() for method in plans}
    for name in sample.matrices:
        watch(name)
        matrix = sample.read(name)
        directions = _directions(matrix)
        sums.add(matrix, directions)
        for method, plan in plans.items():
            ((_, merged),) = merged_tensors(plan, only=(name,))
            delta = sample.oriented(merged) - matrix.base
            measured[method].add(delta, matrix.deltas, directions)
    facts = sums.facts()
    recipes = []
    for method, recipe in compared.items():
        suggested = _suggested(method, recipe, measured[method], facts)
        recipes.append(suggested)
    recipes.sort(key=lambda suggested: suggested.interference)
    return Suggestion(
        base=base,
        sources=sources,
        facts=facts,
        findings=findings_of(facts),
        recipes=tuple(recipes),
        alone={},
        layers=sample.layers,
    )


def _plans(sample: Sample, recipes: Mapping[str, Recipe]) -> dict[str, Plan]:
    """Method -> the plan of its merge, in float32 as the deltas."""
    plans = {}
    for method, recipe in recipes.items():
        exact = replace(recipe, dtype="float32")
        plans[method] = make_plan(exact, weights=sample.opened)
    return plans


def _directions(matrix: SampledMatrix) -> dict[str, Directions]:
    directions = {}
    for source, delta in matrix.deltas.items():
        directions[source] = leading_directions(delta)
    return directions


def _suggested(
    method: str, recipe: Recipe, measured: Interference, facts: DeltaFacts
) -> SuggestedRecipe:
    scale = None
    if needs_scale(method):
        best = measured.best_scale()
        # Two digits: more would pretend to be known.
        scale = round(min(max(best, _LEAST_SCALE), _MOST_SCALE), 2)
        recipe = with_scale(recipe, scale)
    factor = 1.0 if scale is None else scale
    return SuggestedRecipe(
        method=method,
        recipe=recipe,
        interference=measured.mean(factor),
        by_source=measured.at(factor),
        scale=scale,
        reasons=reasons_for(method, facts),
        scores={},
    )
