"""The user's own Python function as an evaluator: `my_module:score`."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Live, Score, Split


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
        """`path` is `module:function`; the module is looked for in `folder` first."""
        module_name, _, attribute = path.partition(":")
        if not attribute:
            raise EvaluationError(f"function: expected module:function, got {path!r}")
        if folder is not None and str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        try:
            function = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise EvaluationError(f"function {path!r}: {error}; expected a function in a module beside study.yaml or installed") from error
        if not callable(function):
            raise EvaluationError(f"function {path!r}: expected a function, got {type(function).__name__}")
        return cls(name, function)

    def evaluate(self, live: Live, split: Split) -> Mapping[str, Score]:
        more = {"split": split} if self._wants_split else {}
        try:
            result = self.function(live.model, live.tokenizer, **more)
        except Exception as error:
            raise EvaluationError(f"{self.name}: the scoring function raised {type(error).__name__}: {error}") from error
        if isinstance(result, Mapping):
            return {f"{self.name}/{key}": self._score(value) for key, value in result.items()}
        return {self.name: self._score(result)}

    def _score(self, value: Any) -> Score:
        if isinstance(value, Score):
            return value
        if isinstance(value, Real):
            return Score(float(value))
        raise EvaluationError(f"{self.name}: expected a number, a Score or a dict of them, got {type(value).__name__}")
