"""docs/lab/faults.md: another process locks the record of a search for a while.

    python -m benchmarks.locks run          # about eight minutes
    python -m benchmarks.locks table

Each search is a process of its own on the shipped specialists, with few examples of each task. Its
SQLite file is locked (`BEGIN EXCLUSIVE`) before it starts, or after some trials. At the end all
trials must be those of an undisturbed search, each once.
"""

import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kills import Finished, described
from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from paretomerge.examples import SPECIALISTS
from paretomerge.study.study import load_study

FILE = RESULTS / "locks.jsonl"
STUDY = SPECIALISTS / "study.yaml"
MOMENTS = ("opening", "searching")
TRIALS = 6
_BEFORE = 2  # trials in the record when it is locked


def overrides(out: Path, trials: int) -> list[str]:
    """The keys that are set for these searches."""
    return [
        f"out={out}",
        f"trials={trials}",
        "evaluate.search_items=10",
        "evaluate.held_out_items=10",
        "watch=[]",
    ]


def start(out: Path, trials: int = TRIALS) -> "subprocess.Popen[str]":
    """A search in a process of its own."""
    command = [sys.executable, "-m", "paretomerge", "search", str(STUDY), "--quiet"]
    for key in overrides(out, trials):
        command += ["--set", key]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def searched(out: Path, trials: int) -> Path:
    """A folder in which a search has ended; an earlier run may have made it."""
    if not out.exists():
        start(out, trials).communicate()
    return out


def finished(out: Path) -> Finished:
    """The trials in the record."""
    trials = load_study(STUDY, overrides(out, TRIALS)).get_trials()
    return {trial.number: described(trial) for trial in trials}


def count(file: Path) -> int:
    """The number of trials, without what a search needs to know of them."""
    if not file.exists():
        return 0
    with sqlite3.connect(file) as connection:
        try:
            return int(connection.execute("select count(*) from trials").fetchone()[0])
        except sqlite3.OperationalError:
            # Its tables are being made.
            return 0


def hold(file: Path, seconds: float) -> None:
    """Lock a file for a while."""
    connection = sqlite3.connect(file, isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(seconds)
    connection.close()


def run(moment: str, seconds: float, expected: Finished, folder: Path) -> Entry:
    """Lock the record of one search."""
    out = folder / f"{moment}-{seconds}"
    file = out / "study.db"
    if moment == "opening":
        begun = searched(folder / "begun", _BEFORE)
        shutil.copytree(begun, out)
        # It reads the record some seconds after it starts, with all imports done.
        process = start(out)
    else:
        process = start(out)
        while count(file) < _BEFORE:
            time.sleep(0.05)
    hold(file, seconds)
    _, errors = process.communicate()
    trials = finished(out)
    return {
        "moment": moment,
        "seconds": seconds,
        "status": process.returncode,
        "warnings": errors.count("database is locked"),
        "trials": len(trials),
        "other": sum(trials.get(number) != trial for number, trial in expected.items()),
        "said": errors.replace(str(out), "OUT").strip(),
    }


def table() -> str:
    """A row for each lock."""
    rows = []
    for entry in read_entries(FILE):
        cells = ("moment", "seconds", "status", "warnings", "trials", "other")
        rows.append([f"{entry[name]}" for name in cells])
    header = [
        "locked while",
        "seconds",
        "exit status",
        "warnings",
        f"trials of {TRIALS}",
        "other than undisturbed",
    ]
    return markdown_table(header, rows)


def main() -> None:
    """Lock the records of searches, or print the table."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--seconds", type=int, nargs="+", default=[5, 30, 120])
    runner.add_argument("--moments", nargs="+", default=list(MOMENTS))
    runner.add_argument("--folder", type=Path, help="keeps searches for the next run")
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        expected = finished(searched(folder / "undisturbed", TRIALS))
        for seconds in arguments.seconds:
            for moment in arguments.moments:
                append_entry(FILE, run(moment, seconds, expected, folder))


if __name__ == "__main__":
    main()
