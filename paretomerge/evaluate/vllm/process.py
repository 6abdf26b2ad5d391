"""Start the process that holds the engine, call it, and end it."""

import contextlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from paretomerge.errors import EvaluationError, shorten

SETUP = "python3 -m venv vllm-env && vllm-env/bin/pip install vllm"
"""How users make an environment with vLLM."""

_POLL = 0.5  # seconds between two looks at whether the process still runs
_GRACE = 10  # seconds that a killed process may take to be gone

# They belong to the environment of this process.
_OWN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class WorkerError(EvaluationError):
    """The process has ended, or had to be ended."""


class Worker:
    """A process that answers calls one after the other; see `worker.py`.

    Args:
        command: The interpreter, the file that it runs, and that file's arguments.
        timeout: Seconds that an answer may take.

    Raises:
        EvaluationError: The interpreter cannot be run.
    """

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # vLLM writes a lot there, and a pipe that nobody reads would fill up.
        with NamedTemporaryFile(
            "w", prefix="paretomerge-vllm-", suffix=".log", delete=False
        ) as log:
            self._log = Path(log.name)
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    env=_environment(),
                    # Ctrl-C in the terminal is for this process, which ends the other one.
                    start_new_session=True,
                )
            except OSError as error:
                self._log.unlink()
                raise EvaluationError(
                    f"evaluate.backend: cannot run {command[0]}: {error.strerror}. Set `python` "
                    f"to the interpreter of an environment with vLLM: {SETUP}"
                ) from error
        assert process.stdin is not None and process.stdout is not None
        self._process: subprocess.Popen[str] = process
        self._calls = process.stdin
        # Also at the end of the interpreter, and when nobody refers to the worker any more.
        self._end = weakref.finalize(self, _end, process, self._log)
        reader = threading.Thread(
            target=_read, args=(process.stdout, self._lines), daemon=True
        )
        reader.start()

    @property
    def is_running(self) -> bool:
        """Whether the process can be called."""
        return self._end.alive and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method and wait for its result.

        Args:
            method: The method of `worker.Engine`.
            **arguments: Its arguments.

        Returns:
            What it returned.

        Raises:
            WorkerError: The process has ended, the method has failed, or it took too long. The
                process is killed.
            EvaluationError: The arguments are wrong. The process can be called again.
        """
        number = next(self._numbers)
        call = {"id": number, "method": method, "arguments": arguments}
        line = json.dumps(call) + "\n"
        try:
            # A thread, since a process that hangs does not read either.
            writer = threading.Thread(
                target=_write, args=(self._calls, line), daemon=True
            )
            writer.start()
            answer = self._next_answer(method, number)
        except BaseException:
            # Also Ctrl-C and time limits: the answer to this call must not be taken for another's.
            self.close(keep_log=True)
            raise
        if "error" in answer:
            self.close(keep_log=True)
            raise WorkerError(
                f"vLLM failed at `{method}`: {answer['error']}. Its log is {self._log}"
            )
        if "refused" in answer:
            raise EvaluationError(f"vLLM refused `{method}`: {answer['refused']}")
        return answer.get("result")

    def close(self, *, keep_log: bool = False) -> None:
        """End the process and all that it has started.

        Args:
            keep_log: Whether the log stays, for an error that names it.
        """
        if not keep_log:
            self._end()
            return
        if self._end.detach():
            _kill(self._process)

    def _next_answer(self, method: str, number: int) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise WorkerError(
                    f"vLLM did not answer `{method}` within {self._timeout:g} s (`timeout` of "
                    f"`evaluate.backend`). Its log is {self._log}"
                )
            try:
                line = self._lines.get(timeout=min(remaining, _POLL))
            except queue.Empty:
                # A child of the process may keep the pipe open when the process has gone.
                if self._process.poll() is None:
                    continue
                line = None
            if line is None:
                raise WorkerError(self._how_it_ended(method))
            return self._parsed(line, number)

    def _parsed(self, line: str, number: int) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or answer.get("id") != number:
            raise WorkerError(
                f"vLLM's process sent {shorten(line.strip())}, which is no answer. Something in "
                f"its environment writes to its stdout. Its log is {self._log}"
            )
        return answer

    def _how_it_ended(self, method: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        status = self._process.returncode
        cause = f"exit status {status}"
        if status is not None and status < 0:
            cause = signal.Signals(-status).name
        if cause == "SIGKILL":
            cause += ", which often means that memory ran out"
        text = f"vLLM's process ended during `{method}` ({cause})"
        last_error = _last_error(self._log)
        if last_error:
            text += f": {last_error}"
        return f"{text}. Its log is {self._log}"


def find_interpreter(python: str, root: Path) -> str:
    """The path of an interpreter as users write it.

    Args:
        python: A path, which may begin with `~` and starts from `root` if it is relative, or a name
            without a folder, which is looked up in PATH.
        root: The folder of the study.

    Returns:
        Its absolute path, or the name as it was given if it cannot be found.
    """
    if os.sep not in python:
        return shutil.which(python) or python
    # Not resolved: an environment's interpreter is a link, and its place says what is installed.
    return os.path.normpath(root.absolute() / Path(python).expanduser())


def _environment() -> dict[str, str]:
    variables = dict(os.environ)
    for name in _OWN_VARIABLES:
        variables.pop(name, None)
    return variables


def _read(answers: IO[str], lines: "queue.SimpleQueue[str | None]") -> None:
    with answers:
        for line in answers:
            lines.put(line)
    lines.put(None)


def _write(calls: IO[str], line: str) -> None:
    # A pipe that breaks belongs to a process that has ended, which the reader reports.
    with contextlib.suppress(OSError, ValueError):
        calls.write(line)
        calls.flush()


def _end(process: "subprocess.Popen[str]", log: Path) -> None:
    _kill(process)
    log.unlink(missing_ok=True)


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a process and its group, and wait until it is gone."""
    assert process.stdin is not None
    # It ends its group when its stdin is closed. A buffer with a call is no longer written.
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    # The group outlives its first process, so it is killed even if that one has ended.
    if process.returncode != 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, without vLLM's prefixes; else the last line."""
    lines = log.read_text(errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    named = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    last = (named or lines)[-1:]
    return shorten_line(last[0]) if last else ""


def shorten_line(line: str, length: int = 300) -> str:
    """A line from its error's name on, cut to a length."""
    found = re.search(r"\b[\w.]*(Error|Exception)\b: ", line)
    if found:
        line = line[found.start() :]
    return line if len(line) <= length else f"{line[:length]}..."
