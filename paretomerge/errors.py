"""Everything that paretomerge raises on purpose.

    ParetoMergeError
    ├── RecipeError        a recipe that cannot mean anything: unknown_name key or method, missing or wild value
    ├── CheckpointError    files on disk that are missing, unsafe, torn or of the wrong shape
    ├── ConfigError        a study.yaml or a command-line argument that cannot be followed
    ├── EvaluationError    a task, metric or scoring function that is missing or fails
    ├── StudyError         a record of trials that cannot be read or does not belong to this study
    └── EndpointError      a language model's server that is away, slow, or answers something else (`endpoint.py`)

Each message says what was expected, what was found, and how to cure it. `ErrorCollector` gathers several into one error.
"""

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ParetoMergeError(Exception):
    """Root of the tree: the command line prints its message without a traceback.

    parts: the single messages, more than one where several things were wrong at once.
    """

    def __init__(self, message: str, parts: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.parts = parts or (message,)


class RecipeError(ParetoMergeError):
    """A recipe that cannot mean anything."""


class CheckpointError(ParetoMergeError):
    """Files on disk that are missing, unsafe, torn or of the wrong shape."""


class ConfigError(ParetoMergeError):
    """A study.yaml or an argument that cannot be followed."""


class EvaluationError(ParetoMergeError):
    """A task, metric or scoring function that is missing or fails."""


class StudyError(ParetoMergeError):
    """A record of trials that cannot be read or does not belong to this study."""


class ErrorCollector:
    """Errors gathered so that a user sees all of them at once.

    with problems.collect(): each block may fail once; `raise_if_any` raises what was noted as one error.
    """

    _MOST = 20

    def __init__(self) -> None:
        self._errors: list[ParetoMergeError] = []

    def __bool__(self) -> bool:
        return bool(self._errors)

    @contextmanager
    def collect(self) -> Iterator[None]:
        try:
            yield
        except ParetoMergeError as error:
            self._errors.append(error)

    def raise_if_any(self) -> None:
        """Raise what was noted, if anything, with the kind of the first."""
        if not self._errors:
            return
        if len(self._errors) == 1:
            raise self._errors[0]
        parts = tuple(dict.fromkeys(part for error in self._errors for part in error.parts))
        shorten = [f"  - {part}" for part in parts[: self._MOST]]
        if len(parts) > self._MOST:
            shorten.append(f"  ... and {len(parts) - self._MOST} more")
        message = parts[0] if len(parts) == 1 else f"{len(parts)} problems:\n" + "\n".join(shorten)
        raise type(self._errors[0])(message, parts)


def unknown_name(kind: str, got: object, known: Iterable[object]) -> str:
    """The message for a name that is not in a list: the nearest one first, then all of them."""
    names = sorted(str(k) for k in known)
    near = difflib.get_close_matches(str(got)[:100], names, n=1)
    listed = ", ".join(names)
    if near:
        return f"unknown_name {kind} {str(got)[:100]!r}; did you mean {near[0]!r}? Known: {listed}"
    return f"unknown_name {kind} {str(got)[:100]!r}; known: {listed}"


def shorten(value: object) -> str:
    """`repr`, cut to a length that fits a message whatever the value is."""
    return reprlib.repr(value)
