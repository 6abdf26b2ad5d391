"""docs/lab/suggest.md: is the first recipe that `suggest` names as good as the best untuned one?

    python -m benchmarks.suggest run specialists landscape    # some minutes on one core
    python -m benchmarks.suggest run smollm                   # about an hour; needs `make smollm`
    python -m benchmarks.suggest table

A family is a base and two or three of its fine-tunes, each with the task that it was made for. The
untuned merges are those of `benchmarks.family`. All scores are means over the family's tasks on
held-out examples. `suggest` sees weights alone; in the column `of 4`, four recipes were scored on
search examples, and the best of them is taken.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from benchmarks.family import untuned
from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from benchmarks.smollm import EXAMPLE, OVERRIDES
from benchmarks.study_api import RecipeScorer, plain_scores
from paretomerge.examples import SPECIALISTS
from paretomerge.problems import MergeLandscape
from paretomerge.recipe import Recipe
from paretomerge.suggest import SuggestedRecipe, suggest

FILE = RESULTS / "suggest.jsonl"
UNIFORM = "uniform soup"
FIRST = "suggested first"
FIRST_FOUR = 4
_NEAR = 0.01  # one point


@dataclass(frozen=True)
class Models:
    """Models of one base and the task of each.

    Attributes:
        study: Their study.yaml.
        tasks: Source, as the study.yaml lists it -> its task.
        overrides: Keys of the study.yaml that are set here.
        held_out: Held-out examples of each task; None for all.
        recorded: A file with held-out scores of the untuned merges of all sources, which are taken
            from it.
    """

    study: str
    tasks: Mapping[str, str]
    overrides: tuple[str, ...] = ()
    held_out: int | None = None
    recorded: Path | None = None


MODELS = {
    "specialists": Models(
        study=str(SPECIALISTS / "study.yaml"),
        tasks={
            "models/order": "sort",
            "models/mirror": "reverse",
            "models/scribe": "translate",
        },
        overrides=("watch=[]",),
    ),
    "smollm": Models(
        study=str(EXAMPLE / "study.yaml"),
        tasks={
            "models/base+adapters/arithmetic": "smollm_arithmetic",
            "models/base+adapters/french": "smollm_french",
            "models/base+adapters/extraction": "smollm_extraction",
        },
        overrides=(*OVERRIDES, "watch=[]"),
        held_out=200,
        recorded=RESULTS / "smollm-untuned.jsonl",
    ),
}


def families(models: Models) -> list[tuple[str, ...]]:
    """All sources, and each pair of them."""
    sources = tuple(models.tasks)
    return [sources, *combinations(sources, 2)]


def run(name: str) -> None:
    """Score the untuned merges and the suggested recipes of every family of some models."""
    models = MODELS[name]
    for sources in families(models):
        scorer = scorer_of(models, sources)
        label = " + ".join(scorer.sources)
        known = {entry["recipe"] for entry in entries_of(name, label)}

        def record(recipe_name: str, measure: Callable[[], Entry]) -> None:
            if recipe_name not in known:  # noqa: B023 - called in this turn alone
                entry = {"models": name, "family": label, "recipe": recipe_name}  # noqa: B023
                append_entry(FILE, entry | measure())

        recorded = recorded_scores(models, sources)
        for recipe_name, recipe in untuned(scorer).items():
            measure = held_out_of(scorer, recipe, models.held_out)
            if recipe_name in recorded:
                measure = partial(dict, held_out=recorded[recipe_name])
            record(recipe_name, measure)
        suggestion = suggest(scorer.base, scorer.sources)
        for place, suggested in enumerate(suggestion.recipes[:FIRST_FOUR]):
            title = FIRST if place == 0 else f"suggested {place + 1}"
            record(title, suggested_scores(scorer, suggested, models.held_out))


def recorded_scores(models: Models, sources: tuple[str, ...]) -> dict[str, float]:
    """Untuned merge of all sources -> its mean in the file of recorded scores."""
    if models.recorded is None or sources != tuple(models.tasks):
        return {}
    means = {}
    for entry in read_entries(models.recorded):
        scores = [entry["scores"][task] for task in models.tasks.values()]
        means[entry["name"]] = float(np.mean(scores))
    return means


def scorer_of(models: Models, sources: tuple[str, ...]) -> RecipeScorer:
    """What scores merges of some of the models, on the tasks of these alone."""
    listed = ", ".join(sources)
    tasks = ", ".join(f"{{task: {models.tasks[source]}}}" for source in sources)
    overrides = (f"models=[{listed}]", f"objectives=[{tasks}]")
    return RecipeScorer(Path(models.study), (*models.overrides, *overrides))


def held_out_of(
    scorer: RecipeScorer, recipe: Recipe, n_examples: int | None
) -> Callable[[], Entry]:
    """Measures the mean held-out score of a recipe."""

    def measure() -> Entry:
        scores = scorer.held_out_objectives(recipe, n_examples)
        return {"held_out": float(np.mean(list(scores.values())))}

    return measure


def suggested_scores(
    scorer: RecipeScorer, suggested: SuggestedRecipe, n_examples: int | None
) -> Callable[[], Entry]:
    """Measures the mean held-out and search scores of a suggested recipe."""
    held_out = held_out_of(scorer, suggested.recipe, n_examples)

    def measure() -> Entry:
        search = plain_scores(scorer(suggested.recipe, "search"))
        return {
            "method": suggested.method,
            "lambda": suggested.scale,
            "search": float(np.mean(list(search.values()))),
            **held_out(),
        }

    return measure


def run_landscape() -> None:
    """The merge landscape's starts, and the first suggestion that its space has.

    Scores are those of the surrogate, without noise.
    """
    landscape = MergeLandscape.load()
    label = "three specialists, as the landscape scores them"
    if entries_of("landscape", label):
        return
    models = MODELS["specialists"]
    scorer = scorer_of(models, tuple(models.tasks))
    rows: dict[str, Entry] = {}
    for name, point in landscape.baselines.items():
        scores, _ = landscape.evaluate(point)
        rows[name] = {"held_out": float(scores.mean())}
    suggestion = suggest(scorer.base, scorer.sources)
    # The landscape has no other method with the default density and a lambda.
    first = next(s for s in suggestion.recipes if s.method == "task_arithmetic")
    assert first.scale is not None
    space = landscape.merges.space
    # The densities are not read by task arithmetic.
    numbers = np.full(len(space.numbers), np.nan)
    for column, name in enumerate(space.numbers):
        if name.startswith("weight"):
            numbers[column] = first.scale
    point = space.point(space.methods.index(first.method), numbers)
    scores, _ = landscape.evaluate(point)
    rows[FIRST] = {
        "method": first.method,
        "lambda": first.scale,
        "held_out": float(scores.mean()),
    }
    for name, row in rows.items():
        entry = {"models": "landscape", "family": label, "recipe": name}
        append_entry(FILE, entry | row)


def entries_of(models: str, family: str) -> list[Entry]:
    """The lines of one family."""
    lines = []
    for entry in read_entries(FILE):
        if (entry["models"], entry["family"]) == (models, family):
            lines.append(entry)
    return lines


def table() -> str:
    """A row for each family, and how often the first recipe is near the best untuned one."""
    by_family: dict[tuple[str, str], list[Entry]] = {}
    for entry in read_entries(FILE):
        by_family.setdefault((entry["models"], entry["family"]), []).append(entry)
    rows = []
    near = near_of_four = with_four = 0
    for (models, family), entries in by_family.items():
        others = [e for e in entries if not e["recipe"].startswith("suggested")]
        best = max(others, key=lambda entry: float(entry["held_out"]))
        first = next(e for e in entries if e["recipe"] == FIRST)
        near += first["held_out"] >= best["held_out"] - _NEAR
        average = next(e for e in others if e["recipe"] == UNIFORM)
        four = [e for e in entries if e.get("search") is not None]
        of_four = ""
        if four:
            chosen = max(four, key=lambda entry: float(entry["search"]))
            of_four = f"{chosen['held_out']:.3f} ({chosen['method']})"
            with_four += 1
            near_of_four += chosen["held_out"] >= best["held_out"] - _NEAR
        rows.append(
            [
                f"{models}: {family}",
                f"{average['held_out']:.3f}",
                f"{best['held_out']:.3f} ({best['recipe']})",
                f"{first['held_out']:.3f} ({title_of(first)})",
                of_four,
            ]
        )
    header = ["family", UNIFORM, "best untuned", FIRST, "of 4"]
    shares = (
        f"Within one point of the best untuned recipe, or better: {near} of {len(rows)} families "
        f"by weights alone, {near_of_four} of {with_four} with four evaluations."
    )
    return f"{markdown_table(header, rows)}\n\n{shares}"


def title_of(entry: Entry) -> str:
    """A suggested recipe's method and lambda."""
    if entry["lambda"] is None:
        return str(entry["method"])
    return f"{entry['method']}, {entry['lambda']:g}"


def main() -> None:
    """Score families, or print the table."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("models", nargs="+", choices=[*MODELS, "landscape"])
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
        return
    for name in arguments.models:
        if name == "landscape":
            run_landscape()
        else:
            run(name)


if __name__ == "__main__":
    main()
