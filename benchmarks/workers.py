"""docs/lab/scaling.md: the memory of several worker processes, beside one.

    python -m benchmarks.workloads make FOLDER 0.5
    python -m benchmarks.workers run FOLDER                      # some minutes
    python -m benchmarks.workers table

Each study merges three fine-tunes of a base with 0.5 B parameters by task arithmetic and TIES, and
scores a number of the weights, so that nothing but the models takes memory. Every worker notes its
own memory after each merge, as the kernel counts it: what is in no file (anonymous), and its share
of the files that it maps. A page that four processes map counts as a quarter for each.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import paretomerge as pm
from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from benchmarks.workloads import MODELS

FILE = RESULTS / "workers.jsonl"
COUNTS = (1, 2, 4)
NOTES = "PARETOMERGE_BENCHMARK_NOTES"


def memory() -> dict[str, int]:
    """Bytes of this process: `anonymous`, and `files`, its share of mapped files."""
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        sizes[name.rstrip(":")] = 1024 * int(kilobytes)
    return {"anonymous": sizes["Pss_Anon"], "files": sizes["Pss_File"]}


def score(model: Any, tokenizer: Any) -> float:
    """A number of the weights; notes the memory."""
    value = float(next(model.parameters()).detach().float().norm())
    with (Path(os.environ[NOTES]) / str(os.getpid())).open("a") as notes:
        notes.write(json.dumps(memory()) + "\n")
    return value


def measure(folder: Path, count: int) -> Entry:
    """The memory of a study with so many workers."""
    base, *sources = (folder / name for name in MODELS)
    with tempfile.TemporaryDirectory() as out:
        notes = Path(out) / "notes"
        notes.mkdir()
        os.environ[NOTES] = str(notes)
        study = pm.Study(
            base,
            sources,
            [pm.Function(score), pm.Sparsity()],
            space=pm.WeightSpace(methods=["task_arithmetic", "ties"]),
            sampler="random",
            workers=count,
            sources="mmap",
            out=Path(out) / "study",
        )
        study.optimize(n_trials=12, held_out=False, show_progress_bar=False)
        per_process = []
        for file in notes.iterdir():
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            per_process.append(lines)
    peaks = [max(line["anonymous"] for line in lines) for lines in per_process]
    # The last look: all workers have mapped all files by then.
    files = [lines[-1]["files"] for lines in per_process]
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    return {
        "workers": count,
        "processes": len(per_process),
        "anonymous": sum(peaks),
        "files": sum(files),
        "models": size,
        "live": base.joinpath("model.safetensors").stat().st_size,
    }


def table() -> str:
    """Memory by the number of workers, in gigabytes."""
    rows = []
    for entry in read_entries(FILE):
        numbers = [
            entry["workers"] * entry["live"],
            entry["anonymous"],
            entry["models"],
            entry["files"],
        ]
        rows.append(
            [str(entry["workers"]), *(f"{number / 1e9:.2f}" for number in numbers)]
        )
    header = ["workers", "live models", "in no file, measured", "files", "mapped files"]
    return markdown_table(header, rows)


def arguments() -> argparse.Namespace:
    """`run FOLDER` or `table`."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("folder", type=Path)
    commands.add_parser("table")
    return parser.parse_args()


def main() -> None:
    """Measure the numbers of workers that are missing, or print the table."""
    parsed = arguments()
    if parsed.command == "table":
        print(table())
        return
    known = [entry["workers"] for entry in read_entries(FILE)]
    for count in COUNTS:
        if count not in known:
            append_entry(FILE, measure(parsed.folder, count))


if __name__ == "__main__":
    main()
