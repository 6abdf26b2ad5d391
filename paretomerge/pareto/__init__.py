"""Mathematics of several objectives, on arrays `(n, m)` of n points, every objective maximised.

- `front`: dominance and hypervolume. moocore does the computations.
- `ranking`: order points, and pick one from a front.
- `preference`: what a user wants, as one number.
"""

from paretomerge.pareto.front import (
    RunningHypervolume,
    hypervolume,
    hypervolume_contributions,
    nondominated,
    nondominated_fronts,
    reference_point,
)
from paretomerge.pareto.preference import Preference, Scale
from paretomerge.pareto.ranking import (
    best_points,
    knee,
    normalised,
    ranked,
    representative,
)

__all__ = [
    "Preference",
    "RunningHypervolume",
    "Scale",
    "best_points",
    "hypervolume",
    "hypervolume_contributions",
    "knee",
    "nondominated",
    "nondominated_fronts",
    "normalised",
    "ranked",
    "reference_point",
    "representative",
]
