"""Eight engineering problems of the RE suite, as functions `(n, d)` in the unit cube -> `(n, m)`, minimised.

Formulas: Tanabe & Ishibuchi, An easy-to-use real-world multi-objective optimization problem suite, Applied Soft
Computing 89 (2020), with the corrections that its authors published afterwards; ideal and nadir points are those of
their published fronts. A problem with constraints has their summed violation as its last objective. RE31 and RE32 run
over seven orders of magnitude, where any design has a hypervolume near the whole; their objectives are taken as
log10(1 + f), which leaves the front as it is. pymoo 0.6 carries none of them by these names (its welded beam, truss and
car side are RE32, RE31 and RE41 with constraints in place of the last objective).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Engineering:
    """A problem's objectives, the bounds `(d,)` of its variables, and its front's ideal and nadir point `(m,)`."""

    objectives: Callable[..., tuple[Array, ...]]
    low: tuple[float, ...]
    high: tuple[float, ...]
    published_ideal: tuple[float, ...]
    published_nadir: tuple[float, ...]
    logarithmic: bool = False

    @property
    def ideal(self) -> Array:
        return self._scaled(np.asarray(self.published_ideal))

    @property
    def nadir(self) -> Array:
        return self._scaled(np.asarray(self.published_nadir))

    def __call__(self, unit: Array) -> Array:
        """unit `(n, d)` in the unit cube -> `(n, m)`, minimised."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        return self._scaled(np.stack(self.objectives(*(low + unit * (high - low)).T), axis=1))

    def _scaled(self, f: Array) -> Array:
        return np.log10(1 + f) if self.logarithmic else f


def _violation(*margins: Array) -> Array:
    """How far the constraints `margin >= 0` are missed, together."""
    return np.asarray(sum(np.maximum(-margin, 0.0) for margin in margins))


def four_bar_truss(x1: Array, x2: Array, x3: Array, x4: Array) -> tuple[Array, ...]:
    """RE21: volume, displacement of the joint. Force 10, elasticity 2e5, length 200."""
    force, elasticity, length = 10.0, 2e5, 200.0
    root2 = np.sqrt(2.0)
    volume = length * (2 * x1 + root2 * x2 + np.sqrt(x3) + x4)
    return volume, force * length / elasticity * (2 / x1 + 2 * root2 / x2 - 2 * root2 / x3 + 2 / x4)


def hatch_cover(flange: Array, beam: Array) -> tuple[Array, ...]:
    """RE24: weight of the cover, violation of four limits on stress, shear, deflection and buckling."""
    elasticity = 7e5
    bending = 4500 / (flange * beam)
    shear = 1800 / beam
    deflection = 56.2e4 / (elasticity * flange * beam**2)
    buckling = elasticity * flange**2 / 100
    return flange + 120 * beam, _violation(
        1 - bending / 700, 1 - shear / 450, 1 - deflection / 1.5, 1 - bending / buckling
    )


def two_bar_truss(x1: Array, x2: Array, y: Array) -> tuple[Array, ...]:
    """RE31: volume, stress in one bar, violation of limits on volume and on both stresses."""
    long, short = np.sqrt(16 + y**2), np.sqrt(1 + y**2)
    volume, stress = x1 * long + x2 * short, 20 * long / (x1 * y)
    return volume, stress, _violation(0.1 - volume, 1e5 - stress, 1e5 - 80 * short / (y * x2))


def welded_beam(h: Array, length: Array, t: Array, b: Array) -> tuple[Array, ...]:
    """RE32: cost, deflection, violation of limits on shear, bending stress, weld and buckling."""
    load, overhang, elasticity, shear_modulus = 6000.0, 14.0, 30e6, 12e6
    cost = 1.10471 * h**2 * length + 0.04811 * t * b * (14 + length)
    deflection = 4 * load * overhang**3 / (elasticity * b * t**3)
    half = ((h + t) / 2) ** 2
    radius = np.sqrt(length**2 / 4 + half)
    inertia = 2 * np.sqrt(2.0) * h * length * (length**2 / 12 + half)
    torsion = load * (overhang + length / 2) * radius / inertia
    direct = load / (np.sqrt(2.0) * h * length)
    shear = np.sqrt(direct**2 + direct * torsion * length / radius + torsion**2)
    bending = 6 * load * overhang / (b * t**2)
    buckling = (
        4.013
        * elasticity
        * t
        * b**3
        / 6
        / overhang**2
        * (1 - t / (2 * overhang) * np.sqrt(elasticity / (4 * shear_modulus)))
    )
    return cost, deflection, _violation(13_600 - shear, 30_000 - bending, b - h, buckling - load)


