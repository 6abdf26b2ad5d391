"""Readers of arguments: each checks one value and returns it as plain Python data.

A *reader* takes an argument's name and its value. It returns the value, converted where that is
harmless (numpy scalars, paths), or raises a `ConfigError` that names the argument and says what to
write. A class of settings lists a reader for each of its fields, and `read_fields` applies them.
"""

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from paretomerge.errors import ConfigError, ErrorCollector, shorten

Reader = Callable[[str, Any], Any]
"""Takes an argument's name and value; returns the value to store."""


def read_fields(
    instance: object, readers: Mapping[str, Reader], prefix: str = ""
) -> None:
    """Replace the fields of a frozen dataclass with what their readers return.

    Args:
        instance: The instance, in its `__post_init__`.
        readers: Field -> its reader.
        prefix: Stands before the fields' names in messages, such as `budget.`.

    Raises:
        ConfigError: Readers refuse their values; all of them are reported at once.
    """
    errors = ErrorCollector()
    for field, read in readers.items():
        with errors.collect():
            value = read(f"{prefix}{field}", getattr(instance, field))
            # The class is frozen, so its fields cannot be assigned.
            object.__setattr__(instance, field, value)
    errors.raise_if_any()


def optional(read: Reader) -> Reader:
    """Make a reader that also takes None."""

    def read_optional(name: str, value: object) -> Any:
        if value is None:
            return None
        return read(name, value)

    return read_optional


def sequence_of(read: Reader, example: str) -> Reader:
    """Make a reader of lists; it returns a tuple.

    Args:
        read: Reads each entry. It gets the name of the list.
        example: A list as the user would write it, for the message.
    """

    def read_sequence(name: str, value: object) -> tuple[Any, ...]:
        # Text and paths are refused by name: text is a sequence of its letters.
        is_single = isinstance(value, (str, bytes, os.PathLike, Mapping))
        if is_single or not isinstance(value, Iterable):
            raise ConfigError(
                f"{name}: expected a list, such as {example}, got {describe(value)}"
            )
        entries = []
        for entry in value:
            entries.append(read(name, entry))
        return tuple(entries)

    return read_sequence


def mapping_of(read: Reader, example: str) -> Reader:
    """Make a reader of mappings from text; it returns a dict.

    Args:
        read: Reads each value. It gets the name of the mapping and the key.
        example: A mapping as the user would write it, for the message.
    """

    def read_mapping(name: str, value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected {example}, got {describe(value)}")
        entries = {}
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{name}: expected {example}, got the key {key!r}")
            entries[str(key)] = read(f"{name}.{key}", entry)
        return entries

    return read_mapping


def instance_of(kind: Any, example: str) -> Reader:
    """Make a reader of objects of a class.

    Args:
        kind: The class, or a union of classes.
        example: An object as the user would write it, for the message.
    """

    def read_instance(name: str, value: object) -> object:
        if isinstance(value, kind):
            return value
        raise ConfigError(f"{name}: expected {example}, got {describe(value)}")

    return read_instance


def integer(least: int | None = None) -> Reader:
    """Make a reader of whole numbers, numpy's included; it returns an int.

    Args:
        least: The least number that is allowed.
    """

    def read_integer(name: str, value: object) -> int:
        number = as_integer(value)
        if number is None:
            raise ConfigError(f"{name}: expected a whole number, got {describe(value)}")
        if least is not None and number < least:
            raise ConfigError(f"{name}: must be {least} or more, not {number}")
        return number

    return read_integer


def number(name: str, value: object) -> float:
    """Read a finite number, numpy's and torch's included; it becomes a float."""
    converted = None
    # A bool is a number to Python, but a mistake in an argument.
    if not isinstance(value, (bool, np.bool_)):
        converted = as_float(value)
    if converted is None or not math.isfinite(converted):
        raise ConfigError(f"{name}: expected a finite number, got {describe(value)}")
    return converted


def seconds(name: str, value: object) -> float:
    """Read a duration in seconds, 0 or more."""
    duration = number(name, value)
    if duration < 0:
        raise ConfigError(f"{name}: expected seconds, 0 or more, got {describe(value)}")
    return duration


def function(name: str, value: object) -> Callable[..., Any]:
    """Read something that can be called."""
    if not callable(value):
        raise ConfigError(f"{name}: expected a function, got {describe(value)}")
    return value


def pair(name: str, value: object) -> tuple[float, float]:
    """Read a lower and an upper bound, two finite numbers. Their order is not checked."""
    try:
        if isinstance(value, (list, tuple, np.ndarray)) and len(value) == 2:
            low, high = value
            return number(name, low), number(name, high)
    except ConfigError:
        pass  # the message below shows both bounds
    raise ConfigError(
        f"{name}: expected two numbers [low, high] with low < high, got {describe(value)}"
    )


def flag(name: str, value: object) -> bool:
    """Read true or false."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ConfigError(f"{name}: expected True or False, got {describe(value)}")


def word(name: str, value: object) -> str:
    """Read text that is not empty."""
    if isinstance(value, str) and value:
        return str(value)
    raise ConfigError(f"{name}: expected text that is not empty, got {describe(value)}")


def label(name: str, value: object) -> str:
    """Read text that may be empty."""
    if isinstance(value, str):
        return str(value)
    raise ConfigError(f"{name}: expected text, got {describe(value)}")


def path(name: str, value: object) -> str:
    """Read a path, as text or as a `Path`; `~` becomes the home folder."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    # A NUL ends a path in the operating system's calls, which raise ValueError for it.
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"{name}: expected a path, got {describe(value)}")
    return expand_home(str(text))


def model(name: str, value: object) -> str:
    """Read a model: a folder or a name on the Hugging Face Hub, perhaps with `+adapter`."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(
            f"{name}: expected a folder or a name on the Hugging Face Hub, "
            f"got {describe(value)}"
        )
    # An adapter may be in the home folder, too.
    parts = [expand_home(part) for part in text.split("+")]
    return "+".join(parts)


def expand_home(text: str) -> str:
    """Replace `~` or `~user` at the beginning of a path; of an unknown user it stays."""
    # Not `Path(text).expanduser()`, which would also turn `./x` into `x`.
    return os.path.expanduser(text)  # noqa: PTH111


def as_float(value: object) -> float | None:
    """Turn a number of Python, numpy or torch into a float.

    Args:
        value: Anything.

    Returns:
        The float, which is infinite where the number is too large for one; None where the value is
        no number. Text is no number.
    """
    if isinstance(value, (str, bytes, bytearray)):
        return None
    # An array of one number has a float, too, but is meant as a list.
    if getattr(value, "ndim", 0):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def as_integer(value: object) -> int | None:
    """Turn a whole number of Python, numpy or torch into an int; None for anything else."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def plain_data(value: Any) -> Any:
    """Turn numpy's and torch's scalars and arrays, tuples and paths in data into Python's own.

    Args:
        value: Data as for a YAML file.

    Returns:
        The data, with lists for tuples and arrays, and text for paths.
    """
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return plain_scalar(value)


def plain_scalar(value: Any) -> Any:
    """Turn a numpy or torch scalar or array into Python's own; other values stay."""
    if isinstance(value, np.generic) or hasattr(value, "tolist"):
        return value.tolist()
    return value


def describe(value: object) -> str:
    """Show a wrong value in a message; a class is most often an object without parentheses."""
    if isinstance(value, type):
        name = value.__name__
        return f"the class {name}; write {name}(...) for an object of it"
    return shorten(value)
