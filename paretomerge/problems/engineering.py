"""Eight engineering problems of the RE suite, as functions on the unit cube, minimised.

Formulas: Tanabe & Ishibuchi, An easy-to-use real-world multi-objective optimization problem suite,
Applied Soft Computing 89, 2020, with the corrections that its authors published afterwards. Ideal
and nadir points are those of their published fronts. A problem with constraints has their summed
violation as its last objective. The objectives of RE31 and RE32 span seven orders of magnitude, so
that any design has nearly the whole hypervolume; they are taken as log10(1 + f), which leaves the
front as it is.

Each function takes n designs as an array `(d, n)`, in the units of the paper, and returns one array
`(n,)` per objective.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paretomerge.types import Array

Objectives = tuple[Array, ...]
"""One array `(n,)` per objective."""


@dataclass(frozen=True)
class EngineeringProblem:
    """One design problem; calling it evaluates designs.

    Attributes:
        objectives: design variables `(d, n)` -> m objectives `(n,)`, minimised.
        low: lowest value of each variable, `(d,)`.
        high: highest value of each variable, `(d,)`.
        published_ideal: best value of each objective on the published front, `(m,)`.
        published_nadir: worst value of each objective on the published front, `(m,)`.
        logarithmic: whether log10(1 + f) takes the place of each objective f.
    """

    objectives: Callable[[Array], Objectives]
    low: tuple[float, ...]
    high: tuple[float, ...]
    published_ideal: tuple[float, ...]
    published_nadir: tuple[float, ...]
    logarithmic: bool = False

    @property
    def ideal(self) -> Array:
        """The front's ideal point `(m,)`, in the scale of the values."""
        return self._scaled(np.asarray(self.published_ideal))

    @property
    def nadir(self) -> Array:
        """The front's nadir point `(m,)`, in the scale of the values."""
        return self._scaled(np.asarray(self.published_nadir))

    def __call__(self, x: Array) -> Array:
        """Evaluate n designs.

        Args:
            x: `(n, d)` in the unit cube.

        Returns:
            `(n, m)`, minimised.
        """
        low = np.asarray(self.low)
        high = np.asarray(self.high)
        variables = low + x * (high - low)
        # Transposed, so that a function can unpack its design variables by name.
        values = self.objectives(variables.T)
        return self._scaled(np.stack(values, axis=1))

    def _scaled(self, values: Array) -> Array:
        return np.log10(1 + values) if self.logarithmic else values


def _violation(*margins: Array) -> Array:
    """By how much the constraints `margin >= 0` are violated, summed."""
    # A satisfied constraint counts as 0: a large margin must not make up for a violation elsewhere.
    missing = (np.maximum(-margin, 0.0) for margin in margins)
    return np.asarray(sum(missing))


def four_bar_truss(x: Array) -> Objectives:
    """RE21: volume of the truss, displacement of its joint."""
    x1, x2, x3, x4 = x
    force = 10.0
    elasticity = 2e5
    length = 200.0
    root2 = np.sqrt(2.0)
    area = 2 * x1 + root2 * x2
    # The root of x3 is in the published suite.
    area = area + np.sqrt(x3) + x4
    volume = length * area
    compliance = 2 / x1 + 2 * root2 / x2
    compliance = compliance - 2 * root2 / x3 + 2 / x4
    displacement = force * length / elasticity * compliance
    return volume, displacement


def hatch_cover(x: Array) -> Objectives:
    """RE24: weight of the cover; violation of its stress, shear, deflection and buckling limits."""
    flange, beam = x
    elasticity = 7e5
    weight = flange + 120 * beam
    bending = 4500 / (flange * beam)
    shear = 1800 / beam
    deflection = 56.2e4 / (elasticity * flange * beam**2)
    buckling = elasticity * flange**2 / 100
    violation = _violation(
        1 - bending / 700,
        1 - shear / 450,
        1 - deflection / 1.5,
        1 - bending / buckling,
    )
    return weight, violation


