"""Mathematics of several objectives, on arrays `(n, m)` of n points, every objective maximised.

- `front`: dominance and hypervolume. moocore does the computations.
- `ranking`: order points, and pick one from a front.
"""

from paretomerge.pareto.front import (
    hypervolume,
    hypervolume_contributions,
    nondominated,
    nondominated_fronts,
    reference_point,
)
from paretomerge.pareto.ranking import knee, normalised, preferred, ranked

__all__ = [
    "hypervolume",
    "hypervolume_contributions",
    "knee",
    "nondominated",
    "nondominated_fronts",
    "normalised",
    "preferred",
    "ranked",
    "reference_point",
]
