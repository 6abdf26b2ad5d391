"""What a user wants, as one number of several objectives, all maximised."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.types import Array

Kind = Literal["tchebycheff", "sum", "distance"]

MEAN: Literal["mean"] = "mean"
"""The preference for the mean of the objectives, as users write it."""

KNEE: Literal["knee"] = "knee"
"""The choice of the knee, as users write it."""

PreferSetting = Mapping[str, float] | Literal["mean", "knee"]
"""A preference as users write it: objective -> weight, the mean, or the knee of the front."""

Prefer = Sequence[float] | Literal["mean"]
"""A preference among objectives that have an order and no names: their weights, or `mean`."""

# Steuer & Choo's rho: small, so that the sum only breaks ties.
AUGMENTATION = 1e-3
_MIN_EXTENT = 1e-12  # an objective that varies by less is not scaled


@dataclass(frozen=True)
class Scale:
    """The range that each objective is divided by.

    Attributes:
        ideal: `(m,)`, the best values.
        extent: `(m,)`, best minus worst value; 1 for an objective that does not vary.
    """

    ideal: Array
    extent: Array

    @classmethod
    def of(cls, points: ArrayLike) -> "Scale":
        """The scale of points `(n, m)`, such as a front.

        Args:
            points: One point or more.

        Returns:
            The scale.
        """
        values = np.asarray(points, dtype=float)
        ideal = values.max(0)
        return cls(ideal, divisors(ideal - values.min(0)))


def divisors(extent: ArrayLike) -> Array:
    """The extents `(m,)` of the objectives, to divide by; 1 for an objective that does not vary."""
    extents = np.asarray(extent, dtype=float)
    return np.where(extents > _MIN_EXTENT, extents, 1.0)


@dataclass(frozen=True)
class Preference:
    """How much each objective counts.

    Attributes:
        weights: m numbers of 0 or more, scaled to a sum of 1.
        kind: `tchebycheff`: minus the largest weighted shortfall from the ideal, each objective
            divided by its range (Steuer & Choo 1983, augmented); it reaches every part of a front.
            `sum`: the weighted sum of the raw values, for objectives with one unit. `distance`:
            minus the weighted Euclidean distance from the ideal, each objective divided by its
            range; with equal weights the best point is the knee of a front.

    Raises:
        ConfigError: A weight is negative or not finite, or all are 0.
    """

    weights: tuple[float, ...]
    kind: Kind = "tchebycheff"

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, dtype=float)
        is_valid = np.isfinite(weights).all() and (weights >= 0).all()
        if not is_valid or not weights.max(initial=0) > 0:
            raise ConfigError(
                "weights: expected a list of numbers of 0 or more, one of them above 0, "
                f"got {shorten(list(self.weights))}"
            )
        # Huge weights would overflow in their sum.
        relative = weights / weights.max()
        shares = relative / relative.sum()
        object.__setattr__(self, "weights", tuple(shares.tolist()))

    @classmethod
    def mean(cls, m: int) -> "Preference":
        """The mean of m objectives."""
        return cls((1.0,) * m, "sum")

    @classmethod
    def knee(cls, m: int) -> "Preference":
        """The preference for the point of a front that is nearest to the ideal."""
        return cls((1.0,) * m, "distance")

    @classmethod
    def parse(
        cls, prefer: str | Mapping[str, float], objectives: Sequence[str]
    ) -> "Preference":
        """Read a preference as users write it.

        Args:
            prefer: Objective -> weight, `mean` or `knee`. Objectives that are not named get the
                weight 0.
            objectives: Names of the m objectives.

        Returns:
            The preference.

        Raises:
            ConfigError: An objective is unknown, or a weight is not a number of 0 or more.
        """
        if prefer == MEAN:
            return cls.mean(len(objectives))
        if prefer == KNEE:
            return cls.knee(len(objectives))
        if not isinstance(prefer, Mapping):
            raise ConfigError(
                f"prefer: write mean, knee or {{objective: weight}}, not {shorten(prefer)}"
            )
        for name, weight in prefer.items():
            if name not in objectives:
                raise ConfigError(
                    f"prefer: {unknown_name('objective', name, objectives)}"
                )
            # `not <=`: NaN fails every comparison.
            if not isinstance(weight, Real) or not 0 <= weight < math.inf:
                raise ConfigError(
                    f"prefer: weights must be numbers of 0 or more, not {name}={weight}"
                )
        weights = [float(prefer.get(name, 0.0)) for name in objectives]
        if not max(weights) > 0:
            raise ConfigError("prefer: at least one weight must be above 0")
        return cls(tuple(weights))

    def values(self, points: ArrayLike, scale: Scale) -> Array:
        """The value of points.

        Args:
            points: `(..., m)`.
            scale: The ranges of the objectives; a weighted sum does without them.

        Returns:
            `(...,)`, to be maximised.

        Example:
            >>> front = [[1.0, 0.0], [0.8, 0.8], [0.0, 1.0]]
            >>> int(Preference((1, 0)).values(front, Scale.of(front)).argmax())
            0
        """
        outcomes = np.asarray(points, dtype=float)
        weights = np.asarray(self.weights)
        if self.kind == "sum":
            weighted: Array = outcomes @ weights
            return weighted
        scaled = (scale.ideal - outcomes) / scale.extent
        shortfall = weights * scaled
        if self.kind == "distance":
            # A draw of a noisy score may exceed the ideal, which is no loss.
            worst = np.linalg.norm(shortfall.clip(min=0), axis=-1)
        else:
            worst = shortfall.max(-1)
        # Without the weights, so that objectives of weight 0 break ties, too.
        total = scaled.sum(-1)
        value: Array = -worst - AUGMENTATION * total
        return value