def two_bar_truss(x: Array) -> Objectives:
    """RE31: volume, stress in one bar; violation of the limits on volume and on both stresses."""
    x1, x2, y = x
    long_bar = np.sqrt(16 + y**2)
    short_bar = np.sqrt(1 + y**2)
    volume = x1 * long_bar + x2 * short_bar
    long_stress = 20 * long_bar / (x1 * y)
    short_stress = 80 * short_bar / (y * x2)
    violation = _violation(
        0.1 - volume,
        1e5 - long_stress,
        1e5 - short_stress,
    )
    return volume, long_stress, violation


def welded_beam(x: Array) -> Objectives:
    """RE32: cost, deflection; violation of the shear, bending, weld and buckling limits."""
    h, length, t, b = x
    load = 6000.0
    overhang = 14.0
    elasticity = 30e6
    shear_modulus = 12e6
    root2 = np.sqrt(2.0)
    weld_cost = 1.10471 * h**2 * length
    beam_cost = 0.04811 * t * b * (14 + length)
    stiffness = elasticity * b * t**3
    deflection = 4 * load * overhang**3 / stiffness
    # Shear in the weld: direct, and by the torsion of the overhanging load.
    half_squared = ((h + t) / 2) ** 2
    radius = np.sqrt(length**2 / 4 + half_squared)
    spread = length**2 / 12 + half_squared
    inertia = 2 * root2 * h * length * spread
    torque = load * (overhang + length / 2)
    torsion = torque * radius / inertia
    direct = load / (root2 * h * length)
    mixed = direct * torsion * length / radius
    shear = np.sqrt(direct**2 + mixed + torsion**2)
    bending = 6 * load * overhang / (b * t**2)
    rigidity = np.sqrt(elasticity / (4 * shear_modulus))
    slenderness = 1 - t / (2 * overhang) * rigidity
    bar = 4.013 * elasticity * t * b**3
    buckling_load = bar / 6 / overhang**2 * slenderness
    violation = _violation(
        13_600 - shear,
        30_000 - bending,
        b - h,
        buckling_load - load,
    )
    return weld_cost + beam_cost, deflection, violation


def disc_brake(x: Array) -> Objectives:
    """RE33: mass, stopping time; violation of the limits on size, pressure, heat and torque."""
    inner, outer, force, discs = x
    width = outer - inner
    # A disc without width would divide by zero; it is given a very small one.
    # The bounds of the radii overlap, so a negative width is possible and stays as it is.
    is_flat = np.abs(width) < 1e-9
    width = np.where(is_flat, 1e-9, width)
    # The differences of powers (outer^2 - inner^2 and outer^3 - inner^3) are divided by `width`.
    radii = inner + outer
    cubes = inner**2 + inner * outer + outer**2
    mass = 4.9e-5 * width * radii * (discs - 1)
    time = 9.82e6 * radii / (force * discs * cubes)
    pressure = force / (3.14 * width * radii)
    heat = 2.22e-3 * force * cubes
    temperature = heat / (width * radii**2)
    torque = 2.66e-2 * force * discs * cubes / radii
    violation = _violation(
        width - 20,
        0.4 - pressure,
        1 - temperature,
        torque - 900,
    )
    return mass, time, violation


def crashworthiness(x: Array) -> Objectives:
    """RE34: a vehicle's mass, acceleration in a full frontal crash, intrusion in an offset one."""
    x1, x2, x3, x4, x5 = x
    mass = (
        1640.2823
        + 2.3573285 * x1
        + 2.3220035 * x2
        + 4.5688768 * x3
        + 7.7213633 * x4
        + 4.4559504 * x5
    )
    linear = 6.5856 + 1.15 * x1 - 1.0427 * x2
    linear = linear + 0.9738 * x3 + 0.8364 * x4
    products = -0.3695 * x1 * x4 + 0.0861 * x1 * x5
    products = products + 0.3628 * x2 * x4
    acceleration = linear + products - 0.1106 * x1**2
    acceleration = acceleration - 0.3437 * x3**2 + 0.1764 * x4**2
    linear = -0.0551 + 0.0181 * x1
    linear = linear + 0.1024 * x2 + 0.0421 * x3
    products = (
        -0.0073 * x1 * x2
        + 0.024 * x2 * x3
        - 0.0118 * x2 * x4
        - 0.0204 * x3 * x4
        - 0.008 * x3 * x5
    )
    intrusion = linear + products - 0.0241 * x2**2
    intrusion = intrusion + 0.0109 * x4**2
    return mass, acceleration, intrusion


