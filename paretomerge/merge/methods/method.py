"""The form of a row in the table of methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Inputs:
    """What a method sees of one tensor.

    base: theta_0, or None where the recipe has none.
    sources: theta_i, K of them, the base left out where the method works on deltas. All float32, of one shape.
    knobs: for each source its own settings (`weight`, `density`, ...), in the order of `sources`.
    options: the settings of the whole merge (`lambda`, `normalize`, ...).
    uniform: for each source a function that gives the same U(0, 1) numbers for this tensor whenever it is called.
    """

    base: torch.Tensor | None
    sources: Sequence[torch.Tensor]
    knobs: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    uniform: Sequence[Callable[[], torch.Tensor]]

    def each(self, name: str) -> list[float]:
        return [float(knobs[name]) for knobs in self.knobs]

    def deltas(self) -> list[torch.Tensor]:
        """tau_i = theta_i - theta_0, new tensors."""
        assert self.base is not None
        return [source - self.base for source in self.sources]


@dataclass(frozen=True)
class Knob:
    """A parameter of a method: per source or for the whole merge; required where it has no default."""

    name: str
    default: Any = None
    per_source: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Method:
    """One row: the function, its knobs, and what it asks of the models.

    base: `required` (deltas are taken from it), `source` (it is one of the models), `optional` or `none`.
    models: least and most sources besides a base that only serves for deltas.
    """

    name: str
    combine: Callable[[Inputs], torch.Tensor]
    knobs: tuple[Knob, ...]
    base: Literal["required", "source", "optional", "none"] = "required"
    models: tuple[int, int | None] = (1, None)
    paper: str = ""

    @property
    def has_density(self) -> bool:
        return any(knob.name == "density" for knob in self.knobs)
