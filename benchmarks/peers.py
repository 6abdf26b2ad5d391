"""The optimisers of the search benchmark: each is a function `(problem, meter, seed)`.

A peer calls the meter once per evaluation, until the meter's budget is spent; the meter records the
values and the time between calls. No peer knows the budget: the first 60 evaluations of a run of
300 are a run of 60. Each has its own initial design, after the problem's baseline points.
Everything random comes from the seed; the noise is the same for all peers.

- Presets: the samplers that study.yaml offers by name, as they are set up for 60 trials (a
  population of 20). `mmmo` is ours; `mmmo -part` and `mmmo +part` switch a part off and on,
  `mmmo name=value` sets one (values as in JSON), several with spaces between. It is given the
  reference point. `cma` sums the objectives in units of their range from the reference point to the
  ideal one. `llm` needs an endpoint and is not here.
- `nsga2 for 300`: the preset as it is set up for 300 trials, with a population of 50.
- `botorch`, `mmmo-published`, `ap-bmm`: see `bayesian_peers`.
- `pymoo-nsga2`, `pymoo-sms-emoa`: populations of 20; SMS-EMOA in its steady state.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import optuna
import torch
from optuna.samplers import BaseSampler

from benchmarks.bayesian_peers import ap_bmm, botorch, mmmo_published
from benchmarks.meter import BudgetSpentError, Meter, UnitCube
from paretomerge.problems import Problem
from paretomerge.search.mmmo.sampler import Settings
from paretomerge.search.registry import PRESETS, SearchProblem, make
from paretomerge.types import Array

POPULATION = 20
PRESET_NAMES = [name for name in PRESETS if name != "llm"]

Peer = Callable[[Problem, Meter, int], None]


def run(name: str, problem: Problem, seed: int, evaluations: int) -> Meter:
    """One search from its beginning to the end of its budget."""
    peer = find(name)
    meter = Meter(problem, seed, evaluations)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Experimental samplers, fits that stop early, Sobol points that are no power of 2.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            peer(problem, meter, seed)
        except BudgetSpentError:
            return meter
    done = len(meter.observed)
    raise RuntimeError(
        f"{name} on {problem.name} stopped after {done} of {evaluations}"
    )


def find(name: str) -> Peer:
    """The peer of this name, with the switched parts of `mmmo`."""
    preset, *parts = name.split()
    if preset == "mmmo" or (preset in PRESET_NAMES and not parts):
        return partial(
            search_with_preset, preset, dict(parse_part(part) for part in parts)
        )
    if name not in OTHER_PEERS:
        listed = ", ".join(names())
        raise SystemExit(
            f"--peers: expected one of {listed}, or mmmo with parts; got {name}"
        )
    return OTHER_PEERS[name]


def names() -> list[str]:
    """Every peer, ours first, without the ablation."""
    return [*PRESET_NAMES, *OTHER_PEERS]


def ablation() -> list[str]:
    """`mmmo`, and `mmmo` with each of its switches turned."""
    switched = ["mmmo"]
    for setting in fields(Settings):
        if isinstance(setting.default, bool):
            sign = "-" if setting.default else "+"
            switched.append(f"mmmo {sign}{setting.name}")
    return switched


def parse_part(text: str) -> tuple[str, Any]:
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


# ----- samplers of Optuna


def search_with_preset(
    preset: str,
    options: Mapping[str, Any],
    problem: Problem,
    meter: Meter,
    seed: int,
    n_trials: int = 60,
) -> None:
    """A study in memory, run as ours are: maximised, standard errors in the attribute `stderr`."""
    sampler = preset_sampler(preset, options, problem, seed, n_trials)
    study = optuna.create_study(directions=problem.directions, sampler=sampler)
    for start in problem.starts:
        study.enqueue_trial(dict(start))
    while True:
        trial = study.ask(dict(problem.space))
        values, stderr = meter(trial.params)
        if stderr is not None:
            trial.set_user_attr("stderr", stderr.tolist())
        study.tell(trial, values.tolist())


def preset_sampler(
    preset: str, options: Mapping[str, Any], problem: Problem, seed: int, n_trials: int
) -> BaseSampler:
    """The preset as a study of `n_trials` sets it up."""

    def mean_value(start: Mapping[str, Any]) -> float:
        return float(problem.evaluate([start]).mean())

    search_problem = SearchProblem(
        problem.space,
        problem.n_objectives,
        seed,
        problem.conditions,
        len(problem.starts),
        start=max(problem.starts, key=mean_value, default=None),
        trials=n_trials,
    )
    if preset == "mmmo":
        options = {"reference": problem.reference_point.tolist(), **options}
    elif preset == "cma":
        ranges = problem.ideal_point - problem.reference_point
        options = {"weights": (1 / ranges).tolist()}
    return make(preset, search_problem, options)


# ----- pymoo


def search_with_pymoo(name: str, problem: Problem, meter: Meter, seed: int) -> None:
    """One of pymoo's algorithms, one generation after another."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.sms import SMSEMOA
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.core.termination import NoTermination

    cube = UnitCube(problem, meter)

    class Minimised(PymooProblem):  # type: ignore[misc]
        def _evaluate(
            self, x: Array, out: dict[str, Array], *_: Any, **__: Any
        ) -> None:
            before = len(meter.observed)
            cube.evaluate(x)
            out["F"] = -meter.y[before:]

    task = Minimised(n_var=cube.encoding.d, n_obj=problem.n_objectives, xl=0.0, xu=1.0)
    first = cube.initial_design(POPULATION, seed)
    if name == "nsga2":
        algorithm = NSGA2(POPULATION, sampling=first)
    else:
        algorithm = SMSEMOA(POPULATION, sampling=first, n_offsprings=1)
    algorithm.setup(task, termination=NoTermination(), seed=seed)
    while True:
        children = algorithm.ask()
        algorithm.evaluator.eval(task, children)
        algorithm.tell(infills=children)


OTHER_PEERS: dict[str, Peer] = {
    "nsga2 for 300": partial(search_with_preset, "nsga2", {}, n_trials=300),
    "botorch": botorch,
    "pymoo-nsga2": partial(search_with_pymoo, "nsga2"),
    "pymoo-sms-emoa": partial(search_with_pymoo, "sms-emoa"),
    "mmmo-published": mmmo_published,
    "ap-bmm": ap_bmm,
}
