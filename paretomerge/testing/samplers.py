"""The contract of a sampler: what a study relies on, for any Optuna `BaseSampler`.

    check_sampler(lambda seed: MySampler(seed=seed, space=SPACE, conditions=CONDITIONS))
    check_define_by_run(lambda seed: MySampler(seed=seed))  # if it works without a given space

Let `make` return a sampler that needs about six trials before it proposes by its own rule;
otherwise the checks see only its first, random points.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

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
from optuna.trial import FrozenTrial, TrialState

from paretomerge.pareto.front import hypervolume
from paretomerge.search._optuna import contains
from paretomerge.search.encoding import Encoding
from paretomerge.types import Conditions, ParamValue

MakeSampler = Callable[[int], BaseSampler]

SPACE: Mapping[str, BaseDistribution] = {
    "method": CategoricalDistribution(("plain", "sparse")),
    "weight/a": FloatDistribution(0.0, 1.5),
    "weight/b": FloatDistribution(-0.5, 1.5),
    "density": FloatDistribution(0.1, 1.0),
    "rank": IntDistribution(1, 64, log=True),
    "step": FloatDistribution(0.0, 1.0, step=0.25),
    "one": IntDistribution(2, 2),
}
"""The space of the checks: every kind of parameter of a merge, and one with a single value."""

CONDITIONS: Conditions = {"density": [("method", ("sparse",))]}
"""When a parameter of SPACE is active."""

# The first trials, so that a sampler has no values at all, and some later ones.
_FAILING_TRIALS = (0, 1, 5, 11)
_EXAMPLES = 20
# The type that Optuna documents for a suggested value.
_VALUE_TYPES = {FloatDistribution: float, IntDistribution: int}
_CORNER: Mapping[str, ParamValue] = {
    "method": "plain",
    "weight/a": 1.5,
    "weight/b": 1.5,
    "density": 1.0,
    "rank": 64,
    "step": 1.0,
}


def check_sampler(
    make: MakeSampler,
    *,
    trials: int = 16,
    objectives: Sequence[int] = (1, 2, 3),
    exact: bool = True,
    repeats: bool = False,
) -> None:
    """Check the laws of a sampler.

    - Parameters lie inside their distributions and have their types, with each number of
      objectives, mixed directions, and trials that fail, the first ones included.
    - The same seed gives the same trials; another seed gives other trials.
    - Minimising an objective is maximising its negative.
    - No point comes twice, and trials that run at the same time get different points.
    - A new sampler, reseeded and given the recorded trials, continues as if the study had not
      stopped.
    - The trials are better than a corner of the space.

    Args:
        make: Seed -> a new sampler for SPACE and CONDITIONS.
        trials: Number of trials of each study.
        objectives: Numbers of objectives.
        exact: Whether to check resumed studies and negated objectives. False for Optuna's own
            samplers, whose random state is lost with the process.
        repeats: Whether points may come twice.

    Raises:
        AssertionError: A law is broken; the message names it.
    """
    for m in objectives:
        study = searched(make(0), trials, _mixed_directions(m))
        _check_values(study.trials)
        if not repeats:
            _check_no_repeats(study.trials)

    maximise = ["maximize"] * max(objectives)
    study = searched(make(0), trials, maximise)
    again = searched(make(0), trials, maximise)
    _check_same(study, again, "the same seed gives the same trials")
    other_seed = searched(make(1), trials, maximise)
    differs = _points(study.trials) != _points(other_seed.trials)
    assert differs, "another seed gives the same trials"

    if exact:
        minimise = ["minimize"] * len(maximise)
        negated = searched(make(0), trials, minimise)
        _check_same(study, negated, "minimising is maximising the negative")
        for n_recorded in (trials // 2, trials - 1):
            resumed = _resumed(make(0), study, n_recorded, trials)
            law = f"a study resumed after {n_recorded} trials continues as if it had not stopped"
            _check_same(study, resumed, law)
    _check_parallel(make(0), study)
    _check_progress(study)


def check_define_by_run(make: MakeSampler, *, trials: int = 14) -> None:
    """Check a sampler on a define-by-run study, where conditional and new parameters come up.

    Args:
        make: Seed -> a new sampler without a given space.
        trials: Number of trials.

    Raises:
        AssertionError: A value lies outside its distribution or has a wrong type.
    """
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(0))
    for number in range(trials):
        trial = study.ask()
        width = trial.suggest_float("width", 0.5, 2.0)
        kind = trial.suggest_categorical("kind", ("a", "b"))
        extra = 0
        if kind == "a":
            extra = trial.suggest_int("extra", 1, 5)
        if number > trials // 2:
            # A parameter that earlier trials do not have.
            late = trial.suggest_float("late", 0.0, 1.0)
            width += late
        study.tell(trial, [width + extra, width**2])
    _check_values(study.trials)


def searched(
    sampler: BaseSampler, trials: int, directions: Sequence[str]
) -> optuna.Study:
    """Run a study on SPACE; some trials fail.

    Args:
        sampler: The sampler.
        trials: Number of trials.
        directions: "maximize" or "minimize" per objective. The objectives are those of `scores`,
            negated where they are minimised.
    """
    enums = [StudyDirection[direction.upper()] for direction in directions]
    study = optuna.create_study(directions=enums, sampler=sampler)
    _run(study, trials)
    return study


def _run(study: optuna.Study, trials: int) -> None:
    """Run a study until it has so many trials."""
    maximise = [direction == StudyDirection.MAXIMIZE for direction in study.directions]
    signs = np.where(maximise, 1.0, -1.0)
    m = len(signs)
    for _ in range(len(study.trials), trials):
        # Asks for inactive parameters as well: `scores` reads every number.
        trial = study.ask(dict(SPACE))
        if trial.number in _FAILING_TRIALS:
            study.tell(trial, state=TrialState.FAIL)
            continue
        values = (signs * scores(trial.params, m)).tolist()
        stored = {}
        for k, value in enumerate(values):
            stored[f"task {k}"] = [value, 0.01, _EXAMPLES, _example_scores(value, k)]
        trial.set_user_attr("stderr", [0.01] * m)
        trial.set_user_attr("scores", stored)
        study.tell(trial, values)


def scores(params: Mapping[str, ParamValue], m: int) -> list[float]:
    """Score a point of SPACE.

    Args:
        params: The parameters.
        m: Number of objectives.

    Returns:
        m objectives, all maximised: minus the squared distances from m points, less a penalty that
        depends on the method. The maximum of each is 0.
    """
    weight_a, weight_b, rank, step, density = _numbers(params)
    log_rank = np.log(rank) / np.log(64)
    point = [weight_a / 1.5, (weight_b + 0.5) / 2, log_rank, step]
    penalty = 0.1
    if params["method"] != "plain":
        penalty = 0.2 * (density - 0.4) ** 2
    objectives = []
    for k in range(m):
        distance = 0.0
        for i, coordinate in enumerate(point):
            # The targets differ in every second coordinate, so the objectives conflict there.
            target = 0.25 * k * (i % 2)
            offset = coordinate - 0.25 - target
            distance += offset**2
        objectives.append(-float(distance + penalty))
    return objectives


def _numbers(params: Mapping[str, ParamValue]) -> list[float]:
    """The numbers that the scores depend on."""
    numbers = []
    for name in ("weight/a", "weight/b", "rank", "step", "density"):
        value = params[name]
        assert isinstance(value, float | int), (
            f"{name}: expected a number, got {value!r}"
        )
        numbers.append(value)
    return numbers


def _example_scores(value: float, task: int) -> str:
    """One digit per example, 1 where it is solved; the share of 1 grows with the value.

    Each task solves its examples in an order of its own.
    """
    order = np.random.default_rng(task).permutation(_EXAMPLES)
    n_solved = round(_EXAMPLES * float(np.exp(-abs(value))))
    solved = order < n_solved
    return "".join(solved.astype(int).astype(str))


def _mixed_directions(m: int) -> list[str]:
    return ["maximize" if k % 2 == 0 else "minimize" for k in range(m)]


def _check_values(trials: Iterable[FrozenTrial]) -> None:
    for trial in trials:
        for name, value in trial.params.items():
            distribution = trial.distributions[name]
            assert contains(distribution, value), (
                f"trial {trial.number}: expected {name} inside {distribution}, got {value!r}"
            )
            expected = _VALUE_TYPES.get(type(distribution), object)
            assert isinstance(value, expected), (
                f"trial {trial.number}: expected {name} as {expected.__name__}, "
                f"got {type(value).__name__}"
            )


def _points(trials: Sequence[FrozenTrial]) -> list[tuple[float, ...]]:
    """The rounded points of trials; inactive parameters make no difference."""
    return _rounded_points([trial.params for trial in trials])


def _rounded_points(
    params: Sequence[Mapping[str, ParamValue]],
) -> list[tuple[float, ...]]:
    # Encoded, because points that differ in inactive parameters only are the same merge.
    encoding = Encoding(SPACE, CONDITIONS)
    x = encoding.encode(params)
    return [tuple(row) for row in np.round(x, 6)]


def _check_no_repeats(trials: Sequence[FrozenTrial]) -> None:
    points = _points(trials)
    for number, point in enumerate(points):
        first = points.index(point)
        assert first == number, (
            f"trial {number}: expected a new point, got that of trial {first}: "
            f"{trials[number].params}"
        )


def _check_same(expected: optuna.Study, actual: optuna.Study, law: str) -> None:
    for one, other in zip(expected.trials, actual.trials, strict=True):
        assert one.params == other.params, (
            f"{law}: at trial {one.number} expected {one.params}, got {other.params}"
        )


def _resumed(
    sampler: BaseSampler, study: optuna.Study, n_recorded: int, trials: int
) -> optuna.Study:
    """The study, resumed from its first `n_recorded` trials as `paretomerge.Study` does it."""
    # A study reseeds its sampler when it resumes, so the laws must hold after that.
    sampler.reseed_rng()
    resumed = optuna.create_study(directions=study.directions, sampler=sampler)
    resumed.add_trials([_copy(trial) for trial in study.trials[:n_recorded]])
    _run(resumed, trials)
    return resumed


def _copy(trial: FrozenTrial) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
    )


def _check_parallel(sampler: BaseSampler, study: optuna.Study) -> None:
    """Four more trials that run at the same time get different points."""
    again = optuna.create_study(directions=study.directions, sampler=sampler)
    again.add_trials([_copy(trial) for trial in study.trials])
    running = [again.ask(dict(SPACE)) for _ in range(4)]
    points = _rounded_points([trial.params for trial in running])
    assert len(set(points)) == len(points), (
        f"trials that run at the same time: expected different points, got {points}"
    )


def _check_progress(study: optuna.Study) -> None:
    """The hypervolume of the trials is above that of a corner of the space."""
    m = len(study.directions)
    # Below every value of up to three objectives: 4 * 0.75^2 + 0.1 is the largest loss.
    reference = np.full(m, -4.0)
    complete = []
    for trial in study.trials:
        if trial.state == TrialState.COMPLETE:
            complete.append(trial.values)
    volume = hypervolume(complete, reference)
    corner_volume = hypervolume([scores(_CORNER, m)], reference)
    assert volume > corner_volume, (
        "expected a hypervolume above that of a corner of the space, "
        f"{corner_volume:.3f}, got {volume:.3f}"
    )
