import doctest
import os
import subprocess
import sys

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import hypervolume
from paretomerge.pareto.ranking import ranked
from paretomerge.search.mmmo import candidates
from paretomerge.search.mmmo.sampler import MMMOSampler
from tests.search.test_encoding import CONDITIONS, SPACE


def two_objectives(x: float, y: float) -> tuple[float, float]:
    """Maximise; the front is y = 0.5, x in [0, 1]."""
    cost = (y - 0.5) ** 2 * 4
    return x - cost, 1 - x**2 - cost


def run(
    sampler, n: int, directions=("maximize", "maximize"), seed_points=()
) -> optuna.Study:
    study = optuna.create_study(directions=list(directions), sampler=sampler)
    signs = [1 if d == "maximize" else -1 for d in directions]
    for point in seed_points:
        study.enqueue_trial(point)
    for _ in range(n):
        trial = study.ask()
        values = two_objectives(
            trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        )
        trial.set_user_attr("stderr", [0.01, 0.01])
        study.tell(trial, [s * v for s, v in zip(signs, values, strict=True)])
    return study


def volume(study: optuna.Study) -> float:
    return hypervolume([t.values for t in study.trials], [0, 0])


def test_finds_a_front_that_random_search_does_not():
    random = np.median(
        [volume(run(optuna.samplers.RandomSampler(seed=s), 25)) for s in range(9)]
    )
    ours = volume(run(MMMOSampler(seed=0, n_startup=6, reference=[0, 0]), 18))
    assert ours > random
    assert ours > 0.61  # the whole front has 2/3


def test_minimising_is_maximising_with_the_sign_turned():
    up = run(MMMOSampler(seed=1, n_startup=5, reference=[0, 0]), 9)
    down = run(
        MMMOSampler(seed=1, n_startup=5, reference=[0, 0]), 9, ("minimize", "minimize")
    )
    assert [t.params for t in up.trials] == [t.params for t in down.trials]


def test_a_resumed_study_goes_on_as_if_never_stopped():
    whole = run(MMMOSampler(seed=3, n_startup=5), 10)
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=MMMOSampler(seed=3, n_startup=5)
    )
    study.add_trials(whole.trials[:7])
    for expected in whole.trials[7:]:
        trial = study.ask()
        params = {
            "x": trial.suggest_float("x", 0, 1),
            "y": trial.suggest_float("y", 0, 1),
        }
        assert params == expected.params
        trial.set_user_attr("stderr", [0.01, 0.01])
        study.tell(trial, expected.values)


def test_proposals_do_not_depend_on_the_hash_seed():
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.search.mmmo.test_sampler import *; "
        "print([t.params for t in run(MMMOSampler(seed=3, n_startup=5), 8).trials])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    here = run(MMMOSampler(seed=3, n_startup=5), 8)
    assert other == f"{[t.params for t in here.trials]}\n"


def test_running_trials_are_not_proposed_again():
    study = run(MMMOSampler(seed=0, n_startup=5), 8)
    asked = [
        study.ask(
            fixed_distributions={
                "x": FloatDistribution(0, 1),
                "y": FloatDistribution(0, 1),
            }
        ).params
        for _ in range(3)
    ]
    points = np.array([[p["x"], p["y"]] for p in asked])
    assert (
        np.linalg.norm(points[:, None] - points[None], axis=-1)[
            np.triu_indices(3, 1)
        ].min()
        > 1e-3
    )


def test_failures_are_stayed_away_from():
    """Beyond x = 0.5 everything fails, and would be better.

    The border is probed, what lies deeper is left alone.
    """
    space = {n: FloatDistribution(0, 1) for n in "xyabcd"}
    study = optuna.create_study(
        directions=["maximize"] * 2,
        sampler=MMMOSampler(seed=2, n_startup=8, reference=[0, 0]),
    )
    for _ in range(16):
        trial = study.ask(space)
        p = trial.params
        if p["x"] > 0.5:
            study.tell(trial, state=TrialState.FAIL)
        else:
            far = sum((p[n] - 0.4) ** 2 for n in "abcd")
            study.tell(trial, [v - far for v in two_objectives(p["x"], p["y"])])
    x = np.array([t.params["x"] for t in study.trials])
    assert (x[:8] > 0.6).sum() >= 3 and (x[8:] > 0.75).sum() == 0
    assert (x[8:] > 0.4).sum() >= 4


