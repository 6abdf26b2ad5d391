"""Digests of scoring functions: whether a resumed study still asks the same question.

A digest must change when the function computes something else, and must not change for an edit
elsewhere in a script. Functions with a state (partial functions, closures, callable objects) are
described with that state.
"""

import functools
import hashlib
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType

_DIGITS = 16
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MOST_LEVELS = 8  # of nested state; deeper structures are pickled whole


def function_digest(function: str | Callable[..., object], folder: Path) -> str:
    """Digest what decides the scores of a function.

    Args:
        function: The function, or `module:function`.
        folder: The folder that modules are searched for first.

    Returns:
        16 hexadecimal digits; "" where no file beside the study decides it.
    """
    if isinstance(function, str):
        module, _, _ = function.partition(":")
        file = folder / (module.replace(".", "/") + ".py")
        return file_digest(file)
    module_file = _module_file(function)
    if module_file is not None and module_file.parent == folder.resolve():
        # As for `module:function`, so that a study and its study.yaml are the same study.
        return file_digest(module_file)
    return _text_digest(_describe(function))


def file_digest(file: Path) -> str:
    """Digest a file.

    Args:
        file: The file.

    Returns:
        16 hexadecimal digits; "" where there is no such file.
    """
    # A missing file is reported by the evaluator that needs it, with the key that names it.
    if not file.is_file():
        return ""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGITS]


def is_importable(function: Callable[..., object]) -> bool:
    """Whether `module:name` of the function, in another process, is this very function."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    name = getattr(function, "__qualname__", "")
    # `__main__` is another module in the process that reads the name.
    if module is None or module.__name__ == "__main__":
        return False
    return getattr(module, name, None) is function


def _module_file(function: Callable[..., object]) -> Path | None:
    """The file of the module that holds the function under its name; None for all others."""
    if not is_importable(function):
        return None
    module = sys.modules[function.__module__]
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def _describe(value: object, level: int = 0) -> str:
    """A text that is the same for values that compute the same."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if level > _MOST_LEVELS:
        return _pickled(value)
    deeper = functools.partial(_describe, level=level + 1)
    if isinstance(value, functools.partial):
        parts = [deeper(value.func), deeper(value.args), deeper(value.keywords)]
        return f"partial({', '.join(parts)})"
    if isinstance(value, MethodType):
        return f"method({deeper(value.__func__)}, {deeper(value.__self__)})"
    if isinstance(value, FunctionType):
        return _describe_function(value, level)
    if isinstance(value, Mapping):
        pairs = [f"{deeper(key)}: {deeper(item)}" for key, item in value.items()]
        return f"{{{', '.join(sorted(pairs))}}}"
    if isinstance(value, (list, tuple)):
        items = [deeper(item) for item in value]
        return f"[{', '.join(items)}]"
    if isinstance(value, type):
        return f"class({_source(value) or value.__qualname__})"
    if callable(value) and hasattr(value, "__dict__"):
        return f"object({deeper(type(value))}, {deeper(vars(value))})"
    return _pickled(value)


def _describe_function(function: FunctionType, level: int) -> str:
    code = function.__code__
    # Of the code and not of the function: the latter follows `functools.wraps` to another function.
    # A lambda's source is its whole line, which may say other things.
    text = "" if code.co_name == "<lambda>" else _source(code)
    state: list[object] = [function.__defaults__, function.__kwdefaults__]
    for cell in function.__closure__ or ():
        try:
            state.append(cell.cell_contents)
        except ValueError:  # a cell that is not filled yet
            state.append(None)
    return f"function({text or _describe_code(code)}, {_describe(state, level + 1)})"


def _describe_code(code: CodeType) -> str:
    """The instructions of a function without a source, such as one typed at a prompt."""
    constants = []
    for constant in code.co_consts:
        is_code = isinstance(constant, CodeType)
        constants.append(_describe_code(constant) if is_code else repr(constant))
    parts = [code.co_code.hex(), *constants, *code.co_names, *code.co_varnames]
    return " ".join(parts)


def _source(value: CodeType | type) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""


def _pickled(value: object) -> str:
    try:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()
    except Exception:  # whatever an object of the user's raises: its class must do
        return f"{type(value).__module__}.{type(value).__qualname__}"


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
