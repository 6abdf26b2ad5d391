"""How similar fine-tunes are and which layers they changed: as plain data and as tables."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from paretomerge.checkpoint.architecture import ROLES, Architecture
from paretomerge.merging.delta_profile import DeltaProfile, order_by_similarity
from paretomerge.types import Array

_BARS = " ▁▂▃▄▅▆▇█"
_MAX_BARS = 60  # layers on one line; in deeper models, neighbours share a bar

Matrix = Mapping[str, Mapping[str, float]]
"""Name -> name -> value."""


class KinshipRows(TypedDict):
    """Similarities of models and the size of their deltas, fit for JSON.

    Attributes:
        base: The base.
        models: Name -> path.
        entries: Number of weights compared.
        cosine: Cosine of each pair of deltas.
        pearson: Pearson correlation of each pair of deltas.
        euclidean: Euclidean distance of each pair of deltas.
        norms: Name -> norm of the delta.
        layers: Name -> norm of the delta in each layer.
        roles: Name -> role -> norm of the delta. Embeddings, final norm and head are in `other`,
            and in no layer.
        order: Names, the least similar first.
    """

    base: str
    models: dict[str, str]
    entries: int
    cosine: Matrix
    pearson: Matrix
    euclidean: Matrix
    norms: dict[str, float]
    layers: dict[str, list[float]]
    roles: Matrix
    order: list[str]


def kinship_rows(profile: DeltaProfile, architecture: Architecture) -> KinshipRows:
    """Write a profile of deltas as plain data.

    Args:
        profile: The profile.
        architecture: The base's architecture.

    Returns:
        The data.
    """
    names = profile.names
    norms = profile.norms.tolist()
    # The profile holds squared norms, which add up over tensors; norms do not.
    layers = np.sqrt(profile.by_layer(architecture))
    roles = np.sqrt(_squared_norms_by_role(profile, architecture))
    layers_of: dict[str, list[float]] = {}
    for i, name in enumerate(names):
        layers_of[name] = layers[:, i].tolist()
    return {
        "base": profile.base,
        "models": dict(profile.sources),
        "entries": profile.size,
        "cosine": _named(names, names, profile.cosine),
        "pearson": _named(names, names, profile.pearson),
        "euclidean": _named(names, names, profile.euclidean),
        "norms": dict(zip(names, norms, strict=True)),
        "layers": layers_of,
        "roles": _named(names, ROLES, roles.T),
        "order": list(order_by_similarity(profile)),
    }


def kinship_tables(profile: DeltaProfile, architecture: Architecture) -> Group:
    """Show a profile of deltas on a terminal.

    There are three tables of similarities, then a table of norms with the layers as bars.

    Args:
        profile: The profile.
        architecture: The base's architecture.

    Returns:
        The tables.
    """
    rows = kinship_rows(profile, architecture)
    parts: list[RenderableType] = [
        f"Deltas to {profile.base}, {profile.size:,} entries",
        "",
        _similarity_table("cosine", rows["cosine"], ".3f"),
        "",
        _similarity_table("pearson", rows["pearson"], ".3f"),
        "",
        _similarity_table("euclidean", rows["euclidean"], ".4g"),
        "",
        _norms_table(rows, architecture.depth),
        "",
        f"Least similar first: {', '.join(rows['order'])}",
    ]
    return Group(*parts)


def _named(
    row_names: Sequence[str], column_names: Sequence[str], matrix: Array
) -> Matrix:
    named = {}
    for name, row in zip(row_names, matrix.tolist(), strict=True):
        named[name] = dict(zip(column_names, row, strict=True))
    return named


def _similarity_table(kind: str, rows: Matrix, number_format: str) -> Table:
    table = _plain_table()
    table.add_column(kind, no_wrap=True)
    for name in rows:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        cells = [format(value, number_format) for value in row.values()]
        table.add_row(name, *cells)
    return table


def _norms_table(rows: KinshipRows, depth: int) -> Table:
    """A table with a row for each source.

    It shows the norm, a bar for each layer, and each role's share of the squared norm.
    """
    table = _plain_table()
    table.add_column("moved", no_wrap=True)
    table.add_column("norm", justify="right")
    layers_heading = f"layers 0 to {depth - 1}" if depth else ""
    table.add_column(layers_heading, no_wrap=True)
    for role in ROLES:
        table.add_column(role, justify="right")
    # One scale for all sources, so that their bars can be compared.
    highest = 0.0
    for norms in rows["layers"].values():
        highest = max(highest, *norms, 0.0)
    for name, norm in rows["norms"].items():
        squared_norm = norm**2 or 1.0  # a source that is the base has not moved
        # Shares of the squared norm, since only squares add up to the whole.
        shares = []
        for role_norm in rows["roles"][name].values():
            share = role_norm**2 / squared_norm
            shares.append(f"{share:.0%}")
        layer_norms = rows["layers"][name]
        bars = _bars(layer_norms, highest or 1.0)
        table.add_row(name, f"{norm:.4g}", bars, *shares)
    return table


def _bars(values: Sequence[float], highest: float) -> str:
    if not values:
        return ""
    n_bars = min(len(values), _MAX_BARS)
    text = ""
    for part in np.array_split(np.asarray(values), n_bars):
        height = float(part.mean()) / highest
        level = round(height * (len(_BARS) - 1))
        text += _BARS[level]
    return text


def _plain_table() -> Table:
    return Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))


def _squared_norms_by_role(profile: DeltaProfile, architecture: Architecture) -> Array:
    """Squared norms `(roles, K)` of the K sources' deltas, over all layers."""
    n_sources = len(profile.sources)
    squared_norms = np.zeros((len(ROLES), n_sources))
    for tensor, row in profile.mass.items():
        role = architecture.role(tensor)
        squared_norms[ROLES.index(role)] += row
    return squared_norms
