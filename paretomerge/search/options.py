"""What options of samplers may be: of the kind of their defaults, lists of numbers, seeds."""

import math
import secrets
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretomerge.errors import ConfigError, shorten


def check_options(owner: str, options: Any) -> None:
    """ConfigError for the first field of a dataclass that is not of the kind of its default."""
    for field in fields(options):
        if field.init:
            check_option(f"{owner}: {field.name}", field.default, getattr(options, field.name))


def check_option(name: str, default: Any, value: Any) -> None:
    """true or false where the default is, a whole number or any finite number where that is; of other defaults nothing is known."""
    if isinstance(default, bool):
        expected, good = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        expected, good = (
            "a whole number",
            isinstance(value, Integral) and not isinstance(value, bool),
        )
    elif isinstance(default, float):
        expected, good = (
            "a number",
            isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value),
        )
    else:
        return
    if not good:
        raise ConfigError(f"{name}: expected {expected}, got {shorten(value)}")


def number_vector(value: Any) -> NDArray[np.float64]:
    """`(n,)`; empty where it is anything else."""
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return np.zeros(0)
    return numbers if numbers.ndim == 1 else np.zeros(0)


def resolve_seed(seed: int | None) -> int:
    """What generators take: any integer made one of 32 bits; None is drawn by chance, as Optuna's samplers do."""
    check_option("seed", 0, 0 if seed is None else seed)
    return secrets.randbits(32) if seed is None else seed % 2**32