# Polynomial fits in a = alpha, h = hydrogen area, o = oxygen area, p = post tip thickness. A key is
# a product of these ("hha" is h * h * a), its value the coefficient; one table per objective.
_ROCKET: tuple[dict[str, float], ...] = (
    # Highest temperature of the injector's face.
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
        "oh": -0.0257,
        "oo": 0.0877,
        "pa": -0.0521,
        "ph": 0.00156,
        "po": 0.00198,
        "pp": 0.0184,
    },
    # Combustion length.
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
        "oh": 0.179,
        "oo": 0.0150,
        "pa": 0.0134,
        "ph": 0.0296,
        "po": 0.0752,
        "pp": 0.0192,
    },
    # Highest temperature of the post tip.
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
        "oh": -0.0301,
        "oo": -0.226,
        "pa": 0.353,
        "po": -0.0497,
        "pp": -0.423,
        "haa": 0.202,
        "oaa": -0.281,
        "hha": -0.342,
        "hho": -0.245,
        "ooh": 0.281,
        "ppa": -0.184,
        "hao": -0.281,
    },
)


def rocket_injector(x: Array) -> Objectives:
    """RE37: highest temperature of the face, combustion length, highest one of the post tip."""
    alpha, hydrogen, oxygen, post_tip = x
    variables = {"a": alpha, "h": hydrogen, "o": oxygen, "p": post_tip}
    return tuple(_polynomial(coefficients, variables) for coefficients in _ROCKET)


def _polynomial(coefficients: dict[str, float], variables: dict[str, Array]) -> Array:
    """The sum of coefficient times product of variables, `(n,)`."""
    one = np.ones_like(variables["a"])
    total = np.zeros_like(one)
    for product, coefficient in coefficients.items():
        # `one` gives the constant term (key "") a factor of the right shape.
        factors = [one, *(variables[letter] for letter in product)]
        total = total + coefficient * np.prod(factors, axis=0)
    return total


def car_side(x: Array) -> Objectives:
    """RE41: mass, pelvis force, mean velocity of pillar and door; violation of ten dummy limits."""
    x1, x2, x3, x4, x5, x6, x7 = x
    mass = 1.98 + 4.9 * x1 + 6.67 * x2
    mass = mass + 6.98 * x3 + 4.01 * x4
    mass = mass + 1.78 * x5 + 1e-5 * x6
    mass = mass + 2.73 * x7
    force = 4.72 - 0.5 * x4 - 0.19 * x2 * x3
    pillar = 10.58 - 0.674 * x1 * x2 - 0.67275 * x2
    door = 16.45 - 0.489 * x3 * x7
    door = door - 0.843 * x5 * x6
    abdomen = 1.16 - 0.3717 * x2 * x4 - 0.0092928 * x3
    upper_viscous = (
        0.261
        - 0.0159 * x1 * x2
        - 0.06486 * x1
        - 0.019 * x2 * x7
        + 0.0144 * x3 * x5
        + 0.0154464 * x6
    )
    # The last term of this sum, -0.018 x2^2, stands in the constraint below.
    middle_viscous = (
        0.214
        + 0.00817 * x5
        - 0.0587118 * x1
        + 0.03099 * x2 * x6
        - 0.018 * x2 * x7
        + 0.030408 * x3
        - 0.00364 * x5 * x6
    )
    lower_viscous = 0.74 - 0.61 * x2 - 0.031296 * x3
    lower_viscous = lower_viscous - 0.031872 * x7 + 0.227 * x2**2
    upper_rib = 28.98 + 3.818 * x3 - 4.2 * x1 * x2
    upper_rib = upper_rib + 1.27296 * x6 - 2.68065 * x7
    middle_rib = 35.31728 + 2.95 * x3 - 5.057 * x1 * x2
    middle_rib = middle_rib - 3.795 * x2 - 3.4431 * x7
    lower_rib = 46.36 - 9.9 * x2 - 4.4505 * x1
    violation = _violation(
        1 - abdomen,
        0.32 - upper_viscous,
        0.32 - middle_viscous + 0.018 * x2**2,
        0.32 - lower_viscous,
        32 - upper_rib,
        32 - middle_rib,
        32 - lower_rib,
        4 - force,
        9.9 - pillar,
        15.7 - door,
    )
    return mass, force, (pillar + door) / 2, violation


