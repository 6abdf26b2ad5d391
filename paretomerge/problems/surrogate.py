"""A Gaussian process on the logits of accuracies: the surrogate of one task.

f(x) = b + w . x + g(x A), with b and w normal a priori, and g of Matern 5/2 covariance (Rasmussen &
Williams, Gaussian Processes for Machine Learning, 2006, section 2.7). A is diagonal: one length
scale per coordinate. A full matrix A lets the process see that sums and differences of weights
matter, a merge being a sum; with few merges that is better, with the shipped ones it is not
(docs/lab/landscape.md). `benchmarks/landscape` fits the processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paretomerge.problems.scored_merges import MergeSpace, MethodIndices
from paretomerge.types import Array

Kernel = Callable[[Array, float], Array]
"""Squared distances and a variance -> covariances, of the same shape."""


def matern_52(squared_distance: Array, variance: float) -> Array:
    """Matern 5/2 covariance (Rasmussen & Williams 2006, equation 4.17) with length scale 1.

    Args:
        squared_distance: of any shape.
        variance: at distance 0.

    Returns:
        Covariances, of the same shape.
    """
    # r is sqrt(5) times the distance d, so r^2 / 3 is the 5 d^2 / 3 of the equation.
    r = np.sqrt(5 * squared_distance)
    polynomial = 1 + r + r * r / 3
    decay = np.exp(-r)
    return variance * polynomial * decay


@dataclass(frozen=True)
class LogitProcess:
    """Hyperparameters of one task's process.

    Attributes:
        projection: the matrix A `(p, k)`.
        variance: of g.
        slope_variance: of w and b.
        noise_share: share of the binomial variance that is present. All merges answer the same
            examples, so their scores differ by less than independent draws would.
        residual_variance: variance that no neighbour explains.
        kernel: covariance of g.
    """

    projection: Array
    variance: float
    slope_variance: float
    noise_share: float
    residual_variance: float
    kernel: Kernel = matern_52

    def smooth_covariance(self, a: Array, b: Array) -> Array:
        """Covariance of g between projected points.

        Args:
            a: `(n, k)`, points times A.
            b: `(q, k)`, likewise.

        Returns:
            `(n, q)`.
        """
        a_norms = (a * a).sum(1)
        b_norms = (b * b).sum(1)
        products = 2 * a @ b.T
        # ||a - b||^2 = ||a||^2 + ||b||^2 - 2 a . b, which rounding can make negative.
        squared_distance = a_norms[:, None] + b_norms - products
        return self.kernel(np.maximum(squared_distance, 0), self.variance)


def features(space: MergeSpace, method: MethodIndices, numbers: Array) -> Array:
    """What a process sees of a merge.

    Args:
        space: of the merges.
        method: `(n,)`, index of the method.
        numbers: `(n, d)`; NaN where one is inactive.

    Returns:
        `(n, p)` in [0, 1]: the method one-hot, weights scaled by their bounds, and densities
        likewise in their logarithm. An inactive density is 1: all of the delta is used.
    """
    low, high = space.bounds
    inactive = np.isnan(numbers)
    # A NaN here would spread to all covariances of the merge.
    values = np.where(inactive, high, numbers)
    # Boxes differ in size, and one process has one prior for all length scales.
    scaled = values - low
    span = high - low
    # Only densities: weights may be negative, and have no logarithm.
    dense = space.is_density
    np.log(values / low, where=dense, out=scaled)
    np.log(high / low, where=dense, out=span)
    one_hot = np.eye(len(space.methods))[method]
    columns = [one_hot, scaled / span]
    return np.concatenate(columns, axis=1)


def affine(x: Array) -> Array:
    """Features of the linear part: a constant, and the coordinates scaled to [-1, 1].

    Args:
        x: `(n, p)` in [0, 1].

    Returns:
        `(n, 1 + p)`.
    """
    constant = np.ones((len(x), 1))
    # Centred, so that the constant is the value in the middle of the cube and not at a corner.
    centred = 2 * x - 1
    return np.concatenate([constant, centred], axis=1)


def sigmoid(z: Array) -> Array:
    """The inverse of the logit.

    Args:
        z: of any shape.

    Returns:
        1 / (1 + exp(-z)).
    """
    return 1 / (1 + np.exp(-z))
