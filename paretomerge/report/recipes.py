"""What `paretomerge plan` and `paretomerge methods` print. Imports nothing heavy.

Both answer at once.
"""

from collections.abc import Sequence
from typing import TypedDict

from rich.table import Table

from paretomerge.merging.methods import METHODS, Method

_UNITS = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))


class PlanFacts(TypedDict):
    """What is known of a merge before it begins.

    Attributes:
        method: The merge method.
        models: The models that are read.
        layers: Layers of the result.
        tensors: Tensors of the result.
        dtype: Its dtype.
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
    """Show what a merge will do, one fact a line.

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
    tensors, layers = facts["tensors"], facts["layers"]
    table.add_row("result", f"{tensors} tensors, {layers} layers, {facts['dtype']}")
    table.add_row("reads", readable_size(facts["read"]))
    table.add_row(
        "writes", f"{readable_size(facts['written'])}, as much free disk is needed"
    )
    table.add_row("memory", f"about {readable_size(facts['memory'])}")
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
        parameters = [_parameter_text(*item) for item in row["parameters"].items()]
        table.add_row(row["name"], row["rule"], ", ".join(parameters))
    table.caption = "theta_0: the base, tau_i = theta_i - theta_0; defaults in brackets"
    table.caption_justify = "left"
    return table


def methods_markdown() -> str:
    """The table of methods as it stands in docs/methods.md."""
    lines = ["| method | rule | parameters | base | source |", "|---|---|---|---|---|"]
    for row in method_rows():
        # Names are code in Markdown; their defaults are not.
        parameters = [
            _parameter_text(f"`{name}`", d) for name, d in row["parameters"].items()
        ]
        name, rule = f"`{row['name']}`", row["rule"]
        cells = (name, rule, ", ".join(parameters), row["base"], row["source"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _method_row(method: Method) -> MethodRow:
    parameters = method.parameters
    return {
        "name": method.name,
        "rule": method.rule,
        "parameters": {parameter.name: parameter.default for parameter in parameters},
        "per_source": [
            parameter.name for parameter in parameters if parameter.per_source
        ],
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
    text = str(default).lower() if isinstance(default, bool) else str(default)
    return f"{name} ({text})"
