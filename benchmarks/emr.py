"""docs/lab/emr.md: the specialists as one checkpoint with masks, their scores and their size.

    python -m benchmarks.emr run       # half a minute on one core
    python -m benchmarks.emr table

Every model is scored as a written checkpoint, on the held-out examples. Each expert is the one of
the study, with the task that it was trained on.
"""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.reporting import (
    RESULTS,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from benchmarks.study_api import RecipeScorer
from paretomerge.examples import SPECIALISTS
from paretomerge.systems.emr import emr
from paretomerge.systems.expand import expand

FILE = RESULTS / "emr.jsonl"
TASKS = {"order": "sort", "mirror": "reverse", "scribe": "translate"}


def run() -> None:
    """Measure everything anew."""
    scorer = RecipeScorer(SPECIALISTS / "study.yaml")
    FILE.unlink(missing_ok=True)
    with TemporaryDirectory(prefix="emr-") as folder:
        out = Path(folder) / "unified"
        summary = emr(scorer.base, scorer.sources, out)
        sizes = {
            "unified": summary.unified_bytes,
            "masks": summary.mask_bytes,
            "models": summary.model_bytes,
        }
        append_entry(FILE, {"model": "sizes", "bytes": sizes})
        scores = scorer.checkpoint(str(out))
        append_entry(FILE, {"model": "unified", "scores": scores})
        for name, path in scorer.sources.items():
            scores = scorer.checkpoint(path)
            append_entry(FILE, {"model": name, "scores": scores})
            expanded = expand(out, name, Path(folder) / name)
            entry = {
                "model": f"{name}, expanded",
                "lambda": summary.tasks[name].scale,
                "density": summary.tasks[name].density,
                "scores": scorer.checkpoint(str(expanded)),
            }
            append_entry(FILE, entry)


def tables() -> str:
    """Scores of each task by model, then the sizes."""
    entries = {entry["model"]: entry for entry in read_entries(FILE)}
    rows = []
    experts, expansions, unified = [], [], []
    for name, task in TASKS.items():
        expansion = entries[f"{name}, expanded"]
        experts.append(entries[name]["scores"][task])
        expansions.append(expansion["scores"][task])
        unified.append(entries["unified"]["scores"][task])
        cells = [experts[-1], expansions[-1], unified[-1]]
        numbers = [f"{cell:.3f}" for cell in cells]
        kept = f"{expansions[-1] / experts[-1]:.1%}"
        scale, density = f"{expansion['lambda']:.3f}", f"{expansion['density']:.0%}"
        rows.append([f"{task} ({name})", *numbers, kept, scale, density])
    means = [statistics.mean(column) for column in (experts, expansions, unified)]
    numbers = [f"{mean:.3f}" for mean in means]
    rows.append(["mean", *numbers, f"{means[1] / means[0]:.1%}", "", ""])
    header = ["task", "its expert", "its expansion", "unified", "kept"]
    scores = markdown_table([*header, "lambda", "parameters of the mask"], rows)
    return f"{scores}\n\n{size_table(entries['sizes']['bytes'])}"


def size_table(sizes: dict[str, int]) -> str:
    """The unified checkpoint and its masks beside the experts that they replace."""
    parts = {
        "unified checkpoint": sizes["unified"],
        "three masks": sizes["masks"],
        "both": sizes["unified"] + sizes["masks"],
        "three experts": sizes["models"],
    }
    rows = []
    for name, n_bytes in parts.items():
        share = f"{n_bytes / sizes['models']:.0%}"
        rows.append([name, f"{n_bytes / 1e6:.3f}", share])
    return markdown_table(["", "MB", "of the experts"], rows)


def main() -> None:
    """Measure, or print the tables."""
    parser = documented_parser(__doc__)
    parser.add_argument("command", choices=("run", "table"))
    if parser.parse_args().command == "run":
        run()
    else:
        print(tables())


if __name__ == "__main__":
    main()
