"""The user's own Python function as an evaluator: `my_module:score`."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate, Score, Split


class FunctionEvaluator:
    """Call `function(model, tokenizer)`; `split` is passed too where the function takes an argument of that name.

    It returns a number, a Score, or a dict of either; the names in a dict are put after `name/`.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self._wants_split = "split" in inspect.signature(function).parameters

    @classmethod
    def load(cls, name: str, path: str, folder: Path | None = None) -> "FunctionEvaluator":
        """`path` is `module:function`; the module is looked for in `folder` first, and a file there is read anew: studies in several
        folders may call theirs alike.
        """
        module_name, _, attribute = path.partition(":")
        if not attribute:
            raise EvaluationError(f"function: expected module:function, got {path!r}")
        if folder is not None:
            sys.path[:] = [str(folder), *(entry for entry in sys.path if entry != str(folder))]
        file = folder / f"{module_name}.py" if folder else None
        try:
            module = (
                _read(file) if file and file.is_file() else importlib.import_module(module_name)
            )
            function = getattr(module, attribute)
        except Exception as error:  # the module is the user's, and may raise anything
            told = f"{type(error).__name__}: {error}; expected a function in a module beside study.yaml or installed"
            raise EvaluationError(f"function {path!r}: {told}") from error
        if not callable(function):
            raise EvaluationError(
                f"function {path!r}: expected a function, got {type(function).__name__}"
            )
        return cls(name, function)

    def evaluate(self, live: Candidate, split: Split) -> Mapping[str, Score]:
        more = {"split": split} if self._wants_split else {}
        try:
            result = self.function(live.model, live.tokenizer, **more)
        except Exception as error:
            raise EvaluationError(
                f"{self.name}: the scoring function raised {type(error).__name__}: {error}"
            ) from error
        if isinstance(result, Mapping):
            return {f"{self.name}/{key}": self._score(value) for key, value in result.items()}
        return {self.name: self._score(result)}

    def _score(self, value: Any) -> Score:
        if isinstance(value, Score):
            return value
        if isinstance(value, Real):
            return Score(float(value))
        raise EvaluationError(
            f"{self.name}: expected a number, a Score or a dict of them, got {type(value).__name__}"
        )


def _read(file: Path) -> ModuleType:
    """The module in a file, under a name that is the file's alone."""
    name = f"{file.stem}@{file.parent.resolve()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
