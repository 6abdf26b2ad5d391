"""docs/data-informed.md: how many examples RegMean needs, on the experts of SmolLM2.

    python -m benchmarks.regmean_texts run 10 40 200     # some ten minutes each on one core
    python -m benchmarks.regmean_texts table

It needs the base model, which `make smollm` unpacks. RegMean has equal weights and alpha 0.9. Each
model reads so many search examples of its own task, with their answers; the merge is scored on 100
held-out examples of each task.
"""

from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from benchmarks.reporting import (
    RESULTS,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from benchmarks.systems import FAMILIES, Workshop, calibrated

FILE = RESULTS / "regmean_texts.jsonl"
FAMILY = FAMILIES["smollm"]


def run(examples: int) -> None:
    """Merge with statistics of so many examples of each task, and score the merge."""
    # The study's own number is that of the examples that a search scores.
    overrides = (*FAMILY.overrides, f"evaluate.search_items={examples}")
    family = replace(FAMILY, overrides=overrides, texts=examples)
    with TemporaryDirectory(prefix="regmean-") as folder:
        workshop = Workshop(family, Path(folder))
        made = calibrated("regmean", "regmean", alpha=0.9)(workshop, 0)
    append_entry(FILE, {"examples": examples, "scores": dict(made.scores)})


def table() -> str:
    """A row for each number of examples."""
    tasks = list(FAMILY.tasks.values())
    rows = []
    for entry in sorted(read_entries(FILE), key=lambda entry: entry["examples"]):
        scores = [entry["scores"][task] for task in tasks]
        cells = [f"{score:.3f}" for score in (*scores, mean(scores))]
        rows.append([f"{entry['examples']}", *cells])
    return markdown_table(
        ["examples of each task", *tasks, "mean"], rows, text_columns=0
    )


def main() -> None:
    """Merge and score, or print the table."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("examples", type=int, nargs="+")
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
        return
    known = {entry["examples"] for entry in read_entries(FILE)}
    for examples in arguments.examples:
        if examples not in known:
            run(examples)


if __name__ == "__main__":
    main()
