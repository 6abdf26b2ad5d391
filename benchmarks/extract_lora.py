"""docs/lab/lora.md: merges of the specialists as adapters, their size and their score.

    python -m benchmarks.extract_lora run       # a minute on one core
    python -m benchmarks.extract_lora table

Every merge is written in the experts' dtype (bfloat16), then extracted against the base. Both the
merge and base + adapter are scored as written checkpoints, on the held-out examples.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.family import untuned
from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from benchmarks.study_api import RecipeScorer
from paretomerge.examples import SPECIALISTS
from paretomerge.merging.engine import merge
from paretomerge.systems.lora import extract_lora

FILE = RESULTS / "extract_lora.jsonl"
MERGES = ("task arithmetic, 0.4", "TIES, top 20 %, lambda 1", "TSV")
ENERGIES = (0.8, 0.9, 0.95, 0.99)
OBJECTIVES = ("sort", "reverse", "translate")


def run() -> None:
    """Measure all merges anew."""
    scorer = RecipeScorer(SPECIALISTS / "study.yaml")
    recipes = untuned(scorer)
    FILE.unlink(missing_ok=True)
    for name in MERGES:
        with TemporaryDirectory(prefix="extract-lora-") as folder:
            merged = merge(recipes[name], Path(folder) / "merged")
            scores = scorer.checkpoint(str(merged))
            append_entry(FILE, {"merge": name, "energy": None, "scores": scores})
            for entry in adapters(scorer, merged, ENERGIES):
                append_entry(FILE, {"merge": name} | entry)
        print(name, flush=True)


def adapters(
    scorer: RecipeScorer, merged: Path, energies: Iterable[float]
) -> Iterator[Entry]:
    """Extract one merge at several shares of the energy and score base + adapter."""
    for energy in energies:
        out = merged.parent / f"lora-{energy}"
        adapter = extract_lora(merged, scorer.base, out, energy=energy)
        yield {
            "energy": energy,
            "scores": scorer.checkpoint(f"{scorer.base}+{out}"),
            "bytes": adapter.bytes,
            "share": adapter.bytes / adapter.merged_bytes,
            "mean_rank": adapter.mean_rank,
            "kept_energy": adapter.kept_energy,
        }


def table() -> str:
    """Each merge, and its adapters below it."""
    rows = []
    mean_of_merge = 0.0
    for entry in read_entries(FILE):
        mean = mean_score(entry["scores"])
        cells = [f"{entry['scores'][name]:.3f}" for name in OBJECTIVES]
        cells.append(f"{mean:.3f}")
        if entry["energy"] is None:
            mean_of_merge = mean
            rows.append([entry["merge"], "the merge", "", "", "", "", *cells, ""])
            continue
        size = [
            f"{entry['kept_energy']:.3f}",
            f"{entry['bytes'] / 1e6:.2f}",
            f"{entry['share']:.0%}",
            f"{entry['mean_rank']:.1f}",
        ]
        kept = f"{mean / mean_of_merge:.1%}"
        rows.append([entry["merge"], f"{entry['energy']:.2f}", *size, *cells, kept])
    header = ["merge", "energy asked", "kept", "MB", "of the checkpoint", "mean rank"]
    return markdown_table(
        [*header, *OBJECTIVES, "mean", "score kept"], rows, text_columns=2
    )


def mean_score(scores: Mapping[str, float]) -> float:
    """The mean of the objectives."""
    return statistics.mean(scores[name] for name in OBJECTIVES)


def main() -> None:
    """Measure, or print the table."""
    parser = documented_parser(__doc__)
    parser.add_argument("command", choices=("run", "table"))
    if parser.parse_args().command == "run":
        run()
    else:
        print(table())


if __name__ == "__main__":
    main()
