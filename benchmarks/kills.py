"""docs/lab/faults.md: a search that is killed at random moments, beside an undisturbed one.

    python -m benchmarks.kills run --kills 50       # a quarter of an hour
    python -m benchmarks.kills table

Each search is a process of its own on the shipped specialists, with 20 examples of each task. It is
killed (SIGKILL, with all its children) at a random moment, from its start on, and started again,
until it ends. Then the next search begins, until there were enough kills. After each kill the
record is read: a trial that was finished before must still be there, with the same parameters and
scores. At the end all trials must be those of the undisturbed search, each once.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from paretomerge.examples import SPECIALISTS
from paretomerge.record.trial import Trial
from paretomerge.study.study import load_study

FILE = RESULTS / "kills.jsonl"
STUDY = SPECIALISTS / "study.yaml"
WORKERS = (1, 2)
TRIALS = 40
_LONGEST = 20.0  # seconds until a kill, from the start of the process

Finished = dict[int, tuple[str, str]]
"""Number of a finished trial -> its parameters and scores, as text."""


def overrides(out: Path, workers: int) -> list[str]:
    """The keys that are set for these searches."""
    return [
        f"out={out}",
        f"trials={TRIALS}",
        f"workers={workers}",
        "evaluate.search_items=20",
        "evaluate.held_out_items=20",
        "watch=[]",
    ]


def start(out: Path, workers: int) -> "subprocess.Popen[bytes]":
    """A search in a process group of its own."""
    command = [sys.executable, "-m", "paretomerge", "search", str(STUDY), "--quiet"]
    for key in overrides(out, workers):
        command += ["--set", key]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finished(out: Path, workers: int) -> Finished:
    """The trials in the record that have scores."""
    if not (out / "study.db").exists():
        return {}
    trials = load_study(STUDY, overrides(out, workers)).get_trials()
    found: Finished = {}
    for trial in trials:
        if trial.scores and not trial.failure:
            assert trial.number not in found, "a trial is in the record twice"
            found[trial.number] = described(trial)
    return found


def described(trial: Trial) -> tuple[str, str]:
    """A trial's parameters and scores."""
    scores = {name: score.value for name, score in trial.scores.items()}
    return repr(sorted(trial.params.items())), repr(sorted(scores.items()))


def search_with_kills(
    out: Path, workers: int, rng: random.Random, most: int
) -> tuple[int, int]:
    """Run one search to its end, killing it up to `most` times.

    Returns:
        (kills, finished trials that a kill lost or changed).
    """
    kills = lost = 0
    before: Finished = {}
    while True:
        process = start(out, workers)
        wait = rng.uniform(0, _LONGEST) if kills < most else None
        try:
            _, errors = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            after = finished(out, workers)
            lost += sum(after.get(number) != trial for number, trial in before.items())
            before = after
            continue
        if process.returncode:
            raise RuntimeError(errors.decode())
        return kills, lost


def run(workers: int, kills: int, folder: Path) -> Entry:
    """Kill searches until there were so many kills."""
    rng = random.Random(workers)
    undisturbed = folder / f"undisturbed-{workers}"
    process = start(undisturbed, workers)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode())
    expected = finished(undisturbed, workers)
    assert len(expected) == TRIALS
    entry = {"workers": workers, "kills": 0, "searches": 0, "lost": 0}
    entry |= {"trials": 0, "other": 0, "too many": 0}
    began = time.monotonic()
    while entry["kills"] < kills:
        out = folder / f"killed-{workers}-{entry['searches']}"
        done, lost = search_with_kills(out, workers, rng, kills - entry["kills"])
        trials = finished(out, workers)
        entry["kills"] += done
        entry["searches"] += 1
        entry["lost"] += lost
        entry["trials"] += len(trials)
        entry["too many"] += len(trials) - TRIALS
        entry["other"] += sum(trials.get(n) != t for n, t in expected.items())
        print(entry, round(time.monotonic() - began), flush=True)
    return entry


def table() -> str:
    """A row for each number of workers."""
    rows = []
    for entry in read_entries(FILE):
        other = f"{entry['other']}"
        if entry["workers"] > 1:
            # Two workers end in another order each time, and the sampler learns from it.
            other = ""
        rows.append(
            [
                f"{entry['workers']}",
                f"{entry['kills']}",
                f"{entry['searches']}",
                f"{entry['lost']}",
                f"{entry['too many']}",
                other,
            ]
        )
    header = [
        "workers",
        "kills",
        "searches",
        "finished trials lost or changed",
        "trials beyond the budget",
        "trials other than undisturbed",
    ]
    return markdown_table(header, rows)


def main() -> None:
    """Kill searches, or print the table."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--kills", type=int, default=50)
    runner.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
        return
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory() as folder:
            append_entry(FILE, run(workers, arguments.kills, Path(folder)))


if __name__ == "__main__":
    main()
