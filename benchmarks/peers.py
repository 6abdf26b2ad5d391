"""Who searches in `benchmarks/search.py`: one function per peer, `(problem, meter, seed)`, that goes on until the meter is full.

A peer calls the meter once per evaluation; the meter keeps the values and the time between calls, which is what asking
(and telling) takes. No peer knows the budget: the first 60 evaluations of a run of 300 are a run of 60. Each has its own
start design, after the problem's known starts, and everything random comes from the seed; noise is drawn from (seed,
number of the evaluation), so it is the same for all.

- Presets: the samplers that study.yaml offers by name, as they are set up for 60 trials (a population of 20). `mmmo` is
  ours; `mmmo -part` and `mmmo +part` switch a part off and on, `mmmo name=value` sets one (values as in JSON), several
  with spaces between. It is given the reference point; `cma` adds the objectives up in units of their range from the
  reference point to the ideal; `llm` needs an endpoint and is not here.
- `nsga2 for 300`: the preset as it is set up for 300 trials, with a population of 50.
- `botorch`, `mmmo-published`, `ap-bmm`: see bayesian.py.
- `pymoo-nsga2`, `pymoo-sms-emoa`: populations of 20; SMS-EMOA in its steady state (one child at a time).
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import optuna
import torch
from bayesian import ap_bmm, botorch, mmmo_published
from meter import BudgetSpentError, Cube, Meter, starts
from numpy.typing import NDArray
from problems import Problem

from paretomerge.search import presets
from paretomerge.search.mmmo.sampler import Settings

Array = NDArray[np.float64]
POPULATION = 20
PRESETS = [name for name in presets.PRESETS if name != "llm"]


Peer = Callable[[Problem, Meter, int], None]


def run(name: str, problem: Problem, seed: int, evaluations: int) -> Meter:
    """One search from its starts to the end of its budget."""
    peer = find(name)
    meter = Meter(problem, seed, evaluations)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of experimental samplers, early stops of fits, unbalanced Sobol points
        torch.manual_seed(seed)
        try:
            peer(problem, meter, seed)
        except BudgetSpentError:
            return meter
    raise RuntimeError(
        f"{name} on {problem.name}: expected {evaluations} evaluations, it stopped after {len(meter.seen)}"
    )


def find(name: str) -> Peer:
    """The peer of this name, parts of `mmmo` read."""
    first, *parts = name.split()
    if first == "mmmo" or (first in PRESETS and not parts):
        return partial(_optuna, first, dict(_part(part) for part in parts))
    if name not in OWN:
        raise SystemExit(
            f"--peers: expected one of {', '.join(names())}, or mmmo with parts; got {name}"
        )
    return OWN[name]


def names() -> list[str]:
    """Every peer, ours first, without the ablation."""
    return [*PRESETS, *OWN]


def ablation() -> list[str]:
    """`mmmo`, and `mmmo` with each of its switches turned."""
    switches = {f.name: f.default for f in fields(Settings) if isinstance(f.default, bool)}
    return ["mmmo", *(f"mmmo {'-' if on else '+'}{part}" for part, on in switches.items())]


# ----- samplers of Optuna


def _optuna(
    name: str,
    options: Mapping[str, Any],
    problem: Problem,
    meter: Meter,
    seed: int,
    trials: int = 60,
) -> None:
    """An in-memory study, asked and told as ours are: values maximised, standard errors in the attribute `stderr`."""
    known_starts = problem.starts
    best = max(
        known_starts, key=lambda start: float(problem.evaluate([start]).mean()), default=None
    )  # where CMA-ES begins
    known = presets.Problem(
        problem.distributions,
        problem.m,
        seed,
        problem.conditions,
        len(known_starts),
        start=best,
        trials=trials,
    )
    if name == "mmmo":
        options = {"reference": problem.reference.tolist(), **options}
    elif name == "cma":
        options = {"weights": (1 / (problem.ideal - problem.reference)).tolist()}
    study = optuna.create_study(
        directions=["maximize"] * problem.m, sampler=presets.make(name, known, options)
    )
    for start in known_starts:
        study.enqueue_trial(dict(start))
    while True:
        trial = study.ask(dict(problem.distributions))
        values, stderr = meter(trial.params)
        if stderr is not None:
            trial.set_user_attr("stderr", stderr.tolist())
        study.tell(trial, values.tolist())


def _part(text: str) -> tuple[str, Any]:
    """`-name`, `+name` or `name=value` -> name and value."""
    if text[0] in "+-":
        return text[1:], text[0] == "+"
    name, separator, value = text.partition("=")
    if not separator:
        raise SystemExit(
            f"--peers: expected mmmo followed by -part, +part or name=value, got {text}"
        )
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _pymoo(name: str, problem: Problem, meter: Meter, seed: int) -> None:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.sms import SMSEMOA
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.core.termination import NoTermination

    cube = Cube(problem, meter)

    class Minimised(PymooProblem):  # type: ignore[misc]
        def _evaluate(self, x: Array, out: dict[str, Array], *_: Any, **__: Any) -> None:
            before = len(meter.seen)
            cube(x)
            out["F"] = -meter.y[before:]

    task = Minimised(n_var=cube.encoding.d, n_obj=problem.m, xl=0.0, xu=1.0)
    first = starts(problem, cube.encoding, POPULATION, seed)
    algorithm = (
        NSGA2(POPULATION, sampling=first)
        if name == "nsga2"
        else SMSEMOA(POPULATION, sampling=first, n_offsprings=1)
    )
    algorithm.setup(task, termination=NoTermination(), seed=seed)
    while True:
        children = algorithm.ask()
        algorithm.evaluator.eval(task, children)
        algorithm.tell(infills=children)


OWN: dict[str, Peer] = {
    "nsga2 for 300": partial(_optuna, "nsga2", {}, trials=300),
    "botorch": botorch,
    "pymoo-nsga2": partial(_pymoo, "nsga2"),
    "pymoo-sms-emoa": partial(_pymoo, "sms-emoa"),
    "mmmo-published": mmmo_published,
    "ap-bmm": ap_bmm,
}
