"""Top-k greedy merging with exploration by Model Kinship (Hu et al. 2024, arXiv 2410.12613), in the space of parameters.

Hu et al. merge the k best models in pairs, generation after generation. Alone that gets stuck among models that are all
alike, so they also merge the best with the one of least kinship, the cosine between the models' deltas to the base; and
they stop when kinship says that the best are nearly one model. What becomes what here:

    model                the parameters of a trial
    merge of two models  the mean of their numbers, choices from the better one: the mean of the models, where the merge is
                         linear in its weights
    kinship              the cosine between their numbers. For sources whose deltas are orthogonal and of one length, as
                         fine-tunes' nearly are, that is the cosine between the merged deltas
    stopping             from there on the points of a Sobol sequence, until they change who is best
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from paretomerge.errors import ConfigError
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive, crowding_order

Array = NDArray[np.float64]
_LEAST = 4  # of the least kin of each of the best


@dataclass(frozen=True)
class Kinship:
    """top: k, how many of the best are merged in pairs. explore: every so many trials the best meets its least kin.
    alike: mean kinship of the top k from which on they count as one model (0.98: coefficients of one sign are closer kin
    than the deltas of the paper, which stops near 0.9).
    """

    top: int = 5
    explore: int = 3
    alike: float = 0.98

    def __post_init__(self) -> None:
        check_options("kinship", self)
        if self.top < 2 or self.explore < 1 or not -1 <= self.alike <= 1:
            got = f"{self.top}, {self.explore} and {self.alike}"
            raise ConfigError(
                f"kinship: expected top >= 2, explore >= 1 and alike in [-1, 1], got {got}"
            )

    def propose(self, archive: Archive, rng: np.random.Generator) -> Array:
        """Merges of pairs `(k, d)`, those of the best first; where it is time to explore, with the least kin first."""
        ranked = archive.usable[crowding_order(archive.y[archive.usable])]
        counts = numbers_that_count(archive)
        kinship = cosines(coefficients(archive, counts)[ranked])
        top = range(min(self.top, len(ranked)))
        if len(top) < 2 or self._all_alike(kinship):
            return np.zeros((0, archive.encoding.d))
        greedy = sorted(combinations(top, 2), key=sum)
        distant = [
            (best, int(other))
            for best in top
            for other in kinship[best].argsort(kind="stable")[:_LEAST]
            if other != best
        ]
        pairs = distant + greedy if archive.number % self.explore == 0 else greedy + distant
        merges = [
            mean_of(archive, counts, int(ranked[min(pair)]), int(ranked[max(pair)]))
            for pair in pairs
        ]
        return np.stack(merges)

    def _all_alike(self, kinship: Array) -> bool:
        among = kinship[: self.top, : self.top]
        return bool(among[np.triu_indices(len(among), 1)].mean() > self.alike)


def numbers_that_count(archive: Archive) -> NDArray[np.bool_]:
    """Mask `(n, d)`: coordinates of numbers, where they count. One that does not has a place of its own, and returns there."""
    numbers = np.repeat(
        [not isinstance(d, CategoricalDistribution) for d in archive.encoding.space.values()],
        archive.widths,
    )
    return np.asarray((archive.encoding.project(np.where(numbers, 0.0, archive.x)) == 0) & numbers)


def coefficients(archive: Archive, counts: NDArray[np.bool_]) -> Array:
    """`(n, numbers)`: every number as a share of its largest magnitude, 0 where it does not count.

    Zero is where the parameter itself is zero, wherever its bounds lie. Without numbers, the choices.
    """
    space = {
        name: d
        for name, d in archive.encoding.space.items()
        if isinstance(d, (FloatDistribution, IntDistribution))
    }
    if not space:
        return archive.x
    points = [archive.encoding.decode(x) for x in archive.x]
    values = np.array([[float(point[name]) for name in space] for point in points])
    largest = np.array([max(abs(float(d.low)), abs(float(d.high)), 1e-12) for d in space.values()])
    shares = (
        np.where(counts[:, [archive.encoding.columns[name].start for name in space]], values, 0.0)
        / largest
    )
    return np.asarray(shares)


def cosines(vectors: Array) -> Array:
    """`(n, n)`; a zero vector, the base itself, is kin to none."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(length > 0, length, 1.0)
    return np.asarray(unit @ unit.T)


def mean_of(archive: Archive, counts: NDArray[np.bool_], better: int, other: int) -> Array:
    """`(d,)`: the mean of two trials' numbers; choices, and numbers that do not count in the other one, from the better."""
    a, b = archive.x[[better, other]]
    return np.asarray(np.where(counts[other], (a + b) / 2, a))