@pytest.mark.parametrize("way", ["set_constraint", "constraints_func"])
def test_constraints_are_kept(way):
    """x + y <= 0.8, told in either of Optuna's ways.

    The front without it lies at y = 0.5, x up to 1.
    """
    told = (
        {}
        if way == "set_constraint"
        else {"constraints_func": lambda t: [t.params["x"] + t.params["y"] - 0.8]}
    )
    study = optuna.create_study(
        directions=["maximize"] * 2,
        sampler=MMMOSampler(seed=0, n_startup=6, reference=[0, 0], **told),
    )
    for _ in range(13):
        trial = study.ask({"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)})
        x, y = trial.params["x"], trial.params["y"]
        if way == "set_constraint":
            trial.set_constraint("sum", x + y - 0.8)
        study.tell(trial, two_objectives(x, y))
    late = [t.params["x"] + t.params["y"] for t in study.trials[-6:]]
    assert sum(total <= 0.8 for total in late) >= 4
    assert max(late) > 0.7  # it goes up to the border


@pytest.mark.parametrize("m", [1, 2, 5])
def test_any_number_of_objectives(m):
    centres = np.linspace(0.2, 0.8, m)
    study = optuna.create_study(
        directions=["minimize"] * m,
        sampler=MMMOSampler(seed=0, n_startup=6, reference=[0.5] * m),
    )
    for _ in range(12):
        trial = study.ask({n: FloatDistribution(0, 1) for n in "ab"})
        a, b = trial.params["a"], trial.params["b"]
        study.tell(trial, [(a - c) ** 2 + (b - 0.5) ** 2 for c in centres])
    late = np.array([[t.params["a"], t.params["b"]] for t in study.trials[-6:]])
    assert (
        np.abs(late[:, 1] - 0.5).mean() < 0.15
        and ((late[:, 0] > 0.1) & (late[:, 0] < 0.9)).all()
    )


def test_define_by_run_spaces_show_themselves():
    """A parameter that exists only under one choice is learnt too, without being told of the
    condition.
    """
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=MMMOSampler(seed=1, n_startup=8)
    )

    def objective(trial):
        w = trial.suggest_float("w", 0, 1)
        if trial.suggest_categorical("method", ["plain", "sparse"]) == "plain":
            return w, 0.5 - w
        density = trial.suggest_float("density", 0, 1)
        return w + 1 - (density - 0.3) ** 2, 1 - w

    study.optimize(objective, n_trials=20)
    late = study.trials[-6:]
    assert sum(t.params["method"] == "sparse" for t in late) >= 4
    assert (
        np.median(
            [abs(t.params["density"] - 0.3) for t in late if "density" in t.params]
        )
        < 0.15
    )


def test_a_parameter_whose_range_changes_is_left_out_of_the_model():
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=MMMOSampler(seed=0, n_startup=3)
    )
    for i in range(8):
        trial = study.ask()
        x = trial.suggest_float("x", 0, 1)
        trial.suggest_float("wide", 0, 1 if i < 4 else 2)
        study.tell(trial, [x, 1 - x])
    assert set(study.sampler.infer_relative_search_space(study, study.ask())) == {"x"}


