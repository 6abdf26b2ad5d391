"""docs/lab/specialists.md: sources, untuned merges and searches on the specialists.

    python -m benchmarks.specialists run --seeds 0 1 2 3 4     # over an hour on one core
    python -m benchmarks.specialists table

Two picks of each front: its knee, and the trial with the best mean of the search scores.
"""

from benchmarks.family import Family, run, table
from benchmarks.reporting import RESULTS, search_arguments
from paretomerge.examples import SPECIALISTS

FAMILY = Family(
    study=SPECIALISTS / "study.yaml",
    results=RESULTS / "specialists.jsonl",
    untuned_results=RESULTS / "untuned.jsonl",
    searches={
        "random search": "random",
        "NSGA-II": "nsga2",
        "CMA-ES on the mean": "cma",
        "kinship": "kinship",
        "Optuna's GP": "gp",
        "MM-MO (ours)": "mmmo",
    },
    sources=("order", "mirror", "scribe"),
    objectives=("sort", "reverse", "translate"),
    watched=("unique", "shift", "translate_reverse", "copy", "count", "translate_sort"),
    trials=60,
)


def main() -> None:
    """Run searches, or print the table."""
    arguments = search_arguments(__doc__, FAMILY.searches, folder=False)
    if arguments.command == "run":
        run(FAMILY, arguments.seeds, arguments.searches)
    else:
        print(table(FAMILY))


if __name__ == "__main__":
    main()
