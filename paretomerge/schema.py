"""The sections of a study.yaml, as data: unknown keys are refused, values are checked, nothing is opened."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from paretomerge.space.config import RoutesConfig, Strict


class ObjectiveConfig(Strict):
    """One of `task`, `function`, `sparsity` and `size`. `direction` overrides what the task says of itself."""

    task: str | None = None
    metric: str | None = None
    function: str | None = None
    sparsity: bool = False
    size: Literal["layers", "parameters", "seconds_per_token"] | None = None
    name: str | None = None
    direction: str | None = Field(default=None, pattern="^(maximize|minimize)$")

    @model_validator(mode="after")
    def _one_kind(self) -> "ObjectiveConfig":
        kinds = [self.task is not None, self.function is not None, self.sparsity, self.size is not None]
        if sum(kinds) != 1:
            raise ValueError("expected one of `task`, `function`, `sparsity: true` and `size`")
        return self

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        return self.task or self.size or ("sparsity" if self.sparsity else str(self.function).partition(":")[2])


class ConstraintConfig(ObjectiveConfig):
    """A score, named like an objective, and the bound that it must keep: one of `at_least` and `at_most`."""

    at_least: float | None = Field(default=None, allow_inf_nan=False)
    at_most: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_bound(self) -> "ConstraintConfig":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("expected one of `at_least` and `at_most`")
        if self.direction is not None:
            raise ValueError("direction: expected none, for a bound is in the score's own units")
        return self

    @property
    def scored(self) -> ObjectiveConfig:
        """What is scored, without the bound."""
        return ObjectiveConfig(**self.model_dump(exclude={"at_least", "at_most", "direction"}))


class BudgetConfig(Strict):
    """When to stop. `until`: a percentage of the hypervolume. `trials` may stand here or at the top of the file."""

    trials: int | None = None
    until: str | None = None
    patience: int = Field(default=5, ge=1)

    @field_validator("until", mode="before")
    @classmethod
    def _percentage(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?\s*%", value.strip()) and 0 < _share(value) < 1):
            raise ValueError("expected a percentage of the hypervolume above 0 and below 100, such as 1%")
        return value

    @property
    def share(self) -> float | None:
        """`until` as a fraction."""
        return None if self.until is None else _share(self.until)


def _share(percentage: str) -> float:
    return float(percentage.strip().rstrip("% ")) / 100


class ThenConfig(Strict):
    """A second level: `trials` more, on routes through the models and `front` merges of the first level's front, or the one that a
    preference picks. sampler: the first level's unless another is named.
    """

    routes: RoutesConfig = RoutesConfig()
    trials: int = Field(default=60, ge=1)
    front: int | None = Field(default=None, ge=1)
    prefer: dict[str, float] | None = None
    sampler: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_pool(self) -> "ThenConfig":
        if self.routes.match is not None:
            raise ValueError("routes.match: expected none, for the second level does not begin with hand-overs")
        if self.front is not None and self.prefer is not None:
            raise ValueError("expected one of `front` and `prefer`, got both")
        if self.prefer is not None and (min(self.prefer.values(), default=0) < 0 or not sum(self.prefer.values()) > 0):
            raise ValueError(f"prefer: expected weights of 0 or more, one of them above 0, got {self.prefer}")
        return self


class EvaluateConfig(Strict):
    """How lm-evaluation-harness runs."""

    include_path: str | None = None
    data_root: str | None = None
    splits: dict[str, str] | None = None
    search_items: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _both_splits(self) -> "EvaluateConfig":
        if self.splits is not None and set(self.splits) != {"search", "held_out"}:
            raise ValueError(f"splits: expected `search` and `held_out`, got {', '.join(self.splits)}")
        return self
