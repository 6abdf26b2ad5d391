"""Everything that paretomerge raises on purpose.

    ParetoMergeError
    ├── RecipeError        a recipe that cannot mean anything: unknown key or method, missing or wild value
    ├── CheckpointError    files on disk that are missing, unsafe, torn or of the wrong shape
    ├── ConfigError        a study.yaml or a command-line argument that cannot be followed
    ├── EvaluationError    a task, metric or scoring function that is missing or fails
    └── StudyError         a record of trials that cannot be read or does not belong to this study

Each message says what was expected, what was found, and how to cure it.
"""

import difflib
from collections.abc import Iterable


class ParetoMergeError(Exception):
    """Root of the tree: the command line prints its message without a traceback."""


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


def unknown(kind: str, got: object, known: Iterable[object]) -> str:
    """The message for a name that is not in a list: the nearest one first, then all of them."""
    names = sorted(str(k) for k in known)
    near = difflib.get_close_matches(str(got), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"unknown {kind} {str(got)!r}{hint} Known: {', '.join(names)}"
        if hint
        else (f"unknown {kind} {str(got)!r}; known: {', '.join(names)}")
    )
