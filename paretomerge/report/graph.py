"""Places for the nodes of a graph without cycles, in columns, with few crossing edges.

Sugiyama, Tagawa and Toda 1981: an edge over several columns gets a bend in each of them; then the
nodes and bends of each column are ordered by the mean place of their neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

_SWEEPS = 8

Point = tuple[float, float]
_Bend = tuple[str, str, int]
"""From a node, to a node, in a column."""


@dataclass(frozen=True)
class Place:
    """Where a node stands, and the ways to it.

    Attributes:
        x: Its column.
        y: Its height; columns are centred at 0, and neighbours are 1 apart.
        paths: Input -> the points of the edge from there, both ends included.
    """

    x: float
    y: float
    paths: Mapping[str, Sequence[Point]]

    def path_from(self, node: str) -> Sequence[Point]:
        """The points of the edge from an input."""
        return self.paths[node]


def layered(inputs: Mapping[str, Sequence[str]]) -> dict[str, Place]:
    """Place the nodes of a graph.

    Args:
        inputs: Node -> its inputs, each of which is a node before it.

    Returns:
        Node -> its place. A node stands one column to the right of its last input.
    """
    column: dict[str | _Bend, int] = {}
    for node, sources in inputs.items():
        column[node] = 1 + max((column[source] for source in sources), default=-1)
    chains: dict[tuple[str, str], list[str | _Bend]] = {}
    for node, sources in inputs.items():
        for source in sources:
            chain: list[str | _Bend] = [source]
            for x in range(column[source] + 1, column[node]):
                bend = (source, node, x)
                column[bend] = x
                chain.append(bend)
            chains[source, node] = [*chain, node]
    heights = _heights(column, list(chains.values()))
    places = {}
    for node, sources in inputs.items():
        paths = {}
        for source in sources:
            chain = chains[source, node]
            paths[source] = [(float(column[one]), heights[one]) for one in chain]
        places[node] = Place(float(column[node]), heights[node], paths)
    return places


def _heights(
    column: Mapping[str | _Bend, int], chains: Sequence[Sequence[str | _Bend]]
) -> dict[str | _Bend, float]:
    """Node or bend -> its height."""
    columns: dict[int, list[str | _Bend]] = {}
    for one, x in column.items():
        columns.setdefault(x, []).append(one)
    left: dict[str | _Bend, list[str | _Bend]] = {one: [] for one in column}
    right: dict[str | _Bend, list[str | _Bend]] = {one: [] for one in column}
    for chain in chains:
        for one, other in pairwise(chain):
            right[one].append(other)
            left[other].append(one)
    heights: dict[str | _Bend, float] = {}
    for members in columns.values():
        heights |= _spread(members)
    ascending = sorted(columns)
    for sweep in range(_SWEEPS):
        # To the right by the left neighbours, then back by the right ones.
        neighbours = right if sweep % 2 else left
        order = reversed(ascending) if sweep % 2 else iter(ascending)
        for x in order:
            wanted = {}
            for one in columns[x]:
                near = [heights[other] for other in neighbours[one]]
                wanted[one] = mean(near) if near else heights[one]
            columns[x].sort(key=wanted.__getitem__)
            heights |= _spread(columns[x])
    return heights


def _spread(members: Sequence[str | _Bend]) -> dict[str | _Bend, float]:
    """Heights 1 apart, centred at 0."""
    middle = (len(members) - 1) / 2
    return {one: i - middle for i, one in enumerate(members)}
