"""Budget, constraints, starts: as a study.yaml says them."""

import pytest

from paretomerge.config.settings import Budget
from paretomerge.errors import ConfigError, ParetoMergeError
from paretomerge.evaluate.measures import Constraint, Function, Sparsity
from paretomerge.study.study import load_study
from tests.studies import open_search
from tests.study.test_build import write


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({}, Budget(60)),
        ({"trials": 9}, Budget(9)),
        ({"budget": {"trials": 9}}, Budget(9)),
        ({"trials": 9, "budget": {"until": "1%"}}, Budget(9, 0.01)),
        (
            {"budget": {"trials": 9, "until": " 0.5 % ", "patience": 2}},
            Budget(9, 0.005, 2),
        ),
    ],
)
def test_budgets(tmp_path, pico, changes, budget):
    settings = load_study(write(tmp_path, pico, **changes)).settings
    assert settings.budget == budget and settings.total_trials == budget.trials


def test_a_constraint_on_an_objective_is_scored_once_and_others_are_added(
    tmp_path, pico
):
    constraints = [
        {"function": "mine:score", "at_least": 0.5},
        {"sparsity": True, "at_least": -1},
        {"sparsity": True, "at_most": 0},
    ]
    study = open_search(write(tmp_path, pico, constraints=constraints))
    assert study.goals.constraints == (
        Constraint(Function("mine:score"), at_least=0.5),
        Constraint(Sparsity(), at_least=-1.0),
        Constraint(Sparsity(), at_most=0.0),
    )
    assert study.goals.score_names == ("score", "other", "sparsity")
    assert [o.name for o in study.goals.objectives] == ["score", "other"]
    study.run(1)
    assert (
        set(study.trials()[0].scores) == {"score", "other", "sparsity"}
        and study.trials()[0].feasible
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trials": 9, "budget": {"trials": 9}}, "keep one of them"),
        ({"budget": {"trials": 0}}, "trials"),
        ({"budget": {"until": 1}}, "such as 1%"),
        ({"budget": {"until": "0%"}}, "such as 1%"),
        ({"budget": {"until": "200 %"}}, "such as 1%"),
        ({"budget": {"until": "1%", "patience": 0}}, "patience"),
        ({"budget": {"untl": "1%"}}, "did you mean 'until'"),
        ({"budget": 9}, "budget"),
        (
            {"constraints": [{"function": "mine:score"}]},
            "one of `at_least` and `at_most`",
        ),
        (
            {"constraints": [{"function": "mine:score", "at_least": 1, "at_most": 2}]},
            "one of `at_least` and `at_most`",
        ),
        (
            {"constraints": [{"function": "mine:score", "at_least": float("nan")}]},
            "finite",
        ),
        ({"constraints": [{"at_least": 1}]}, "set exactly one of `task`"),
        (
            {"constraints": [{"function": "mine:score", "at_leats": 1}]},
            "did you mean 'at_least'",
        ),
        (
            {
                "constraints": [
                    {"function": "mine:score", "at_least": 1, "direction": "minimize"}
                ]
            },
            "direction",
        ),
        (
            {
                "constraints": [
                    {"function": "mine:score", "name": "other", "at_least": 1}
                ]
            },
            "'other' is the name of two scores",
        ),
        ({"constraints": [{"function": "mine:scor", "at_least": 1}]}, "scor"),
        ({"starts": [1]}, "starts"),
        ({"warm_strat": "x"}, "did you mean 'warm_start'"),
    ],
)
def test_bad_values_say_what_is_wrong(tmp_path, pico, changes, told):
    with pytest.raises(ParetoMergeError, match=told):
        open_search(write(tmp_path, pico, **changes))


def test_what_may_change_while_a_study_goes_on(tmp_path, pico):
    open_search(write(tmp_path, pico)).run(1)
    more = {
        "budget": {"trials": 70, "until": "1%"},
        "starts": ["r.yml"],
        "warm_start": "runs/other",
    }
    path = write(tmp_path, pico, **more)
    settings = load_study(path).settings
    assert settings.starts == ("r.yml",) and settings.warm_start == ("runs/other",)
    study = open_search(path)  # both are read when a search begins, not before
    with pytest.raises(ConfigError, match=r"r\.yml"):
        study.run(1)
    with pytest.raises(ParetoMergeError, match="constraints changed since"):
        open_search(
            write(tmp_path, pico, constraints=[{"sparsity": True, "at_least": -1}])
        )
