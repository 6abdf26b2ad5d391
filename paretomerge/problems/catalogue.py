"""Every problem by name."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TypedDict

import numpy as np
from optuna.distributions import FloatDistribution

from paretomerge.errors import ConfigError, unknown_name
from paretomerge.problems.engineering import ENGINEERING
from paretomerge.problems.merge_landscape import MergeLandscape
from paretomerge.problems.problem import N_EXAMPLES, Problem, binomial
from paretomerge.problems.synthetic import dtlz2, dtlz7, zdt
from paretomerge.types import Array, Params

REFERENCES = Path(__file__).parent / "data" / "references.json"
"""Problem -> ideal point, reference point, hypervolume; written by `benchmarks.references`."""

DIMENSIONS = (5, 10, 30, 100)
_NOISY = "-noisy"


class Reference(TypedDict):
    """What is known of a problem's true front, minimised."""

    ideal: list[float]
    reference: list[float]
    volume: float


@dataclass(frozen=True)
class UnitCubeFunction:
    """A function on the unit cube.

    Attributes:
        function: points `(n, d)` -> values `(n, m)`, minimised.
        d: number of parameters.
    """

    function: Callable[[Array], Array]
    d: int


@cache
def unit_cube_functions() -> dict[str, UnitCubeFunction]:
    """Every synthetic and engineering function.

    Returns:
        Problem name -> function.
    """
    table: dict[str, UnitCubeFunction] = {}
    for d in DIMENSIONS:
        for kind in (1, 2, 3):
            # `partial` binds `kind` now; a lambda would read the last one of the loop.
            function = partial(zdt, kind)
            table[f"zdt{kind}-d{d}"] = UnitCubeFunction(function, d)
    for m in (2, 3, 4):
        for d in DIMENSIONS:
            function = partial(dtlz2, m)
            table[f"dtlz2-m{m}-d{d}"] = UnitCubeFunction(function, d)
            function = partial(dtlz7, m)
            table[f"dtlz7-m{m}-d{d}"] = UnitCubeFunction(function, d)
    for name, design in ENGINEERING.items():
        d = len(design.low)
        table[name] = UnitCubeFunction(design, d)
    return table


def names() -> list[str]:
    """The name of every problem, those without noise first.

    Returns:
        `zdt1-d5`, ..., `dtlz7-m4-d100` (m objectives, d parameters); `re21`, ..., `re41`;
        `landscape`; and each of these with `-noisy` at its end.

    Example:
        >>> from paretomerge import problems
        >>> [name for name in problems.names() if name.startswith("zdt1")][:2]
        ['zdt1-d5', 'zdt1-d10']
    """
    exact = [*unit_cube_functions(), "landscape"]
    noisy = [name + _NOISY for name in exact]
    return exact + noisy


def get(name: str, *, n_examples: int = N_EXAMPLES, seed: int = 0) -> Problem:
    """The problem of a name.

    A name that ends in `-noisy` gives a problem whose objectives are accuracies, observed over
    some test examples each, as the scores of merges are (`Problem.as_accuracies`).

    Reference points are fixed per problem: per objective a tenth of the true front's range beyond
    its nadir; for the synthetic problems the median of 4,096 random points where that is worse. In
    many dimensions no search reaches the nadir in 100 evaluations, and all would score 0.

    Args:
        name: one of `names()`.
        n_examples: test examples per value, for a noisy problem.
        seed: of the noise.

    Returns:
        The problem.

    Raises:
        ConfigError: no problem has this name.

    Example:
        >>> from paretomerge import problems
        >>> problem = problems.get("zdt1-d30")
        >>> len(problem.space), problem.directions
        (30, ['maximize', 'maximize'])
    """
    exact_name = name.removesuffix(_NOISY)
    noisy = exact_name != name
    if exact_name == "landscape":
        return landscape(noise=noisy, n_examples=n_examples, seed=seed)
    if exact_name not in unit_cube_functions():
        raise ConfigError(unknown_name("problem", name, names()))
    problem = replace(_from_function(exact_name), name=name, seed=seed)
    if noisy:
        return problem.as_accuracies(n_examples)
    return problem


def landscape(
    *, noise: bool = False, n_examples: int = N_EXAMPLES, seed: int = 0
) -> Problem:
    """Merges of three fine-tuned models, each an accuracy on three tasks.

    3,488 real merges were evaluated, and a Gaussian process per task was fitted to them; an
    evaluation asks these processes and takes two milliseconds. See `MergeLandscape` for the space,
    and docs/lab/landscape.md for how good the surrogate is.

    Args:
        noise: observe accuracies on `n_examples` test examples, with binomial noise. False: the
            surrogate's own scores.
        n_examples: test examples per task and evaluation.
        seed: of the noise.

    Returns:
        The problem. Its `starts` are each model alone, the uniform average, and published defaults.

    Example:
        >>> from paretomerge import problems
        >>> problem = problems.landscape()
        >>> problem.space["method"].choices
        ('task_arithmetic', 'ties', 'dare_ties')
    """
    model = MergeLandscape.load()
    # The surrogate's front has no closed form; a sample of it stands in for it.
    front_scores = model.scores(model.front)
    best_scores = front_scores.max(0)
    return Problem(
        name="landscape" + (_NOISY if noise else ""),
        space=model.space,
        evaluate=model.scores,
        reference_point=model.reference_point,
        ideal_point=best_scores,
        front_hypervolume=model.front_hypervolume,
        noise=partial(binomial, n_examples=n_examples) if noise else None,
        conditions=model.conditions,
        starts=tuple(model.baselines.values()),
        seed=seed,
    )


def _from_function(name: str) -> Problem:
    cube_function = unit_cube_functions()[name]
    reference = _references()[name]
    unit_interval = FloatDistribution(0.0, 1.0)
    parameters = [f"x{i}" for i in range(cube_function.d)]

    def evaluate(points: Sequence[Params]) -> Array:
        rows = []
        for point in points:
            # By name: a trial's parameters may come in any order.
            rows.append([point[name] for name in parameters])
        x = np.array(rows)
        return -cube_function.function(x)

    # The literature minimises and `Problem` maximises, so values and both points change sign.
    # The hypervolume between them stays the same.
    return Problem(
        name=name,
        space=dict.fromkeys(parameters, unit_interval),
        evaluate=evaluate,
        reference_point=-np.asarray(reference["reference"]),
        ideal_point=-np.asarray(reference["ideal"]),
        front_hypervolume=reference["volume"],
    )


@cache
def _references() -> dict[str, Reference]:
    text = REFERENCES.read_text()
    references: dict[str, Reference] = json.loads(text)
    return references
