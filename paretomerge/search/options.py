"""Checks of the options that samplers take: types, lists of numbers, seeds."""

import math
import secrets
from dataclasses import Field, fields
from numbers import Integral, Real
from typing import ClassVar, Protocol

import numpy as np

from paretomerge.errors import ConfigError, shorten
from paretomerge.types import Array


class Dataclass(Protocol):
    """Any instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]


def check_options(owner: str, options: Dataclass) -> None:
    """Check each field of a dataclass against the type of its default.

    Args:
        owner: Name of the sampler, for the message.
        options: The dataclass.

    Raises:
        ConfigError: A field has a value of another type.
    """
    for field in fields(options):
        # Other fields are state, which users do not set.
        if field.init:
            name = field.name
            value = getattr(options, name)
            check_option(f"{owner}: {name}", field.default, value)


def check_option(name: str, default: object, value: object) -> None:
    """Check one option against the type of its default.

    A bool needs a bool, an int an integer, a float any finite number. Options with other defaults
    are not checked.

    Args:
        name: The option, for the message.
        default: Its default value.
        value: The value to check.

    Raises:
        ConfigError: The value has another type.
    """
    # bool is a subclass of int, but `true` is no number in a study.yaml.
    is_bool = isinstance(value, bool)
    if isinstance(default, bool):
        valid = is_bool
        expected = "true or false"
    elif isinstance(default, int):
        valid = isinstance(value, Integral) and not is_bool
        expected = "a whole number"
    elif isinstance(default, float):
        valid = isinstance(value, Real) and not is_bool and math.isfinite(value)
        expected = "a number"
    else:
        return
    if not valid:
        actual = shorten(value)
        raise ConfigError(f"{name}: expected {expected}, got {actual}")


def number_vector(value: object) -> Array:
    """Convert a list of numbers to an array `(n,)`; anything else becomes an empty array."""
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return np.zeros(0)
    if numbers.ndim == 1:
        return numbers
    return np.zeros(0)


def resolve_seed(seed: int | None) -> int:
    """A seed of 32 bits from any integer; a random one for None, as in Optuna's samplers.

    Raises:
        ConfigError: The seed is not an integer.
    """
    if seed is None:
        return secrets.randbits(32)
    check_option("seed", 0, seed)
    return seed % 2**32
