"""The setting `calibration`: statistics of the models on text, for methods that need data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from paretomerge.arguments import (
    Reader,
    describe,
    integer,
    mapping_of,
    number,
    path,
    read_fields,
)
from paretomerge.errors import ConfigError, unknown_name

CalibrationText = str | Mapping[str, str]
"""The text of a model: a file, or `{"task": name}` for the search examples of a task."""


@dataclass(frozen=True)
class CalibrationData:
    """Which text each model reads.

    Attributes:
        data: Model, as in `models` -> a file with text, or `{"task": name}` for the search examples
            of a task of lm-evaluation-harness.
        examples: How many examples each model reads at most.
        max_tokens: The longest example.
        alpha: Of `regmean_pp`: the factor of the entries off the diagonal.

    Raises:
        ConfigError: A number is out of range, or an argument has a wrong type.

    Example:
        >>> CalibrationData({"./math": "math.jsonl", "./code": {"task": "mbpp"}}).examples
        256
    """

    data: Mapping[str, CalibrationText]
    examples: int = 256
    max_tokens: int = 512
    alpha: float = 0.9

    def __post_init__(self) -> None:
        read_fields(self, _READERS, "calibration.")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"calibration.alpha: expected a number from 0 to 1, got {self.alpha}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a study.yaml's key `calibration`."""
        content = asdict(self)
        content["data"] = dict(self.data)
        return content


def as_calibration(name: str, value: object) -> str | CalibrationData:
    """Read the setting `calibration`.

    Args:
        name: The argument, for the message.
        value: A folder, `CalibrationData(...)`, or the same as a mapping.

    Returns:
        The folder, or the text of each model.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(value, CalibrationData):
        return value
    if isinstance(value, Mapping) and "data" in value:
        known = CalibrationData.__dataclass_fields__
        for key in value:
            if key not in known:
                raise ConfigError(f"{name}: {unknown_name('key', key, known)}")
        return CalibrationData(**value)
    try:
        return path(name, value)
    except ConfigError as error:
        raise ConfigError(
            f"{name}: expected a folder of statistics, or "
            f"{{'data': {{'./math': 'math.jsonl'}}}}, got {describe(value)}"
        ) from error


def _text(name: str, value: object) -> CalibrationText:
    if isinstance(value, Mapping):
        task = value.get("task")
        if set(value) == {"task"} and isinstance(task, str) and task:
            return {"task": task}
        raise ConfigError(
            f"{name}: expected a file or {{'task': name}}, got {describe(value)}"
        )
    return path(name, value)


_READERS: Mapping[str, Reader] = {
    "data": mapping_of(_text, "{'./math': 'math.jsonl', './code': {'task': 'mbpp'}}"),
    "examples": integer(1),
    "max_tokens": integer(2),
    "alpha": number,
}
