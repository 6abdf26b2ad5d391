"""The contract of a sampler: what a study relies on, whichever Optuna `BaseSampler` it was given.

    check_sampler(lambda seed: MySampler(seed=seed, space=SPACE, conditions=CONDITIONS))
    check_define_by_run(lambda seed: MySampler(seed=seed))  # where it can do without being told the space

Let `make` give a sampler that begins in earnest after some six trials, or the checks see its first points only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from paretomerge.pareto.front import hypervolume
from paretomerge.search.encoding import Encoding

Make = Callable[[int], BaseSampler]
Params = Mapping[str, Any]

SPACE: Mapping[str, BaseDistribution] = {
    "method": CategoricalDistribution(("plain", "sparse")),
    "weight/a": FloatDistribution(0.0, 1.5),
    "weight/b": FloatDistribution(-0.5, 1.5),
    "density": FloatDistribution(0.1, 1.0),
    "rank": IntDistribution(1, 64, log=True),
    "step": FloatDistribution(0.0, 1.0, step=0.25),
    "one": IntDistribution(2, 2),
}
"""The space of the checks: every kind of parameter that a merge has, and one that cannot vary."""

CONDITIONS = {"density": [("method", ("sparse",))]}
"""When a parameter of SPACE counts."""

_FAILS = (0, 1, 5, 11)  # the first ones, when nothing else is known, and some later
_EXAMPLES = 20


def check_sampler(
    make: Make,
    *,
    trials: int = 16,
    objectives: Sequence[int] = (1, 2, 3),
    exact: bool = True,
    repeats: bool = False,
) -> None:
    """The laws, each broken by an AssertionError that names it. `make(seed)` gives a fresh sampler for SPACE.

    - Parameters lie inside their distributions and have their types, with each number of objectives, both directions
      mixed, and trials that fail, the first ones included.
    - The same seed gives the same trials; another seed gives others.
    - Minimising is maximising with the sign turned.
    - No point comes twice, and trials that run at the same time get different points.
    - A fresh sampler, told to draw new random numbers and given the record, goes on as if never stopped.
    - What is found is better than a corner of the space.

    trials: how many a study has. exact: False for Optuna's own samplers, whose random state is lost with the process: the
    law of the resumed study and that of the turned sign are then left out. repeats: points may come twice.
    """
    for m in objectives:
        study = searched(make(0), trials, _mixed(m))
        _check_inside(study.trials)
        if not repeats:
            _check_new(study.trials)
    m = max(objectives)
    study = searched(make(0), trials, ["maximize"] * m)
    _check_same(
        study.trials,
        searched(make(0), trials, ["maximize"] * m).trials,
        "the same seed gives the same trials",
    )
    assert _points(study.trials) != _points(searched(make(1), trials, ["maximize"] * m).trials), (
        "another seed gives the same trials"
    )
    if exact:
        turned = searched(make(0), trials, ["minimize"] * m)
        _check_same(study.trials, turned.trials, "minimising is maximising with the sign turned")
        for done in (trials // 2, trials - 1):
            _check_same(
                study.trials,
                _resumed(make(0), study, done, trials).trials,
                f"a study resumed after {done} trials goes on as it was",
            )
    _check_pending(make(0), study)
    _check_finds(study)


def check_define_by_run(make: Make, *, trials: int = 14) -> None:
    """Parameters that come up while a trial runs, some of them under one choice only, lie inside their distributions."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(0))
    for number in range(trials):
        trial = study.ask()
        width = trial.suggest_float("width", 0.5, 2.0)
        extra = (
            trial.suggest_int("extra", 1, 5)
            if trial.suggest_categorical("kind", ("a", "b")) == "a"
            else 0
        )
        if number > trials // 2:
            width += trial.suggest_float(
                "late", 0.0, 1.0
            )  # a parameter that earlier trials do not have
        study.tell(trial, [width + extra, width**2])
    _check_inside(study.trials)


def searched(sampler: BaseSampler, trials: int, directions: Sequence[str]) -> optuna.Study:
    """A study of `trials` on SPACE, some of which fail; all objectives are those of the maximising study, turned by need."""
    study = optuna.create_study(
        directions=[StudyDirection[d.upper()] for d in directions], sampler=sampler
    )
    _go_on(study, trials)
    return study


