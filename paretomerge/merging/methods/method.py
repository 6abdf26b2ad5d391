"""The form of a row in the table of methods. Nothing here imports torch: plans are made without it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from paretomerge.merging.methods.inputs import Combine


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method: per source or for the whole merge; required where it has no default."""

    name: str
    default: Any = None
    per_source: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Method:
    """One row: the function `name` of the file `home` beside this one, its parameters, and what it asks of the models.

    base: `required` (deltas are taken from it), `source` (it is one of the models, the first), `optional` (one of the
    models, where there is one), `reference` (used for deltas where there is one) or `none`.
    models: least and most sources besides a base that only serves for deltas.
    symmetric: the order in which the sources are listed does not matter; they are then put into one order.
    whole: whether whole tensors are held in memory, instead of blocks.
    looks: whether it looks at a whole tensor before it merges the first block.
    pace: nanoseconds of one core per entry of each input, from benchmarks/merge.py, for estimates; None where there is none.
    check: (parameters of every source, options) -> what is wrong with them together, or None.
    """

    name: str
    home: str
    parameters: tuple[Parameter, ...] = ()
    base: Literal["required", "source", "optional", "reference", "none"] = "required"
    models: tuple[int, int | None] = (1, None)
    rule: str = ""
    paper: str = ""
    symmetric: bool = True
    looks: bool = True
    pace: float | None = 4.0
    whole: bool = False
    check: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str | None] | None = None

    @property
    def combine(self) -> "Callable[[Any], Combine]":
        """The function: from the inputs of one tensor to a function on its blocks."""
        function: Callable[[Any], Combine] = getattr(
            import_module(f"paretomerge.merging.methods.{self.home}"), self.name
        )
        return function

    @property
    def has_density(self) -> bool:
        return any(parameter.name == "density" for parameter in self.parameters)