ENGINEERING: dict[str, EngineeringProblem] = {
    "re21": EngineeringProblem(
        four_bar_truss,
        # Each bar is thick enough for the stress that it bears.
        low=(1.0, 2**0.5, 2**0.5, 1.0),
        high=(3.0, 3.0, 3.0, 3.0),
        published_ideal=(1237.841, 0.00276142),
        published_nadir=(2886.370, 0.04),
    ),
    "re24": EngineeringProblem(
        hatch_cover,
        low=(0.5, 0.5),
        high=(4.0, 50.0),
        published_ideal=(60.5, 0.0),
        published_nadir=(481.6081, 44.28190),
    ),
    "re31": EngineeringProblem(
        two_bar_truss,
        # Areas stay above 0, where the stress would be infinite.
        low=(1e-5, 1e-5, 1.0),
        high=(100.0, 100.0, 3.0),
        published_ideal=(5.537319e-05, 1 / 3, 0.0),
        published_nadir=(500.0027, 8246211.25, 19359919.75),
        logarithmic=True,
    ),
    "re32": EngineeringProblem(
        welded_beam,
        low=(0.125, 0.1, 0.1, 0.125),
        high=(5.0, 10.0, 10.0, 5.0),
        published_ideal=(0.0102055, 0.00043904, 0.0),
        published_nadir=(37.78315, 17561.6, 425062976.6),
        logarithmic=True,
    ),
    "re33": EngineeringProblem(
        disc_brake,
        low=(55.0, 75.0, 1000.0, 11.0),
        high=(80.0, 110.0, 3000.0, 20.0),
        published_ideal=(-0.721525, 1.139072, 0.0),
        published_nadir=(5.3067, 3.128334, 25.0),
    ),
    "re34": EngineeringProblem(
        crashworthiness,
        low=(1.0, 1.0, 1.0, 1.0, 1.0),
        high=(3.0, 3.0, 3.0, 3.0, 3.0),
        published_ideal=(1661.708, 6.1428, 0.0394),
        published_nadir=(1695.200, 10.7454, 0.264),
    ),
    "re37": EngineeringProblem(
        rocket_injector,
        low=(0.0, 0.0, 0.0, 0.0),
        high=(1.0, 1.0, 1.0, 1.0),
        published_ideal=(0.008893414, 0.00488, -0.4315),
        published_nadir=(0.9894912, 0.9565879, 0.9875309),
    ),
    "re41": EngineeringProblem(
        car_side,
        low=(0.5, 0.45, 0.5, 0.5, 0.875, 0.4, 0.4),
        high=(1.5, 1.35, 1.5, 1.5, 2.625, 1.2, 1.2),
        published_ideal=(15.576004, 3.58525, 10.61064375, 0.0),
        published_nadir=(42.768012, 4.42725, 13.09138125, 9.449293),
    ),
}
"""Problem name -> problem."""