def test_no_point_comes_twice_until_the_space_is_used_up(caplog):
    space = {"a": CategoricalDistribution(("u", "v", "w")), "b": IntDistribution(0, 3)}
    study = optuna.create_study(
        directions=["maximize"] * 2,
        sampler=MMMOSampler(seed=0, n_startup=4, space=space),
    )
    for _ in range(12):
        trial = study.ask(space)
        study.tell(trial, ["uvw".index(trial.params["a"]), -trial.params["b"]])
    assert len({tuple(t.params.values()) for t in study.trials}) == 12
    study.ask(space)
    assert "used up" in caplog.text


def test_it_says_when_little_is_left_to_gain():
    study = optuna.create_study(
        directions=["maximize"] * 2,
        sampler=MMMOSampler(seed=0, n_startup=5, reference=[0, 0]),
    )
    gains = []
    for _ in range(16):
        trial = study.ask({"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)})
        gains.append(study.sampler.expected_gain(study))
        study.tell(trial, two_objectives(trial.params["x"], trial.params["y"]))
    assert gains[:5] == [None] * 5
    assert all(g is None or g >= 0 for g in gains) and gains[-1] < 0.02 < max(
        g for g in gains if g is not None
    )


def test_importance_shortens_length_scales():
    plain, told = (
        run(MMMOSampler(seed=0, n_startup=5, importance=importance), 8)
        for importance in (None, {"x": 3.0, "y": 0.3})
    )
    assert [t.params for t in plain.trials[:5]] == [t.params for t in told.trials[:5]]
    assert [t.params for t in plain.trials[5:]] != [t.params for t in told.trials[5:]]


def test_an_unknown_setting_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'fisher_filter'"):
        MMMOSampler(fisher_fliter=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"restarts": 0},
        {"n_startup": "x"},
        {"fisher_filter": 1},
        {"refit": -0.1},
        {"elites": True},
    ],
)
def test_a_setting_that_means_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected"):
        MMMOSampler(**wrong)


def test_an_importance_that_means_nothing_is_refused():
    with pytest.raises(ConfigError, match="positive numbers, got 0"):
        MMMOSampler(importance={"a": 0})


def test_odd_values_and_errors_do_not_stop_it():
    """An infinite value is a failure; a standard error that is no number is one that is not
    told; a seed may be negative.
    """
    study = optuna.create_study(
        directions=["maximize"], sampler=MMMOSampler(seed=-1, n_startup=3)
    )
    for i in range(9):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        trial.set_user_attr("stderr", [0.1, [0.1], [np.inf], None][i % 4])
        study.tell(trial, -np.inf if i == 4 else trial.params["x"])
    assert len(study.trials) == 9


def test_where_nothing_is_allowed_yet_what_is_allowed_is_looked_for_first():
    """The ball has less than a hundredth of the cube."""
    space = {f"x{i}": FloatDistribution(0, 1) for i in range(4)}
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=MMMOSampler(seed=0, n_startup=6)
    )
    for _ in range(14):
        trial = study.ask(space)
        x = np.array(list(trial.params.values()))
        trial.set_constraint("ball", float(np.linalg.norm(x - 0.8) - 0.2))
        study.tell(trial, [x[0], -x[0]])
    assert sum(t.constraints["ball"] <= 0 for t in study.trials) >= 2


def test_pruned_points_are_stayed_away_from():
    study = optuna.create_study(
        direction="maximize", sampler=MMMOSampler(seed=0, n_startup=5)
    )

    def objective(trial):
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        if x > 0.6:
            raise optuna.TrialPruned
        return x + y

    study.optimize(objective, n_trials=14)
    assert len({tuple(t.params.values()) for t in study.trials}) == 14
    assert sum(t.params["x"] > 0.75 for t in study.trials[8:]) <= 3
    assert study.best_value > 1.5  # it goes up to the border


def test_values_that_are_wild_do_not_stop_it():
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=MMMOSampler(seed=0, n_startup=3)
    )
    for i in range(7):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        x = trial.params["x"]
        trial.set_constraint("c", np.inf if x > 0.9 else -1.0)
        trial.set_user_attr("stderr", [0.1, None])
        study.tell(trial, [1e300 if i == 4 else x, -x])
    assert len({t.params["x"] for t in study.trials}) == 7


