"""The exceptions that paretomerge raises on purpose.

    ParetoMergeError
    ├── RecipeError        a recipe is invalid: unknown key or method, missing or wrong value
    ├── CheckpointError    files on disk are missing, unsafe, damaged or of the wrong shape
    ├── ConfigError        a study.yaml or a command-line argument is invalid
    ├── EvaluationError    a task, metric or scoring function is missing or fails
    ├── StudyError         a record of trials cannot be read or belongs to another study
    └── EndpointError      the server of a language model fails (defined in `endpoint.py`)

Each message says what is wrong, where, and what to do. `ErrorCollector` joins several errors into
one, so that a user sees all of them at once.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import requires


class ParetoMergeError(Exception):
    """Base class of all errors; the command line prints its message without a traceback.

    Attributes:
        parts: The single messages; more than one if several problems were collected.
    """

    def __init__(self, message: str, parts: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.parts = parts or (message,)


class RecipeError(ParetoMergeError):
    """A recipe is invalid."""


class CheckpointError(ParetoMergeError):
    """Files on disk are missing, unsafe, damaged or of the wrong shape."""


class ConfigError(ParetoMergeError):
    """A study.yaml or an argument is invalid."""


class EvaluationError(ParetoMergeError):
    """A task, metric or scoring function is missing or fails."""


class StudyError(ParetoMergeError):
    """A record of trials cannot be read or does not belong to this study."""


class ErrorCollector:
    """Collects errors so that a user sees all of them at once.

    Example:
        problems = ErrorCollector()
        for name in names:
            with problems.collect():  # each block may fail once
                check(name)
        problems.raise_if_any()
    """

    _MAX_LISTED = 20

    def __init__(self) -> None:
        self._errors: list[ParetoMergeError] = []

    def __bool__(self) -> bool:
        return bool(self._errors)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Run a block; store the `ParetoMergeError` that it raises, if any."""
        try:
            yield
        except ParetoMergeError as error:
            self._errors.append(error)

    def raise_if_any(self) -> None:
        """Raise the collected errors as one, of the class of the first.

        Raises:
            ParetoMergeError: If any error was collected; `parts` holds each message once.
        """
        if not self._errors:
            return
        # A single error keeps its traceback and its cause.
        if len(self._errors) == 1:
            raise self._errors[0]
        all_parts: list[str] = []
        for error in self._errors:
            # Flattened: an error of an inner collector already has several parts.
            all_parts += error.parts
        # Several blocks may report the same problem, such as a model that is named twice.
        parts = tuple(dict.fromkeys(all_parts))
        error_class = type(self._errors[0])
        raise error_class(self._join(parts), parts)

    def _join(self, parts: tuple[str, ...]) -> str:
        if len(parts) == 1:
            return parts[0]
        lines = [f"{len(parts)} problems:"]
        lines += [f"  - {part}" for part in parts[: self._MAX_LISTED]]
        n_hidden = len(parts) - self._MAX_LISTED
        if n_hidden > 0:
            lines.append(f"  ... and {n_hidden} more")
        return "\n".join(lines)


_MAX_KNOWN = 30
"""Known names that a message lists; of more, only the most similar ones."""


def unknown_name(kind: str, name: object, known: Iterable[object]) -> str:
    """Return the error message for a name that is not in a list of known names.

    Args:
        kind: What the name stands for, such as "key" or "model".
        name: The unknown name.
        known: All valid names.

    Returns:
        A message with the most similar known name first, then all known names, or the most
        similar ones where there are many.
    """
    names = sorted(map(str, known))
    # Names come from files of users: a long one must not fill the message.
    text = str(name)[:100]
    similar = difflib.get_close_matches(text, names, n=5)
    if len(names) > _MAX_KNOWN:
        count = f"{len(names):,} names are known"
        if not similar:
            return f"unknown {kind} {text!r}; {count}"
        return (
            f"unknown {kind} {text!r}; did you mean {_alternatives(similar)}? ({count})"
        )
    listed = ", ".join(names)
    if similar:
        return f"unknown {kind} {text!r}; did you mean {similar[0]!r}? Known: {listed}"
    return f"unknown {kind} {text!r}; known: {listed}"


def _alternatives(names: list[str]) -> str:
    """`'a'`, or `'a', 'b' or 'c'`."""
    quoted = [repr(name) for name in names]
    *others, last = quoted
    if not others:
        return last
    return f"{', '.join(others)} or {last}"


def shorten(value: object) -> str:
    """Return the `repr` of any value, cut to a length that fits into a message."""
    return reprlib.repr(value)


def missing_search_library(error: ModuleNotFoundError) -> str | None:
    """Explain the import error of an installation that only merges.

    Args:
        error: An import of a library failed.

    Returns:
        What to install; None if the library is not one of those of a search.
    """
    library = (error.name or "").partition(".")[0]
    for requirement in requires("paretomerge") or ():
        name = re.match(r"\w+", requirement)
        is_of_search = requirement.endswith('extra == "search"')
        if is_of_search and name and name.group() == library:
            return (
                f"{library} is not installed. Studies need more libraries than merges do: "
                "pip install 'paretomerge[search]'"
            )
    return None
