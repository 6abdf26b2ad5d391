"""What a language model answers, read and checked against the space before anything is believed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial

from paretomerge.endpoint import last_object
from paretomerge.errors import shorten
from paretomerge.search.encoding import Encoding
from paretomerge.types import Conditions

_NEAR = 1e-3  # of each range: nearer than this is the same point, and as near as the log is rounded


class Answers:
    """Checks a model's answers against the space and the points that are known (finished, running or waiting).

    A parameter that does not count may be left out. Nothing is rounded or moved into its range.
    """

    def __init__(
        self,
        space: dict[str, BaseDistribution],
        conditions: Conditions | None,
        trials: Sequence[FrozenTrial],
    ) -> None:
        self.space = space
        self._encoding = Encoding(space, conditions)
        points = [t.system_attrs.get("fixed_params", {}) | t.params for t in trials]
        self._known = self._encoding.encode([p for p in points if self._whole(p)])

    def check(self, text: str) -> tuple[dict[str, Any], list[str]]:
        """The point in an answer, and what is wrong with it; the point is empty if anything is."""
        answer = last_object(text)
        if answer is None:
            return {}, ["no JSON object was found in the answer"]
        faults = [f"{name[:100]!a} is not a parameter" for name in answer if name not in self.space]
        values = {name: _value(answer[name], d) for name, d in self.space.items() if name in answer}
        point = {name: value[0] for name, value in values.items() if value is not None}
        for name, distribution in self.space.items():
            if name in point or not self._counts(name, point):
                continue
            got = f"got {shorten(answer[name])}" if name in answer else "it is missing"
            faults.append(f"{json.dumps(name)}: expected {described(distribution)}; {got}")
        if faults:
            return {}, faults
        x = self._encoding.encode([point])
        at_rest = self._encoding.decode(x[0])
        if (np.abs(self._known - x).max(1, initial=0.0) < _NEAR).any():
            return {}, ["this point is known already; choose another"]
        return {
            name: point[name] if self._counts(name, point) else at_rest[name] for name in self.space
        }, []

    def _counts(self, name: str, point: Mapping[str, Any]) -> bool:
        """Whether every parent has a value under which `name` counts."""
        return all(
            parent in point and point[parent] in values
            for parent, values in self._encoding.conditions.get(name, ())
        )

    def _whole(self, point: Mapping[str, Any]) -> bool:
        """Whether a known point has its place in this space: nothing missing, and no value of ranges that were other ones."""
        return all(
            _value(point[n], d) is not None if n in point else not self._counts(n, point)
            for n, d in self.space.items()
        )


def described(
    distribution: BaseDistribution, pairs: Sequence[tuple[str, Sequence[Any]]] = ()
) -> str:
    """What values a parameter takes, and when it counts."""
    d: Any = distribution
    if isinstance(d, CategoricalDistribution):
        text = f"one of {json.dumps(list(d.choices), default=str)}"
    else:
        kind = "a whole number" if isinstance(d, IntDistribution) else "a number"
        step = f" in steps of {d.step:g}" if d.step not in (None, 1) else ""
        text = f"{kind} from {d.low:.12g} to {d.high:.12g}{step}{' (think in logarithms)' if d.log else ''}"
    when = " and ".join(
        f"{json.dumps(parent)} is one of {json.dumps(list(values), default=str)}"
        for parent, values in pairs
    )
    return f"{text}; counts only where {when}" if when else text


def _value(value: Any, distribution: BaseDistribution) -> tuple[Any] | None:
    """`(value,)` in the parameter's own type if it is one that the parameter can take, exactly; else None."""
    d: Any = distribution
    if isinstance(d, CategoricalDistribution):
        alike = [
            c for c in d.choices if isinstance(c, bool) == isinstance(value, bool) and c == value
        ]
        return (alike[0],) if alike else None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not d.low <= value <= d.high
    ):  # NaN is in no range
        return None
    if d.step is not None and abs((steps := (value - d.low) / d.step) - round(steps)) > 1e-8:
        return None
    return (round(value) if isinstance(d, IntDistribution) else float(value),)
