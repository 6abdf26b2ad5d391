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
    g = 1 + 9 * x[:, 1:].mean(1)
    return np.stack([f1, zdt_second_objective(kind, f1, g)], axis=1)


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
    if kind == 2:
        return np.asarray(g * (1 - ratio**2))
    waves = ratio * np.sin(10 * np.pi * f1) if kind == 3 else 0
    return np.asarray(g * (1 - np.sqrt(ratio) - waves))


def dtlz2(m: int, x: Array) -> Array:
    """DTLZ2: the front is the part of the unit sphere in the positive orthant.

    Source: Deb, Thiele, Laumanns & Zitzler, Scalable multi-objective optimization test problems,
    CEC 2002, equation 9.

    Args:
        m: number of objectives.
        x: points `(n, d)` of the unit cube, d at least m.

    Returns:
        Values `(n, m)`, minimised.
    """
    angle = x[:, : m - 1] * np.pi / 2
    radius = 1 + ((x[:, m - 1 :] - 0.5) ** 2).sum(1)
    values = np.repeat(radius[:, None], m, axis=1)
    for k in range(m):
        values[:, k] *= np.cos(angle[:, : m - 1 - k]).prod(1)
        if k > 0:
            values[:, k] *= np.sin(angle[:, m - 1 - k])
    return values


def dtlz7(m: int, x: Array) -> Array:
    """DTLZ7: the front is 2^(m - 1) separate pieces.

    Source: Deb, Thiele, Laumanns & Zitzler, Scalable multi-objective optimization test problems,
    CEC 2002, equation 16.

    Args:
        m: number of objectives.
        x: points `(n, d)` of the unit cube, d at least m.

    Returns:
        Values `(n, m)`, minimised.
    """
    first = x[:, : m - 1]
    g = 2 + 9 * x[:, m - 1 :].mean(1)
    h = m - dtlz7_waves(first / g[:, None], first).sum(1)
    return np.column_stack([first, g * h])


def dtlz7_waves(ratio: Array, f: Array) -> Array:
    """What one objective takes off the last one of DTLZ7, in units of g.

    Args:
        ratio: objective over g.
        f: the objective, of the same shape.

    Returns:
        ratio * (1 + sin(3 pi f)).
    """
    return np.asarray(ratio * (1 + np.sin(3 * np.pi * f)))
