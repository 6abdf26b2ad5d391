"""How alike fine-tunes are and where they moved: plain data, and its look on a terminal."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from paretomerge.checkpoint.architecture import ROLES, Architecture
from paretomerge.merging.delta_profile import DeltaProfile, order_by_similarity
from paretomerge.types import Array

_BARS = " ▁▂▃▄▅▆▇█"
_WIDEST = 60  # layers on one line; of more, neighbours share a bar


def kinship_rows(profile: DeltaProfile, architecture: Architecture) -> dict[str, Any]:
    """Fit for JSON: similarities by pair of names, and of each source the norm of its delta, in all, per layer and per role.

    architecture: the base's. Embeddings, final norm and head are in the role `other` and in no layer.
    """
    names = profile.names
    matrices = {
        "cosine": profile.cosine,
        "pearson": profile.pearson,
        "euclidean": profile.euclidean,
    }
    layers = np.sqrt(profile.by_layer(architecture))
    roles = np.sqrt(_by_role(profile, architecture))
    return {
        "base": profile.base,
        "models": dict(profile.sources),
        "entries": profile.size,
        **{
            kind: {
                a: dict(zip(names, row, strict=True))
                for a, row in zip(names, m.tolist(), strict=True)
            }
            for kind, m in matrices.items()
        },
        "norms": dict(zip(names, profile.norms.tolist(), strict=True)),
        "layers": {name: layers[:, i].tolist() for i, name in enumerate(names)},
        "roles": {
            name: dict(zip(ROLES, roles[:, i].tolist(), strict=True))
            for i, name in enumerate(names)
        },
        "order": list(order_by_similarity(profile)),
    }


def kinship_tables(profile: DeltaProfile, architecture: Architecture) -> Group:
    """The three similarities, then norms and the layers as bars."""
    told = kinship_rows(profile, architecture)
    pairs = [
        _pairs(kind, told[kind], digits)
        for kind, digits in (("cosine", 3), ("pearson", 3), ("euclidean", 4))
    ]
    heading = f"Deltas to {profile.base}, {profile.size:,} entries"
    order = f"From the least alike on: {', '.join(told['order'])}"
    return Group(
        heading,
        "",
        *(part for table in pairs for part in (table, "")),
        _moved(told, architecture.depth),
        "",
        order,
    )


def _pairs(kind: str, rows: Mapping[str, Mapping[str, float]], digits: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(kind, no_wrap=True)
    for name in rows:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            *(
                f"{value:.{digits}g}" if kind == "euclidean" else f"{value:.{digits}f}"
                for value in row.values()
            ),
        )
    return table


def _moved(told: Mapping[str, Any], depth: int) -> Table:
    """A line for each source: norm, bars on one scale for all, and how its squared norm is shared by the roles."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("moved", no_wrap=True)
    table.add_column("norm", justify="right")
    table.add_column(f"layers 0 to {depth - 1}" if depth else "", no_wrap=True)
    for role in ROLES:
        table.add_column(role, justify="right")
    highest = max((max(row, default=0.0) for row in told["layers"].values()), default=0.0) or 1.0
    for name, norm in told["norms"].items():
        shares = [f"{value**2 / (norm**2 or 1):.0%}" for value in told["roles"][name].values()]
        table.add_row(name, f"{norm:.4g}", _bars(told["layers"][name], highest), *shares)
    return table


def _bars(values: list[float], highest: float) -> str:
    parts = np.array_split(np.asarray(values), min(len(values), _WIDEST)) if values else []
    return "".join(_BARS[round(float(part.mean()) / highest * (len(_BARS) - 1))] for part in parts)


def _by_role(profile: DeltaProfile, architecture: Architecture) -> Array:
    """(roles, K) squared norms, whatever the layer."""
    mass = np.zeros((len(ROLES), len(profile.sources)))
    for name, row in profile.mass.items():
        mass[ROLES.index(architecture.role(name))] += row
    return mass