def disc_brake(inner: Array, outer: Array, force: Array, discs: Array) -> tuple[Array, ...]:
    """RE33: mass, stopping time, violation of limits on size, pressure, temperature and torque.

    Differences of powers are divided out where they can be; a disc of no width is given a very small one.
    """
    width = outer - inner
    width = np.where(np.abs(width) < 1e-9, 1e-9, width)
    both, cubes = (
        inner + outer,
        inner**2 + inner * outer + outer**2,
    )  # (o^2 - i^2) / width, (o^3 - i^3) / width
    mass = 4.9e-5 * width * both * (discs - 1)
    time = 9.82e6 * both / (force * discs * cubes)
    pressure = 0.4 - force / (3.14 * width * both)
    temperature = 1 - 2.22e-3 * force * cubes / (width * both**2)
    torque = 2.66e-2 * force * discs * cubes / both - 900
    return mass, time, _violation(width - 20, pressure, temperature, torque)


def crashworthiness(x1: Array, x2: Array, x3: Array, x4: Array, x5: Array) -> tuple[Array, ...]:
    """RE34: a vehicle's mass, acceleration in a full frontal crash, intrusion in an offset crash."""
    mass = (
        1640.2823
        + 2.3573285 * x1
        + 2.3220035 * x2
        + 4.5688768 * x3
        + 7.7213633 * x4
        + 4.4559504 * x5
    )
    linear = 6.5856 + 1.15 * x1 - 1.0427 * x2 + 0.9738 * x3 + 0.8364 * x4
    products = -0.3695 * x1 * x4 + 0.0861 * x1 * x5 + 0.3628 * x2 * x4
    acceleration = linear + products - 0.1106 * x1**2 - 0.3437 * x3**2 + 0.1764 * x4**2
    linear = -0.0551 + 0.0181 * x1 + 0.1024 * x2 + 0.0421 * x3
    products = (
        -0.0073 * x1 * x2 + 0.024 * x2 * x3 - 0.0118 * x2 * x4 - 0.0204 * x3 * x4 - 0.008 * x3 * x5
    )
    return mass, acceleration, linear + products - 0.0241 * x2**2 + 0.0109 * x4**2


# Quadratic (and some cubic) fits in (alpha, HA, OA, OPTT): exponents of the four -> coefficient, one table per objective.
_ROCKET: tuple[dict[str, float], ...] = (
    {
        "": 0.692,
        "a": 0.477,
        "h": -0.687,
        "o": -0.080,
        "p": -0.0650,
        "aa": -0.167,
        "ha": -0.0129,
        "hh": 0.0796,
        "oa": -0.0634,
    }
    | {"oh": -0.0257, "oo": 0.0877, "pa": -0.0521, "ph": 0.00156, "po": 0.00198, "pp": 0.0184},
    {
        "": 0.153,
        "a": -0.322,
        "h": 0.396,
        "o": 0.424,
        "p": 0.0226,
        "aa": 0.175,
        "ha": 0.0185,
        "hh": -0.0701,
        "oa": -0.251,
    }
    | {"oh": 0.179, "oo": 0.0150, "pa": 0.0134, "ph": 0.0296, "po": 0.0752, "pp": 0.0192},
    {
        "": 0.370,
        "a": -0.205,
        "h": 0.0307,
        "o": 0.108,
        "p": 1.019,
        "aa": -0.135,
        "ha": 0.0141,
        "hh": 0.0998,
        "oa": 0.208,
    }
    | {
        "oh": -0.0301,
        "oo": -0.226,
        "pa": 0.353,
        "po": -0.0497,
        "pp": -0.423,
        "haa": 0.202,
        "oaa": -0.281,
        "hha": -0.342,
    }
    | {"hho": -0.245, "ooh": 0.281, "ppa": -0.184, "hao": -0.281},
)


def rocket_injector(
    alpha: Array, hydrogen: Array, oxygen: Array, post_tip: Array
) -> tuple[Array, ...]:
    """RE37: highest temperatures of the injector's face and of its post tip, combustion length."""
    value = {"a": alpha, "h": hydrogen, "o": oxygen, "p": post_tip}
    one = np.ones_like(alpha)
    return tuple(
        np.asarray(
            sum(c * np.prod([one, *(value[v] for v in term)], axis=0) for term, c in table.items())
        )
        for table in _ROCKET
    )


