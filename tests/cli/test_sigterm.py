"""SIGTERM: commands end as with Ctrl-C, and leave nothing behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from paretomerge.cli.sigterm import taken_as_ctrl_c
from tests.cli.test_cli import ENVIRONMENT, paretomerge

# Ends itself in the middle of a merge, or of a trial.
MERGE = """
import signal
from paretomerge.checkpoint.writer import WeightsWriter
from paretomerge.cli.main import main

def write(*arguments):
    signal.raise_signal(signal.SIGTERM)

WeightsWriter.write = write
main()
"""

METRIC = """
import os, signal
from pathlib import Path

def score(model, tokenizer):
    with Path("calls").open("a") as file:
        file.write("x")
    if Path("calls").read_text() == "xxx":
        os.kill(os.getpid(), signal.SIGTERM)
    return 1.0
"""


def run(
    code: str, *arguments: object, deaf: bool = False, cwd: Path
) -> tuple[int, str]:
    """Run a program, deaf to Ctrl-C as jobs in the background are; its exit status and errors."""
    handler = signal.SIG_IGN if deaf else signal.SIG_DFL
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("deaf", [False, True])
def test_a_merge_leaves_nothing_behind(pico: Path, tmp_path: Path, deaf: bool) -> None:
    recipe = f"merge_method: linear\nmodels: [{{model: {pico}/ada, parameters: {{weight: 1}}}}]"
    (tmp_path / "recipe.yml").write_text(recipe)
    status, errors = run(MERGE, "merge", "recipe.yml", "out", deaf=deaf, cwd=tmp_path)
    assert (status, errors) == (130, "\nStopped.\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yml"]


@pytest.mark.parametrize(("deaf", "finished"), [(False, 3), (True, 2)])
def test_a_search_finishes_what_runs(
    pico: Path, tmp_path: Path, deaf: bool, finished: int
) -> None:
    (tmp_path / "metric.py").write_text(METRIC)
    (tmp_path / "study.yaml").write_text(
        f"base: {pico}/base\nmodels: [{pico}/ada, {pico}/bob]\nsampler: random\n"
        "objectives: [{function: metric:score}, {sparsity: true}]\ntrials: 6\n"
    )
    code = "from paretomerge.cli.main import main\nmain()"
    status, errors = run(code, "search", "study.yaml", deaf=deaf, cwd=tmp_path)
    assert status == 130 and "the same command continues the search" in errors
    assert "Traceback" not in errors
    shown = paretomerge("status", tmp_path / "study.yaml").stdout
    assert f"{finished} of 6 trials, 0 failed" in shown


def test_a_handler_of_somebody_else_stays() -> None:
    def mine(number, frame):
        """Do nothing."""

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with taken_as_ctrl_c():
            assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with taken_as_ctrl_c():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
