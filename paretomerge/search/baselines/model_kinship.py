"""Top-k greedy merging with exploration by Model Kinship (Hu et al. 2024, arXiv 2410.12613).

Hu et al. merge the k best models in pairs, generation after generation. This alone stalls among
models that are all alike, so they also merge the best model with the one of least kinship. Kinship
is the cosine between two models' deltas to the base. They stop when the kinship of the best models
says that these are nearly one model. Here the method works on points of the search space:

    in the paper          here
    model                 the parameters of a trial
    merge of two models   the mean of their numbers, and the choices of the better one; where the
                          merge is linear in its coefficients, this is the mean of the models
    kinship               the cosine between their numbers; where the sources' deltas are orthogonal
                          and of equal length, as those of fine-tunes nearly are, this is the cosine
                          between the merged deltas
    stopping              the points of a Sobol sequence, until one of them joins the best
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.random import Generator
from optuna.distributions import FloatDistribution, IntDistribution

from paretomerge.errors import ConfigError
from paretomerge.search.baselines.columns import numeric_columns
from paretomerge.search.encoding import Mask
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive, crowding_order
from paretomerge.types import Array

# Trials of least kinship that each of the best may be merged with.
_EXPLORATION_PARTNERS = 4
_MIN_MAGNITUDE = 1e-12  # keeps the division finite where both bounds are 0


@dataclass(frozen=True)
class KinshipProposer:
    """Merges of the best trials in pairs, and of the best with those of least kinship.

    Attributes:
        top: The number k of best trials that are merged in pairs.
        explore: Every how many trials a merge with the least kinship comes first.
        max_kinship: The mean kinship of the best k above which they count as one model, in [-1, 1].
            The paper stops near 0.9; coefficients of one sign have a higher kinship than deltas,
            hence 0.98.

    Raises:
        ConfigError: An option is out of its range.
    """

    top: int = 5
    explore: int = 3
    max_kinship: float = 0.98

    def __post_init__(self) -> None:
        check_options("kinship", self)
        if self.top < 2 or self.explore < 1 or not -1 <= self.max_kinship <= 1:
            raise ConfigError(
                f"kinship: expected top >= 2, explore >= 1 and max_kinship in [-1, 1], "
                f"got {self.top}, {self.explore} and {self.max_kinship}"
            )

    def propose(self, archive: Archive, rng: Generator) -> Array:
        """Merge trials in pairs.

        Args:
            archive: The trials so far.
            rng: Not used; the merges follow from the trials.

        Returns:
            Merges `(k, d)`, those of the best pairs first, or in a trial of exploration those of
            least kinship first. None where the best trials are all alike.
        """
        usable = archive.usable
        order = crowding_order(archive.y[usable])
        ranked = usable[order]
        active = active_numbers(archive)
        every_vector = coefficients(archive, active)
        kinship = cosine_similarity(every_vector[ranked])
        top = min(self.top, len(ranked))
        if top < 2 or self._have_converged(kinship):
            return np.zeros((0, archive.encoding.d))
        # The sum of two ranks orders the pairs from the best to the worst.
        greedy_pairs = sorted(combinations(range(top), 2), key=sum)
        distant_pairs = _least_kin_pairs(kinship, top)
        if archive.number % self.explore == 0:
            pairs = distant_pairs + greedy_pairs
        else:
            pairs = greedy_pairs + distant_pairs
        merges = []
        for pair in pairs:
            # The lower rank is the better one.
            better = int(ranked[min(pair)])
            other = int(ranked[max(pair)])
            merge = merge_points(archive, active, better, other)
            merges.append(merge)
        return np.stack(merges)

    def _have_converged(self, kinship: Array) -> bool:
        top = self.top
        best = kinship[:top, :top]
        # The kinship of a model with itself, on the diagonal, is always 1.
        pairs = np.triu_indices(len(best), 1)
        mean_kinship = best[pairs].mean()
        return bool(mean_kinship > self.max_kinship)


def _least_kin_pairs(kinship: Array, top: int) -> list[tuple[int, int]]:
    """Pairs of ranks: each of the best `top` trials with those of least kinship."""
    pairs = []
    for best in range(top):
        order = kinship[best].argsort(kind="stable")
        partners = order[:_EXPLORATION_PARTNERS]
        for other in partners.tolist():
            if other != best:
                pairs.append((best, other))
    return pairs


def active_numbers(archive: Archive) -> Mask:
    """Find the numbers that are active in each trial.

    Args:
        archive: The trials so far.

    Returns:
        The mask `(n, d)` of the columns of active numbers.
    """
    numeric = numeric_columns(archive.encoding)
    # An inactive parameter goes back to its fixed place and so does not stay at 0.
    zeroed = np.where(numeric, 0.0, archive.x)
    zeroed = archive.encoding.project(zeroed)
    is_zero = zeroed == 0
    active: Mask = is_zero & numeric
    return active


def coefficients(archive: Archive, active: Mask) -> Array:
    """Scale each number by its largest magnitude, with 0 where the parameter itself is 0.

    Args:
        archive: The trials so far, n of them.
        active: The mask `(n, d)` of the active numbers.

    Returns:
        `(n, numbers)`, 0 where a number is inactive; in a space without numbers the encoded points.
    """
    encoding = archive.encoding
    numbers = {}
    for name, distribution in encoding.space.items():
        if isinstance(distribution, (FloatDistribution, IntDistribution)):
            numbers[name] = distribution
    if not numbers:
        return archive.x
    points = [encoding.decode(x) for x in archive.x]
    shape = (len(points), len(numbers))
    scaled = np.zeros(shape)
    for k, (name, distribution) in enumerate(numbers.items()):
        values = np.array([point[name] for point in points], dtype=float)
        column = encoding.columns[name].start
        is_active = active[:, column]
        active_values = np.where(is_active, values, 0.0)
        # Scaled by magnitude and not by range: 0 must stay 0, since it stands for the base model.
        low = float(distribution.low)
        high = float(distribution.high)
        magnitude = max(abs(low), abs(high), _MIN_MAGNITUDE)
        scaled[:, k] = active_values / magnitude
    return scaled


def cosine_similarity(vectors: Array) -> Array:
    """Compute the cosine between each pair of vectors.

    Args:
        vectors: `(n, k)`.

    Returns:
        `(n, n)`, with 0 for a zero vector, which is the base model itself.
    """
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    divisor = np.where(length > 0, length, 1.0)
    unit = vectors / divisor
    cosines: Array = unit @ unit.T
    return cosines


def merge_points(
    archive: Archive,
    active: Mask,
    better: int,
    other: int,
) -> Array:
    """Average two trials.

    Args:
        archive: The trials so far, n of them.
        active: The mask `(n, d)` of the active numbers.
        better: The index of the better trial.
        other: The index of the other trial.

    Returns:
        `(d,)`: the mean of their numbers. Choices, and numbers that are inactive in the other
        trial, come from the better one.
    """
    a = archive.x[better]
    b = archive.x[other]
    mean = (a + b) / 2
    is_active = active[other]
    merged: Array = np.where(is_active, mean, a)
    return merged