def _go_on(study: optuna.Study, trials: int) -> None:
    signs = [1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions]
    for _ in range(len(study.trials), trials):
        trial = study.ask(dict(SPACE))
        if trial.number in _FAILS:
            study.tell(trial, state=TrialState.FAIL)
            continue
        values = [
            sign * value
            for sign, value in zip(signs, scores(trial.params, len(signs)), strict=True)
        ]
        trial.set_user_attr("stderr", [0.01] * len(signs))
        trial.set_user_attr(
            "scores",
            {
                f"task {k}": [value, 0.01, _EXAMPLES, _items(value, k)]
                for k, value in enumerate(values)
            },
        )
        study.tell(trial, values)


def scores(params: Params, m: int) -> list[float]:
    """m objectives, all maximised: nearness to m places, a little further away for `plain`; the best of each is 0."""
    point = [
        params["weight/a"] / 1.5,
        (params["weight/b"] + 0.5) / 2,
        np.log(params["rank"]) / np.log(64),
        params["step"],
    ]
    method = 0.1 if params["method"] == "plain" else 0.2 * (params["density"] - 0.4) ** 2
    return [
        -float(sum((p - 0.25 - 0.25 * k * (i % 2)) ** 2 for i, p in enumerate(point)) + method)
        for k in range(m)
    ]


def _items(value: float, k: int) -> str:
    """Right and wrong per example, in an order of each task's own: about as many are right as the value says."""
    order = np.random.default_rng(k).permutation(_EXAMPLES)
    right = round(_EXAMPLES * float(np.exp(-abs(value))))
    return "".join("1" if place < right else "0" for place in order)


def _mixed(m: int) -> list[str]:
    return ["maximize" if k % 2 == 0 else "minimize" for k in range(m)]


def _check_inside(trials: Iterable[FrozenTrial]) -> None:
    for trial in trials:
        for name, value in trial.params.items():
            distribution = trial.distributions[name]
            inside = distribution._contains(distribution.to_internal_repr(value))
            assert inside, (
                f"trial {trial.number}: expected {name} inside {distribution}, got {value!r}"
            )
            kind = {FloatDistribution: float, IntDistribution: int}.get(type(distribution), object)
            assert isinstance(value, kind), (
                f"trial {trial.number}: expected {name} as {kind.__name__}, got {type(value).__name__}"
            )


def _points(trials: Sequence[FrozenTrial]) -> list[tuple[float, ...]]:
    """Where the trials are: parameters that do not count make no difference."""
    return [
        tuple(np.round(x, 6))
        for x in Encoding(SPACE, CONDITIONS).encode([t.params for t in trials])
    ]


def _check_new(trials: Sequence[FrozenTrial]) -> None:
    points = _points(trials)
    for number, point in enumerate(points):
        first = points.index(point)
        assert first == number, (
            f"trial {number}: expected a new point, got that of trial {first}: {trials[number].params}"
        )


def _check_same(expected: Sequence[FrozenTrial], got: Sequence[FrozenTrial], law: str) -> None:
    for one, other in zip(expected, got, strict=True):
        assert one.params == other.params, (
            f"{law}: at trial {one.number} expected {one.params}, got {other.params}"
        )


def _resumed(sampler: BaseSampler, study: optuna.Study, done: int, trials: int) -> optuna.Study:
    """The study again from the record of its first `done` trials, as `Study.run` does it."""
    sampler.reseed_rng()
    resumed = optuna.create_study(directions=study.directions, sampler=sampler)
    resumed.add_trials([_recorded(trial) for trial in study.trials[:done]])
    _go_on(resumed, trials)
    return resumed


def _recorded(trial: FrozenTrial) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
    )


def _check_pending(sampler: BaseSampler, study: optuna.Study) -> None:
    """Four more trials at once."""
    again = optuna.create_study(directions=study.directions, sampler=sampler)
    again.add_trials([_recorded(trial) for trial in study.trials])
    running: list[Trial] = [again.ask(dict(SPACE)) for _ in range(4)]
    points = _points([trial._get_latest_trial() for trial in running])
    assert len(set(points)) == len(points), (
        f"trials that run at the same time: expected different points, got {points}"
    )


def _check_finds(study: optuna.Study) -> None:
    m = len(study.directions)
    corner = {
        "method": "plain",
        "weight/a": 1.5,
        "weight/b": 1.5,
        "density": 1.0,
        "rank": 64,
        "step": 1.0,
    }
    reference = np.full(m, -4.0)
    found = hypervolume(
        [t.values for t in study.trials if t.state == TrialState.COMPLETE], reference
    )
    least = hypervolume([scores(corner, m)], reference)
    assert found > least, (
        f"expected a hypervolume above that of a corner of the space, {least:.3f}, got {found:.3f}"
    )
