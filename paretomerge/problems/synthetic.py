"""The synthetic test functions ZDT1 to 3, DTLZ2 and DTLZ7, minimised, on the unit cube."""

import numpy as np

from paretomerge.types import Array


def zdt(kind: int, x: Array) -> Array:
    """ZDT1, ZDT2 and ZDT3: two objectives.

    Source: Zitzler, Deb & Thiele, Comparison of multiobjective evolutionary algorithms: empirical
    results, Evolutionary Computation 8(2), 2000, equations 7 to 9.

    Args:
        kind: 1 (convex front), 2 (concave) or 3 (five separate pieces).
        x: points `(n, d)` of the unit cube, d at least 2.

    Returns:
        Values `(n, 2)`, minimised.
    """
    f1 = x[:, 0]
    rest = x[:, 1:]
    # The paper's 9 / (d - 1) times the sum is 9 times the mean.
    g = 1 + 9 * rest.mean(1)
    f2 = zdt_second_objective(kind, f1, g)
    return np.stack([f1, f2], axis=1)


def zdt_second_objective(kind: int, f1: Array, g: Array | float) -> Array:
    """The second objective `(n,)` of ZDT, g * h(f1, g); on the true front g is 1.

    Args:
        kind: 1, 2 or 3.
        f1: the first objective `(n,)`.
        g: the distance function, `(n,)` or one number for all.

    Returns:
        Values `(n,)`, minimised.
    """
    ratio = f1 / g
    # ZDT1, equation 7: a convex front.
    root = np.sqrt(ratio)
    h = 1 - root
    if kind == 2:
        # Equation 8: a concave front.
        h = 1 - ratio**2
    elif kind == 3:
        # Equation 9: five waves break the front into pieces.
        angle = 10 * np.pi * f1
        h = h - ratio * np.sin(angle)
    return np.asarray(g * h)


def dtlz2(m: int, x: Array) -> Array:
    """DTLZ2: the front is the part of the unit sphere in the positive orthant.

    Source: Deb, Thiele, Laumanns & Zitzler, Scalable multi-objective optimization test problems,
    CEC 2002.

    Args:
        m: number of objectives.
        x: points `(n, d)` of the unit cube, d at least m.

    Returns:
        Values `(n, m)`, minimised.
    """
    n_angles = m - 1
    # A quarter turn each, so that no objective is negative.
    angles = x[:, :n_angles] * np.pi / 2
    # The radius is 1, its least value, where all other parameters are 1/2.
    deviation = x[:, n_angles:] - 0.5
    radius = 1 + (deviation**2).sum(1)
    values = np.repeat(radius[:, None], m, axis=1)
    for k in range(m):
        # Spherical coordinates: each objective has one cosine fewer than the one before.
        n_cosines = n_angles - k
        cosines = np.cos(angles[:, :n_cosines])
        values[:, k] *= cosines.prod(1)
        if k > 0:
            values[:, k] *= np.sin(angles[:, n_cosines])
    return values


def dtlz7(m: int, x: Array) -> Array:
    """DTLZ7: the front is 2^(m - 1) separate pieces.

    Source: Deb, Thiele, Laumanns & Zitzler, Scalable multi-objective optimization test problems,
    CEC 2002.

    Args:
        m: number of objectives.
        x: points `(n, d)` of the unit cube, d at least m.

    Returns:
        Values `(n, m)`, minimised.
    """
    n_first = m - 1
    first = x[:, :n_first]
    rest = x[:, n_first:]
    # This g is the paper's 1 + g.
    g = 2 + 9 * rest.mean(1)
    ratio = first / g[:, None]
    waves = dtlz7_waves(ratio, first)
    h = m - waves.sum(1)
    last = g * h
    return np.column_stack([first, last])


def dtlz7_waves(ratio: Array, f: Array) -> Array:
    """What one objective takes off the last one of DTLZ7, in units of g.

    Args:
        ratio: objective over g.
        f: the objective, of the same shape.

    Returns:
        ratio * (1 + sin(3 pi f)).
    """
    angle = 3 * np.pi * f
    wave = 1 + np.sin(angle)
    return np.asarray(ratio * wave)
