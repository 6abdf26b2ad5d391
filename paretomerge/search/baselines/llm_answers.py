"""Check what a language model proposes against the search space."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from paretomerge.endpoint import last_json_object
from paretomerge.errors import shorten
from paretomerge.search.baselines._optuna import enqueued_params
from paretomerge.search.baselines.llm_prompt import describe
from paretomerge.search.encoding import Encoding, ParamDict
from paretomerge.types import Conditions, Params, ParamValue

# In units of each range. Nearer points count as one, since the model reads numbers that are rounded
# to a thousandth.
_DUPLICATE_DISTANCE = 1e-3
_STEP_TOLERANCE = 1e-8  # of a step
_MAX_NAME_LENGTH = 100


class AnswerChecker:
    """Checks a model's answers against the space and the points of a study.

    An inactive parameter may be missing. Nothing is rounded or moved into its range.

    Args:
        space: The parameters.
        conditions: When each parameter is active.
        trials: The trials whose points must not be proposed again: finished, running or waiting.
    """

    def __init__(
        self,
        space: dict[str, BaseDistribution],
        conditions: Conditions | None,
        trials: Sequence[FrozenTrial],
    ) -> None:
        self.space = space
        self._encoding = Encoding(space, conditions)
        valid_points = []
        for trial in trials:
            # A waiting trial has only the values that are enqueued.
            point = {**enqueued_params(trial), **trial.params}
            if self._is_valid(point):
                valid_points.append(point)
        self._evaluated = self._encoding.encode(valid_points)

    def check(self, text: str) -> tuple[ParamDict, list[str]]:
        """Read the point in an answer.

        Args:
            text: The model's reply.

        Returns:
            The point and the problems of the answer; one of the two is empty.
        """
        answer = last_json_object(text)
        if answer is None:
            return {}, ["no JSON object was found in the answer"]
        values = self._valid_values(answer)
        problems = self._problems(answer, values)
        if problems:
            return {}, problems
        x = self._encoding.encode([values])
        difference = np.abs(self._evaluated - x)
        distance = difference.max(1, initial=0.0)
        if (distance < _DUPLICATE_DISTANCE).any():
            return {}, ["this point is known already; choose another"]
        # Decoding gives each inactive parameter a fixed value, whatever the answer says about it.
        point: ParamDict
        point = self._encoding.decode(x[0])
        for name in self.space:
            if self._is_active(name, values):
                point[name] = values[name]
        return point, []

    def _valid_values(self, answer: Mapping[str, object]) -> ParamDict:
        """The answer's values that their parameters can take."""
        values: ParamDict = {}
        for name, distribution in self.space.items():
            if name not in answer:
                continue
            value = answer[name]
            if _is_allowed(value, distribution):
                values[name] = _convert(value, distribution)
        return values

    def _problems(self, answer: Mapping[str, object], values: Params) -> list[str]:
        """What is wrong with an answer, in words for the model."""
        problems = []
        for name in answer:
            if name not in self.space:
                # The name is the model's, and may be as long as its answer.
                short_name = name[:_MAX_NAME_LENGTH]
                problems.append(f"{short_name!a} is not a parameter")
        for name, distribution in self.space.items():
            if name in values or not self._is_active(name, values):
                continue
            actual = "it is missing"
            if name in answer:
                actual = f"got {shorten(answer[name])}"
            quoted = json.dumps(name)
            expected = describe(distribution)
            problems.append(f"{quoted}: expected {expected}; {actual}")
        return problems

    def _is_active(self, name: str, point: Params) -> bool:
        """Whether every parent has a value under which the parameter is active."""
        for parent, values in self._encoding.conditions.get(name, ()):
            if parent not in point or point[parent] not in values:
                return False
        return True

    def _is_valid(self, point: Params) -> bool:
        """Whether a trial's point lies in this space, which may have changed since."""
        for name, distribution in self.space.items():
            if name in point:
                if not _is_allowed(point[name], distribution):
                    return False
            elif self._is_active(name, point):
                return False
        return True


def _is_allowed(value: object, distribution: BaseDistribution) -> bool:
    """Whether a parameter can take exactly this value."""
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        return any(_is_same_choice(choice, value) for choice in choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # NaN is in no range.
    if not distribution.low <= value <= distribution.high:
        return False
    if distribution.step is None:
        return True
    steps = (value - distribution.low) / distribution.step
    error = abs(steps - round(steps))
    return error <= _STEP_TOLERANCE


def _convert(value: object, distribution: BaseDistribution) -> ParamValue:
    """An allowed value in the parameter's own type."""
    if isinstance(distribution, CategoricalDistribution):
        same = [
            choice for choice in distribution.choices if _is_same_choice(choice, value)
        ]
        return same[0]
    assert isinstance(value, (int, float))
    if isinstance(distribution, IntDistribution):
        return round(value)
    return float(value)


def _is_same_choice(choice: ParamValue, value: object) -> bool:
    # `True == 1` in Python, but they are different choices.
    if isinstance(choice, bool) != isinstance(value, bool):
        return False
    return choice == value
