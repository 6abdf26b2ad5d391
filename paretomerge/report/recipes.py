"""What `paretomerge plan` and `paretomerge methods` print.

This module imports neither torch nor transformers, so that both commands answer at once.
"""

from collections.abc import Sequence
from typing import TypedDict

from rich.table import Table

from paretomerge.merging.methods import METHODS, Method

_UNITS = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))


class PlanFacts(TypedDict):
    """The facts about a merge that are known before it begins.

    Attributes:
        method: The merge method.
        models: The models that are read.
        layers: Number of layers of the result.
        tensors: Number of tensors of the result.
        dtype: The dtype of the result.
        read: Bytes to read.
        written: Bytes to write.
        memory: Bytes of memory beyond the mapped files.
        seconds: Estimated seconds on one core; None where there is no estimate.
    """

    method: str
    models: Sequence[str]
    layers: int
    tensors: int
    dtype: str
    read: int
    written: int
    memory: int
    seconds: float | None


class MethodRow(TypedDict):
    """A merge method as plain data, fit for JSON."""

    name: str
    rule: str
    parameters: dict[str, object]
    per_source: list[str]
    base: str
    models: list[int | None]
    source: str


def plan_table(facts: PlanFacts) -> Table:
    """Show what a merge will do, one fact per line.

    Args:
        facts: The facts.

    Returns:
        The table.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("method", facts["method"])
    for i, model in enumerate(facts["models"]):
        table.add_row("models" if i == 0 else "", model)
    tensors = facts["tensors"]
    layers = facts["layers"]
    dtype = facts["dtype"]
    table.add_row("result", f"{tensors} tensors, {layers} layers, {dtype}")
    read = readable_size(facts["read"])
    table.add_row("reads", read)
    # The whole result is written beside the target before it takes its place.
    written = readable_size(facts["written"])
    table.add_row("writes", f"{written}, as much free disk is needed")
    memory = readable_size(facts["memory"])
    table.add_row("memory", f"about {memory}")
    table.add_row("time", _time(facts["seconds"]))
    return table


def readable_size(size: float) -> str:
    """Write a number of bytes in decimal units, as the Hub does."""
    for unit, width in _UNITS:
        if size >= width:
            return f"{size / width:.3g} {unit}"
    return f"{size:.0f} bytes"


def readable_duration(seconds: float) -> str:
    """Write seconds in the unit that people would use."""
    # Up to two of a unit the smaller unit says more: 110 s, not 2 min. An estimate is never 0 s.
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def method_rows() -> list[MethodRow]:
    """List the merge methods as plain data."""
    return [_method_row(method) for method in METHODS.values()]


def methods_table() -> Table:
    """Show the merge methods on a terminal."""
    table = Table(
        box=None,
        header_style="bold",
        pad_edge=False,
        padding=(0, 2, 0, 0),
        show_edge=False,
    )
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("rule", ratio=3)
    table.add_column("parameters", ratio=2)
    for row in method_rows():
        parameters = []
        for name, default in row["parameters"].items():
            parameters.append(_parameter_text(name, default))
        parameters_text = ", ".join(parameters)
        table.add_row(row["name"], row["rule"], parameters_text)
    table.caption = "theta_0: the base, tau_i = theta_i - theta_0; defaults in brackets"
    table.caption_justify = "left"
    return table


def methods_markdown() -> str:
    """Write the table of methods for docs/methods.md."""
    # A test compares the documentation with this text, so a new method cannot be left out there.
    lines = ["| method | rule | parameters | base | source |", "|---|---|---|---|---|"]
    for row in method_rows():
        # Names are code in Markdown; their defaults are not.
        parameters = []
        for parameter, default in row["parameters"].items():
            parameters.append(_parameter_text(f"`{parameter}`", default))
        method = f"`{row['name']}`"
        parameters_text = ", ".join(parameters)
        cells = (method, row["rule"], parameters_text, row["base"], row["source"])
        line = " | ".join(cells)
        lines.append(f"| {line} |")
    return "\n".join(lines) + "\n"


def _method_row(method: Method) -> MethodRow:
    defaults: dict[str, object] = {}
    per_source = []
    for parameter in method.parameters:
        defaults[parameter.name] = parameter.default
        if parameter.per_source:
            per_source.append(parameter.name)
    return {
        "name": method.name,
        "rule": method.rule,
        "parameters": defaults,
        "per_source": per_source,
        "base": method.base,
        "models": list(method.models),
        "source": method.paper,
    }


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not estimated: it grows with the sides of the matrices"
    return f"about {readable_duration(seconds)} on one core"


def _parameter_text(name: str, default: object) -> str:
    if default is None:
        return name
    # YAML's spelling: true, not True.
    text = str(default)
    if isinstance(default, bool):
        text = text.lower()
    return f"{name} ({text})"
