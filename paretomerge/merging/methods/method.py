"""The columns of the table of merge methods.

Plans are made without torch, so this module does not import it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from paretomerge.merging.statistics import StatisticKind
from paretomerge.types import Params

if TYPE_CHECKING:
    from paretomerge.merging.block import MergeFunction

ROWS_OF_PIECE = 2048
"""Rows that methods which multiply matrices merge at a time: a head can have 100,000.

These are not the rows of a block, because products of matrices round differently where their sizes
differ.
"""

BaseRole = Literal["required", "source", "optional", "reference", "none"]
"""What a method does with `base_model`. See `Method.base`."""

ParameterCheck = Callable[[Sequence[Params], Params], str | None]
"""(parameters of every source, options of the merge) -> what is wrong with them, or None."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a merge method.

    Attributes:
        name: Its name in a recipe.
        default: The value where a recipe gives none; None where a recipe must give one.
        per_source: True if each source has its own value, False if the whole merge has one.
        low: The smallest allowed number.
        high: The largest allowed number.
        choices: The allowed values, if they are not a range of numbers.
        note: What a plan tells the user of a recipe that sets another value than the default.
    """

    name: str
    default: bool | int | float | None = None
    per_source: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[bool | str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Method:
    """One row of the table of merge methods.

    Attributes:
        name: The method's name in a recipe (`merge_method`), and the name of its function.
        family: The module beside this one that has the function.
        parameters: What a recipe can set.
        base: What the method does with `base_model`. `required`: deltas are taken from it.
            `source`: it is the first of the models. `optional`: it is the first of the models where
            there is one. `reference`: deltas are taken from it where there is one. `none`: nothing.
        models: The least and the most number of sources (None: no limit). A base that only serves
            for deltas does not count.
        rule: The formula in one line.
        paper: The source.
        symmetric: Whether the order of the sources does not matter. A plan then sorts them.
        multi_pass: Whether the method reads a whole tensor before it merges the first block.
        ns_per_entry: Nanoseconds of one core per entry of each input, measured by
            benchmarks/merge.py, for estimates; None where there is no estimate.
        whole_tensors: Whether the method holds whole tensors in memory instead of blocks.
        zero_weight_counts: Whether a source with weight 0 still changes the merge, so that it is
            not the same as leaving the source out.
        scales_with_lambda: Whether weights times a positive number give the same merge as `lambda`
            times that number, so that a search needs no `lambda`.
        baseline_weight: The weight of every source in the method's baseline recipe of a search;
            None for 1 / K.
        baseline_density: The density there.
        check: Finds wrong combinations of parameter values.
        statistics: The kind of statistics of the sources that the method needs; see
            `paretomerge.merging.statistics`.
    """

    name: str
    family: str
    parameters: tuple[Parameter, ...] = ()
    base: BaseRole = "required"
    models: tuple[int, int | None] = (1, None)
    rule: str = ""
    paper: str = ""
    symmetric: bool = True
    multi_pass: bool = True
    ns_per_entry: float | None = 4.0
    whole_tensors: bool = False
    zero_weight_counts: bool = False
    scales_with_lambda: bool = True
    baseline_weight: float | None = 0.7
    baseline_density: float = 0.5
    check: ParameterCheck | None = None
    statistics: StatisticKind | None = None

    @property
    def function(self) -> "MergeFunction":
        """The function: from the inputs of one tensor to a function that merges its blocks."""
        module = import_module(f"paretomerge.merging.methods.{self.family}")
        function: MergeFunction = getattr(module, self.name)
        return function

    @property
    def has_density(self) -> bool:
        """Whether the method sparsifies deltas to a `density`."""
        return any(parameter.name == "density" for parameter in self.parameters)
