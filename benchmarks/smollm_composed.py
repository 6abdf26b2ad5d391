"""docs/lab/smollm.md: the composed skill, word problems in French, from two experts.

    python -m benchmarks.smollm_composed run --seeds 0 1 2    # about half an hour a search
    python -m benchmarks.smollm_composed trained              # an hour
    python -m benchmarks.smollm_composed table

No source has learnt it. `trained` trains an expert on it and scores that one: what the skill would
reach with data of its own. Examples are those of `benchmarks.smollm`.
"""

from pathlib import Path

import torch

from benchmarks.family import Family, run, table
from benchmarks.reporting import (
    REPOSITORY,
    RESULTS,
    append_entry,
    search_arguments,
)
from benchmarks.smollm import EXAMPLE, OVERRIDES
from benchmarks.study_api import RecipeScorer
from examples.smollm.train import Training, train
from paretomerge.recipe import Recipe

FAMILY = Family(
    study=EXAMPLE / "composed.yaml",
    results=RESULTS / "smollm-composed.jsonl",
    untuned_results=RESULTS / "smollm-composed-untuned.jsonl",
    searches={"MM-MO (ours)": "mmmo", "random search": "random"},
    sources=("arithmetic", "french"),
    objectives=("smollm_composed", "smollm_arithmetic", "smollm_french"),
    watched=(),
    trials=40,
    front_examples=100,
    overrides=OVERRIDES,
    progress=RESULTS / "smollm-composed-progress.jsonl",
)
BASE = EXAMPLE / "models" / "base"
TRAINED = REPOSITORY / "runs" / "smollm" / "adapters" / "composed"


def score_trained(base: Path, adapter: Path) -> None:
    """Train an expert on the composed skill, and score it with the untuned merges."""
    if not (adapter / "adapter_config.json").exists():
        train(base, "composed", Training(), adapter)
    scorer = RecipeScorer(FAMILY.study, FAMILY.overrides)
    models = [{"model": f"{base}+{adapter}"}]
    recipe = Recipe.from_dict({"merge_method": "passthrough", "models": models})
    scores = scorer.held_out(recipe)
    append_entry(FAMILY.untuned_results, {"name": "trained on it", "scores": scores})


def main() -> None:
    """Run searches, train the reference, or print the table."""
    arguments = search_arguments(
        __doc__, FAMILY.searches, folder=False, others=["trained"]
    )
    torch.set_num_threads(1)  # one search to a core
    if arguments.command == "run":
        run(FAMILY, arguments.seeds, arguments.searches)
    elif arguments.command == "trained":
        score_trained(BASE, TRAINED)
    else:
        print(table(FAMILY))


if __name__ == "__main__":
    main()