def car_side(
    x1: Array, x2: Array, x3: Array, x4: Array, x5: Array, x6: Array, x7: Array
) -> tuple[Array, ...]:
    """RE41: mass, force on the pelvis, mean velocity of pillar and door, violation of ten limits on the dummy's body."""
    mass = 1.98 + 4.9 * x1 + 6.67 * x2 + 6.98 * x3 + 4.01 * x4 + 1.78 * x5 + 1e-5 * x6 + 2.73 * x7
    force = 4.72 - 0.5 * x4 - 0.19 * x2 * x3
    pillar = 10.58 - 0.674 * x1 * x2 - 0.67275 * x2
    door = 16.45 - 0.489 * x3 * x7 - 0.843 * x5 * x6
    abdomen = 1.16 - 0.3717 * x2 * x4 - 0.0092928 * x3
    upper = (
        0.261
        - 0.0159 * x1 * x2
        - 0.06486 * x1
        - 0.019 * x2 * x7
        + 0.0144 * x3 * x5
        + 0.0154464 * x6
    )
    middle = (
        0.214
        + 0.00817 * x5
        - 0.0587118 * x1
        + 0.03099 * x2 * x6
        - 0.018 * x2 * x7
        + 0.030408 * x3
        - 0.00364 * x5 * x6
    )
    lower = 0.74 - 0.61 * x2 - 0.031296 * x3 - 0.031872 * x7 + 0.227 * x2**2
    ribs = (
        28.98 + 3.818 * x3 - 4.2 * x1 * x2 + 1.27296 * x6 - 2.68065 * x7,
        35.31728 + 2.95 * x3 - 5.057 * x1 * x2 - 3.795 * x2 - 3.4431 * x7,
        46.36 - 9.9 * x2 - 4.4505 * x1,
    )
    soft = (0.32 - upper, 0.32 - middle + 0.018 * x2**2, 0.32 - lower)
    return (
        mass,
        force,
        (pillar + door) / 2,
        _violation(
            1 - abdomen, *soft, *(32 - r for r in ribs), 4 - force, 9.9 - pillar, 15.7 - door
        ),
    )


_CAR_LOW = (0.5, 0.45, 0.5, 0.5, 0.875, 0.4, 0.4)
_CAR_HIGH = (1.5, 1.35, 1.5, 1.5, 2.625, 1.2, 1.2)
ENGINEERING: dict[str, Engineering] = {
    "re21": Engineering(
        four_bar_truss,
        (1.0, 2**0.5, 2**0.5, 1.0),
        (3.0,) * 4,
        (1237.841, 0.00276142),
        (2886.370, 0.04),
    ),
    "re24": Engineering(hatch_cover, (0.5, 0.5), (4.0, 50.0), (60.5, 0.0), (481.6081, 44.28190)),
    "re31": Engineering(
        two_bar_truss,
        (1e-5, 1e-5, 1.0),
        (100.0, 100.0, 3.0),
        (5.537319e-05, 1 / 3, 0.0),
        (500.0027, 8246211.25, 19359919.75),
        True,
    ),
    "re32": Engineering(
        welded_beam,
        (0.125, 0.1, 0.1, 0.125),
        (5.0, 10.0, 10.0, 5.0),
        (0.0102055, 0.00043904, 0.0),
        (37.78315, 17561.6, 425062976.6),
        logarithmic=True,
    ),
    "re33": Engineering(
        disc_brake,
        (55.0, 75.0, 1000.0, 11.0),
        (80.0, 110.0, 3000.0, 20.0),
        (-0.721525, 1.139072, 0.0),
        (5.3067, 3.128334, 25.0),
    ),
    "re34": Engineering(
        crashworthiness,
        (1.0,) * 5,
        (3.0,) * 5,
        (1661.708, 6.1428, 0.0394),
        (1695.200, 10.7454, 0.264),
    ),
    "re37": Engineering(
        rocket_injector,
        (0.0,) * 4,
        (1.0,) * 4,
        (0.008893414, 0.00488, -0.4315),
        (0.9894912, 0.9565879, 0.9875309),
    ),
    "re41": Engineering(
        car_side,
        _CAR_LOW,
        _CAR_HIGH,
        (15.576004, 3.58525, 10.61064375, 0.0),
        (42.768012, 4.42725, 13.09138125, 9.449293),
    ),
}
