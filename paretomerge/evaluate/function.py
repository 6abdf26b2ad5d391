"""Score merges with the user's own Python function, `my_module:score`."""

import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from paretomerge.arguments import as_float
from paretomerge.errors import EvaluationError, shorten
from paretomerge.evaluate.evaluator import Candidate, Score, Scores, Split
from paretomerge.evaluate.measures import has_signature, no_signature

ScoringFunction = Callable[..., object]
"""`function(model, tokenizer)` or `function(model, tokenizer, split)`."""


class FunctionEvaluator:
    """Calls `function(model, tokenizer)`, with `split` too where it has a parameter of that name.

    The function returns a number, a `Score`, or a dict of either. The key of a dict's entry is
    appended to the evaluator's name: `name/key`.

    Attributes:
        name: The score's name.
        function: The user's function.

    Raises:
        EvaluationError: The function is one of Python's own that has no signature.

    Example:
        >>> evaluator = FunctionEvaluator("brevity", lambda model, tokenizer: 0.5)
        >>> evaluator.evaluate(Candidate(None, None, {}), "search")["brevity"].value
        0.5
    """

    def __init__(self, name: str, function: ScoringFunction) -> None:
        self.name = name
        self.function = function
        if not has_signature(function):
            raise EvaluationError(f"{name}: {no_signature(function)}")
        parameters = inspect.signature(function).parameters
        self._takes_split = "split" in parameters

    @classmethod
    def load(
        cls, name: str, path: str, folder: Path | None = None
    ) -> "FunctionEvaluator":
        """Import the scoring function.

        Args:
            name: The score's name.
            path: `module:function`.
            folder: Where the module is searched for first. A file there is executed anew at every
                call, since studies in several folders may use the same module name. The folder
                joins `sys.path`, so that the file can import its neighbours. Only the
                standard library comes before it.

        Returns:
            The evaluator that calls the function.

        Raises:
            EvaluationError: The path is malformed, or the function cannot be imported or called.
        """
        module_name, _, attribute = path.partition(":")
        if not attribute:
            raise EvaluationError(
                f"function: {path!r} must have the form module:function"
            )
        if folder is not None:
            _join_path(str(folder))
        try:
            module = _import_module(module_name, folder)
            function = getattr(module, attribute)
        except Exception as error:  # the module is the user's, and may raise anything
            message = (
                f"{name}: {path} cannot be imported: {type(error).__name__}: {error}"
            )
            if isinstance(error, ModuleNotFoundError) and error.name == module_name:
                message += ". Put the module beside study.yaml, or install it"
            raise EvaluationError(message) from error
        if not callable(function):
            kind = type(function).__name__
            raise EvaluationError(f"function {path!r}: {kind} objects cannot be called")
        return cls(name, function)

    def evaluate(self, candidate: Candidate, split: Split) -> Scores:
        """Call the function; see `Evaluator.evaluate`."""
        optional = {}
        if self._takes_split:
            optional["split"] = split
        try:
            returned = self.function(candidate.model, candidate.tokenizer, **optional)
        # The function is the user's, and may raise anything. `sys.exit` in it is no Exception, and
        # would end the search without a word.
        except (Exception, SystemExit) as error:
            cause = f"{type(error).__name__}: {error}"
            raise EvaluationError(
                f"{self.name}: the scoring function raised {cause}"
            ) from error
        if not isinstance(returned, Mapping):
            return {self.name: self._score(self.name, returned)}
        scores = {}
        for key, value in returned.items():
            name = f"{self.name}/{key}"
            scores[name] = self._score(name, value)
        return scores

    def _score(self, name: str, value: object) -> Score:
        if isinstance(value, Score):
            return value
        if as_float(value) is None:
            raise EvaluationError(
                f"{name}: the scoring function must return a number, a Score or a dict of "
                f"them, got {type(value).__name__}"
            )
        try:
            return Score(value)  # type: ignore[arg-type]  # `Score` converts any number
        except EvaluationError as error:
            called = getattr(self.function, "__qualname__", repr(self.function))
            module = getattr(self.function, "__module__", "").partition("@")[0]
            raise EvaluationError(
                f"{name}: the scoring function {module}:{called} returned {shorten(value)}, but "
                "a score must be finite"
            ) from error


def _join_path(folder: str) -> None:
    """Put a folder first in `sys.path`, but for the standard library.

    In front of that, a file called json.py or random.py would be taken by every library that
    imports the module of that name later, in worker processes, too.
    """
    standard, others = [], []
    for entry in sys.path:
        if _is_standard_library(entry):
            standard.append(entry)
        elif entry != folder:
            others.append(entry)
    sys.path[:] = [*standard, folder, *others]


def _is_standard_library(entry: str) -> bool:
    library = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    path = Path(entry)
    # Compiled modules are in a folder of their own.
    is_compiled = path.name == "lib-dynload" and str(path.parent) in library
    return is_compiled or entry in library


def _import_module(name: str, folder: Path | None) -> ModuleType:
    """The module's file in the folder if there is one, else the installed module."""
    if folder is not None:
        file = folder / f"{name}.py"
        if file.is_file():
            return _execute_file(file)
    return importlib.import_module(name)


def _execute_file(file: Path) -> ModuleType:
    """Execute a file as a module whose name no other file shares."""
    folder = file.parent.resolve()
    name = f"{file.stem}@{folder}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up in sys.modules while it is still being executed
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
