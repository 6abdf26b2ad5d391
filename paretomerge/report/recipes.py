"""What `paretomerge plan` and `paretomerge methods` show. Imports nothing heavy: both answer at once."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from paretomerge.merging.methods import METHODS


def plan_table(told: Mapping[str, Any]) -> Table:
    """What a plan will do, one fact a line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("method", told["method"])
    for i, model in enumerate(told["models"]):
        table.add_row("models" if i == 0 else "", model)
    table.add_row("result", f"{told['tensors']} tensors, {told['layers']} layers, {told['dtype']}")
    table.add_row("reads", gigabytes(told["read"]))
    table.add_row("writes", f"{gigabytes(told['written'])}, as much free disk is needed")
    table.add_row("memory", f"about {gigabytes(told['memory'])}")
    unknown = told["seconds"] is None
    time = (
        "not estimated: it grows with the sides of the matrices"
        if unknown
        else f"about {duration(told['seconds'])} on one core"
    )
    table.add_row("time", time)
    return table


def gigabytes(size: float) -> str:
    """A number of bytes for people, in decimal units."""
    for unit, width in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= width:
            return f"{size / width:.3g} {unit}"
    return f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    return (
        f"{max(seconds, 1):.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def method_rows() -> list[dict[str, Any]]:
    """The table of methods as plain data: name, rule, parameters with their defaults, base and number of models, source."""
    return [
        {
            "name": method.name,
            "rule": method.rule,
            "parameters": {parameter.name: parameter.default for parameter in method.parameters},
            "per_source": [
                parameter.name for parameter in method.parameters if parameter.per_source
            ],
            "base": method.base,
            "models": list(method.models),
            "source": method.paper,
        }
        for method in METHODS.values()
    ]


def methods_table() -> Table:
    """The table of methods for a terminal."""
    table = Table(
        box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), show_edge=False
    )
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("rule", ratio=3)
    table.add_column("parameters", ratio=2)
    for row in method_rows():
        named = ", ".join(
            name if default is None else f"{name} ({_plain(default)})"
            for name, default in row["parameters"].items()
        )
        table.add_row(row["name"], row["rule"], named)
    table.caption = "theta_0: the base, tau_i = theta_i - theta_0; defaults in brackets"
    table.caption_justify = "left"
    return table


def methods_markdown() -> str:
    """The table of methods as it stands in docs/methods.md."""
    lines = ["| method | rule | parameters | base | source |", "|---|---|---|---|---|"]
    for row in method_rows():
        parameters = [
            f"`{name}`" + ("" if default is None else f" ({_plain(default)})")
            for name, default in row["parameters"].items()
        ]
        lines.append(
            f"| `{row['name']}` | {row['rule']} | {', '.join(parameters)} | {row['base']} | {row['source']} |"
        )
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
