"""docs/lab/twin.md: Twin-Merging of the specialists, beside its shared model and its experts.

    python -m benchmarks.twin run --seeds 0 1 2 3 4     # some ten minutes on one core
    python -m benchmarks.twin table

Prompts for the router are those of each expert's own task on its search examples; all scores are on
held-out examples. Seconds are those of all tasks, beside the shared model's in the same process.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    markdown_table,
    mean_and_deviation,
    missing_runs,
    read_entries,
    search_arguments,
)
from benchmarks.study_api import RecipeScorer
from paretomerge.evaluate.inference.batching import pad_left
from paretomerge.examples import SPECIALISTS
from paretomerge.systems.twin import (
    Manifest,
    TwinModel,
    build_twin,
    export_corner,
    study_prompts,
)

FILE = RESULTS / "twin.jsonl"
TASKS = {"order": "sort", "mirror": "reverse", "scribe": "translate"}
"""Source -> the task that it was trained for."""

WATCHED = ("unique", "shift", "translate_reverse", "copy", "count", "translate_sort")
RANKS = {"rank 5 %": 0.05, "rank 10 %": 0.1, "rank 20 %": 0.2}
SHARED = "shared model"
_DTYPE = "float32"  # that of the study


def run(seeds: Sequence[int], searches: Sequence[str]) -> None:
    """Make and score what is missing."""
    scorer = RecipeScorer(SPECIALISTS / "study.yaml")
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in missing_runs(FILE, seeds, searches):
            entry = measure(scorer, Path(folder) / f"{name}-{seed}", RANKS[name], seed)
            append_entry(FILE, {"search": name, "seed": seed, **entry})


def measure(scorer: RecipeScorer, out: Path, rank_share: float, seed: int) -> Entry:
    """Make a folder, and score it, its shared model, and its corners for the first seed."""
    models = SPECIALISTS / "models"
    own = {source: [task] for source, task in TASKS.items()}
    start = time.perf_counter()
    build_twin(
        str(models / "base"),
        [str(models / source) for source in TASKS],
        study_prompts(scorer.study, own),
        out,
        rank_share=rank_share,
        seed=seed,
        dtype=_DTYPE,
    )
    built = time.perf_counter() - start
    manifest = Manifest.read(out)
    # Once without a clock: the first scores load the tasks and tokenize their examples.
    scorer.checkpoint(str(out / "shared"))
    shared, shared_seconds = timed(scorer, out / "shared")
    scores, seconds = timed(scorer, out)
    entry: Entry = {
        "scores": scores,
        "shared": shared,
        "seconds": seconds,
        "shared_seconds": shared_seconds,
        "built_seconds": built,
        "bytes": manifest.bytes,
        "shared_bytes": manifest.files["shared/model.safetensors"].bytes,
        "router_bytes": manifest.files["router.safetensors"].bytes,
        "validation_accuracy": manifest.router_accuracy,
        "routing": routing(scorer, out),
    }
    if seed == 0:
        entry["corners"] = {}
        for task in manifest.tasks:
            corner = export_corner(out, task, out.with_name(f"{out.name}-{task}"))
            entry["corners"][task] = scorer.checkpoint(str(corner))
    return entry


def timed(scorer: RecipeScorer, folder: Path) -> tuple[dict[str, float], float]:
    """Held-out scores, and the seconds that they took."""
    start = time.perf_counter()
    scores = scorer.checkpoint(str(folder))
    return scores, time.perf_counter() - start


def routing(scorer: RecipeScorer, folder: Path) -> dict[str, dict[str, float]]:
    """Source -> how the router does on the held-out prompts of its task."""
    model = TwinModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "shared")
    routed = {}
    for number, (source, task) in enumerate(TASKS.items()):
        prompts = scorer.prompts(task, "held_out")
        encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        ids, mask, _ = pad_left(encoded, model.device)
        weights = model.task_weights(ids, mask)
        is_right = weights.argmax(1) == number
        routed[source] = {
            "accuracy": float(is_right.double().mean()),
            "weight": float(weights[:, number].mean()),
        }
    return routed


def tables() -> str:
    """The tables of the page: scores, then size, speed and the router."""
    entries = read_entries(FILE)
    by_rank: dict[str, list[Entry]] = {}
    for name in RANKS:
        by_rank[name] = [entry for entry in entries if entry["search"] == name]
    return f"{score_table(by_rank)}\n\n{cost_table(by_rank)}"


def score_table(by_rank: Mapping[str, Sequence[Entry]]) -> str:
    """Held-out scores per task and their mean over the tasks of the experts."""
    columns = [*TASKS.values(), "mean", *WATCHED]
    first = next(iter(by_rank.values()))[0]
    rows = [_row(SHARED, [first["shared"]])]
    for name, entries in by_rank.items():
        for source in TASKS:
            corner = entries[0]["corners"][source]
            rows.append(_row(f"{name}: corner of {source}", [corner]))
    for name, entries in by_rank.items():
        scores = [entry["scores"] for entry in entries]
        rows.append(_row(f"{name}: Twin-Merging", scores))
    return markdown_table(["", *columns], rows)


def _row(name: str, scores: Sequence[Mapping[str, float]]) -> list[str]:
    """A row of the table of scores; with a standard deviation over several models."""
    cells = [name]
    for task in TASKS.values():
        cells.append(mean_and_deviation([of_model[task] for of_model in scores]))
    means = []
    for of_model in scores:
        means.append(statistics.mean(of_model[task] for task in TASKS.values()))
    cells.append(mean_and_deviation(means))
    for task in WATCHED:
        cells.append(mean_and_deviation([of_model[task] for of_model in scores]))
    return cells


def cost_table(by_rank: Mapping[str, Sequence[Entry]]) -> str:
    """Size beside checkpoints, time beside the shared model, and the router."""
    header = [
        "",
        "size, checkpoints",
        "share of all experts",
        "of it the router",
        "evaluation time, shared model = 1",
        "right task, held-out prompts",
        "its weight",
    ]
    rows = []
    for name, entries in by_rank.items():
        first = entries[0]
        size = first["bytes"] / first["shared_bytes"]
        router = first["router_bytes"] / first["bytes"]
        ratios = [entry["seconds"] / entry["shared_seconds"] for entry in entries]
        routings: list[Mapping[str, float]] = []
        for entry in entries:
            routings += entry["routing"].values()
        accuracy = statistics.mean(routing["accuracy"] for routing in routings)
        weight = statistics.mean(routing["weight"] for routing in routings)
        cells = [
            f"{size:.2f}",
            f"{size / len(TASKS):.0%}",
            f"{router:.0%}",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
            f"{accuracy:.1%}",
            f"{weight:.3f}",
        ]
        rows.append([name, *cells])
    return markdown_table(header, rows)


def main() -> None:
    """Make and score models, or print the tables."""
    arguments = search_arguments(__doc__, RANKS, folder=False)
    if arguments.command == "run":
        run(arguments.seeds, arguments.searches)
    else:
        print(tables())


if __name__ == "__main__":
    main()
