"""docs/lab/smollm.md: sources, untuned merges and searches on three experts of SmolLM2-135M.

    python -m benchmarks.smollm run --seeds 0 1 2      # about half an hour a search on one core
    python -m benchmarks.smollm table
    python -m benchmarks.smollm experts                # ten minutes

It needs the base model, which `make smollm` unpacks. Each search has 40 evaluations on 40 search
examples of each task. The front is scored on 100 held-out examples of each task; its two picks (the
knee, and the trial with the best mean of the search scores) and the untuned merges on 200.
"""

import torch

from benchmarks.family import Family, run, same_for_all, table, untuned
from benchmarks.reporting import (
    REPOSITORY,
    RESULTS,
    markdown_table,
    search_arguments,
)
from benchmarks.study_api import RecipeScorer, plain_scores
from paretomerge.recipe import Recipe
from paretomerge.search.mmmo.sampler import MMMOSampler

EXAMPLE = REPOSITORY / "examples" / "smollm"
# Scores of merges that several searches make, and those of an interrupted search, are kept.
OVERRIDES = (
    f"evaluate.cache={REPOSITORY / 'runs' / 'smollm-scores'}",
    "evaluate.held_out_items=200",
)
FAMILY = Family(
    study=EXAMPLE / "study.yaml",
    results=RESULTS / "smollm.jsonl",
    untuned_results=RESULTS / "smollm-untuned.jsonl",
    searches={
        "MM-MO (ours)": "mmmo",
        "Optuna's GP": "gp",
        "random search": "random",
        "NSGA-II": "nsga2",
        "CMA-ES on the mean": "cma",
        "MM-MO as published": MMMOSampler.as_published,
    },
    sources=("arithmetic", "french", "extraction"),
    objectives=("smollm_arithmetic", "smollm_french", "smollm_extraction"),
    watched=("smollm_composed", "smollm_general", "perplexity"),
    trials=40,
    front_examples=100,
    overrides=OVERRIDES,
    progress=RESULTS / "smollm-progress.jsonl",
    studies={"MM-MO over RegMean": EXAMPLE / "regmean.yaml"},
)


def experts() -> str:
    """The base, the experts and two merges on 60 search examples of each task."""
    overrides = (*OVERRIDES, "evaluate.search_items=60")
    scorer = RecipeScorer(FAMILY.study, overrides)
    merges = untuned(scorer)
    recipes = {
        "base": single(scorer.base),
        **{name: merges[name] for name in (*FAMILY.sources, "uniform soup")},
        "task arithmetic, 0.7": same_for_all(
            scorer, "task_arithmetic", {"weight": 0.7}
        ),
    }
    rows = []
    for name, recipe in recipes.items():
        scores = plain_scores(scorer(recipe, "search"))
        rows.append([name, *(f"{scores[task]:.2f}" for task in FAMILY.objectives)])
    return markdown_table(["", *FAMILY.objectives], rows)


def single(model: str) -> Recipe:
    """A model as it is."""
    content = {"merge_method": "passthrough", "models": [{"model": model}]}
    return Recipe.from_dict(content)


def main() -> None:
    """Run searches, or print the tables."""
    arguments = search_arguments(
        __doc__, FAMILY.all_searches, folder=False, others=["experts"]
    )
    if arguments.command == "experts":
        print(experts())
        return
    if arguments.command == "table":
        print(table(FAMILY))
        return
    torch.set_num_threads(1)  # one search to a core
    run(FAMILY, arguments.seeds, arguments.searches)


if __name__ == "__main__":
    main()