def test_a_standard_error_that_means_nothing_is_told_of_at_its_trial():
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=MMMOSampler(seed=0, n_startup=1)
    )
    trial = study.ask({"x": FloatDistribution(0, 1)})
    trial.set_user_attr("stderr", "abc")
    with pytest.raises(
        ConfigError,
        match="expected 2 numbers of 0 or more, one per objective, got 'abc'",
    ):
        study.tell(trial, [0.0, 0.0])
    assert study.trials[0].values == [0.0, 0.0]


def test_define_by_run_never_repeats_a_point():
    """What does not count under a choice does not make a point new."""
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=MMMOSampler(seed=0, n_startup=4)
    )
    for _ in range(14):
        trial = study.ask()
        kind = trial.suggest_categorical("kind", ["p", "q", "r"])
        w = trial.suggest_float("w", 0, 1) if kind == "q" else 0.5
        study.tell(trial, [w, {"p": 2, "q": 1, "r": 0}[kind] - w])
    late = [tuple(t.params.items()) for t in study.trials[4:]]
    assert len(set(late)) == len(late)


def test_the_published_constants():
    paper = MMMOSampler.as_published(seed=4, shortlist=5)
    assert paper.settings.shortlist == 5 and paper.settings.raw_samples == 512
    assert paper.settings.fisher_filter and paper.settings.weak_to_strong
    assert volume(run(MMMOSampler.as_published(reference=[0, 0]), 12)) > 0.4


def test_the_fisher_filter_is_a_switch():
    with_it = run(MMMOSampler(seed=0, n_startup=5, fisher_filter=True), 7)
    without = run(MMMOSampler(seed=0, n_startup=5), 7)
    assert [t.params for t in with_it.trials[:5]] == [
        t.params for t in without.trials[:5]
    ]
    assert [t.params for t in with_it.trials[5:]] != [
        t.params for t in without.trials[5:]
    ]


def test_weak_to_strong_is_a_switch(monkeypatch):
    calls, cross = [], candidates.cross
    monkeypatch.setattr(
        candidates,
        "cross",
        lambda points, *arguments: calls.append(1) or cross(points, *arguments),
    )
    run(MMMOSampler(seed=0, n_startup=5), 7)
    assert len(calls) == 0
    run(MMMOSampler(seed=0, n_startup=5, weak_to_strong=True), 7)
    assert len(calls) == 2


def test_mixed_and_conditional_spaces():
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=MMMOSampler(seed=0, space=SPACE, conditions=CONDITIONS, n_startup=6),
    )
    for _ in range(12):
        trial = study.ask(SPACE)
        p = trial.params
        bonus = p["density"] if p["method"] == "sparse" else 0.2
        study.tell(trial, [p["w"] * bonus + p["step"], p["rank"] / 64 + p["w"]])
    assert {t.params["method"] for t in study.trials} == {"plain", "sparse"}
    resting = {
        t.params["density"] for t in study.trials[6:] if t.params["method"] == "plain"
    }
    assert len(resting) <= 1


def test_a_wrong_reference_is_told():
    with pytest.raises(ConfigError, match="expected 2 numbers"):
        run(MMMOSampler(seed=0, n_startup=3, reference=[0]), 4)


def test_elites_are_front_after_front():
    y = np.array([[0.1, 0.1], [1.0, 0.0], [0.6, 0.6], [0.0, 1.0], [0.5, 0.5]])
    assert ranked(y, np.array([-0.1, -0.1]))[0] == 2
    assert set(ranked(y, np.array([-0.1, -0.1]))[:3]) == {1, 2, 3}
    assert ranked(y, np.array([-0.1, -0.1])).tolist()[3:] == [4, 0]


def test_the_example_of_the_docstring_runs():
    example = doctest.DocTestFinder(recurse=False).find(
        MMMOSampler, "MMMOSampler", globs={}
    )[0]
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0
