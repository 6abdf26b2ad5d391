"""mergekit as an oracle: where it is, how it is made, and one process of it that answers recipe after recipe.

    python -m tests.conformance.oracle --install     # once, about two minutes; the tests do it by themselves, too

The environment is looked for in this order: the python named by PARETOMERGE_ORACLE; the one that `--install` makes,
`~/.cache/paretomerge/mergekit-0.1.5` (under XDG_CACHE_HOME where that is set).
"""

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MERGEKIT = "0.1.5"
# torch comes first and alone: its CPU build is a twentieth of the size and lies in an index of its own.
STEPS = (
    ("torch==2.13.0", "--extra-index-url", "https://download.pytorch.org/whl/cpu"),
    (f"mergekit=={MERGEKIT}", "transformers==5.23.0"),
)
WORKER = Path(__file__).with_name("worker.py")
_RETRY_AFTER = 600  # seconds a failed installation is remembered, so that the next worker of the same run does not repeat it


class OracleMissingError(Exception):
    """There is no mergekit and none could be installed; the message says how to get one."""


def home() -> Path:
    """The folder of the environment that `install` makes."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "paretomerge" / f"mergekit-{MERGEKIT}"


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def find_or_install() -> Path:
    """The oracle's python; `OracleMissingError` where there is none."""
    named = os.environ.get("PARETOMERGE_ORACLE")
    if named:
        if not Path(named).is_file():
            raise OracleMissingError(
                f"PARETOMERGE_ORACLE: expected a python that has mergekit {MERGEKIT}, got {named!r}: no such file"
            )
        return Path(named)
    return install()


def install(*, again: bool = False) -> Path:
    """Make the environment unless it is there, under a lock: two test processes may ask at once."""
    folder = home()
    failed, lock = (
        folder.with_name(folder.name + ending) for ending in (".failed", ".lock")
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock):
        if (folder / "complete").is_file():
            return python_of(folder)
        if (
            not again
            and failed.is_file()
            and time.time() - failed.stat().st_mtime < _RETRY_AFTER
        ):
            raise OracleMissingError(failed.read_text(encoding="utf-8"))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _make(folder)
        except (OSError, subprocess.SubprocessError) as error:
            last = (
                (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            )
            message = (
                f"no oracle: mergekit {MERGEKIT} could not be installed into {folder} ({last}); with a network, run "
                "`python -m tests.conformance.oracle --install`, or let PARETOMERGE_ORACLE name a python that has it"
            )
            failed.write_text(message, encoding="utf-8")
            raise OracleMissingError(message) from error
        failed.unlink(missing_ok=True)
        (folder / "complete").touch()
        return python_of(folder)


def _make(folder: Path) -> None:
    _quietly([sys.executable, "-m", "venv", str(folder)])
    for step in STEPS:
        # one retry and a short wait: without a network the answer is to come in seconds
        _quietly(
            [
                str(python_of(folder)),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--retries",
                "1",
                "--timeout",
                "15",
                *step,
            ]
        )


def _quietly(command: Sequence[str]) -> None:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")
    }
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
    )


@contextmanager
def _locked(path: Path) -> Any:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Answer:
    """What became of one recipe: `error` is empty where mergekit wrote a model to `out`."""

    out: Path
    error: str
    seconds: float


class Oracle:
    """One process of mergekit; importing it takes longer than merging twenty pico models."""

    def __init__(self, python: Path, log: Path) -> None:
        # nothing of the tests' own environment may leak in; threads are one so that sums have one order
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment = {
            k: v
            for k, v in environment.items()
            if k not in ("PYTHONPATH", "PYTHONWARNINGS", "VIRTUAL_ENV")
        }
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [str(python), str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=environment,
            )
        try:
            version = self._read()["version"]
            if version != MERGEKIT:
                raise OracleMissingError(
                    f"{python}: expected mergekit {MERGEKIT}, got {version}"
                )
        except OracleMissingError:
            self.close()
            raise

    def merge(self, recipe: Path, out: Path, *, seed: int = 0) -> Answer:
        """Run the recipe in the file `recipe`; a file of several documents as mergekit-multi runs it."""
        chain = "\n---\n" in recipe.read_text(encoding="utf-8")
        request = {"recipe": str(recipe), "out": str(out), "seed": seed, "chain": chain}
        stream = self._stream(self._process.stdin)
        stream.write(json.dumps(request) + "\n")
        stream.flush()
        answer = self._read()
        return Answer(out, answer["error"], answer["seconds"])

    def close(self) -> None:
        self._stream(self._process.stdin).close()
        self._process.wait(timeout=30)
        self._stream(self._process.stdout).close()

    def _read(self) -> dict[str, Any]:
        line = self._stream(self._process.stdout).readline()
        if not line:
            told = "\n".join(
                self._log.read_text(encoding="utf-8", errors="replace")
                .strip()
                .splitlines()[-5:]
            )
            raise OracleMissingError(
                f"the oracle's process ended with code {self._process.wait(timeout=30)}:\n{told}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"The oracle: mergekit {MERGEKIT} in an environment of its own."
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="make the environment, also after a failure",
    )
    start = time.perf_counter()
    try:
        python = (
            install(again=True) if parser.parse_args().install else find_or_install()
        )
    except OracleMissingError as error:
        sys.exit(str(error))
    sys.stdout.write(f"{python} ({time.perf_counter() - start:.0f} s)\n")


if __name__ == "__main__":
    main()
