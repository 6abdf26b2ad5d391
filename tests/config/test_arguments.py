"""Wrong arguments of `Budget`, `Evaluation`, `SecondLevel` and `StudyConfig`."""

import pytest

import paretomerge as pm

CONTENT = {"base": "b", "models": ["a", "c"], "objectives": [{"sparsity": True}]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": "6"}, "^trials: expected a whole number, got '6'"),
        ({"trials": 6.5}, "^trials: expected a whole number, got 6.5"),
        ({"until": "1%"}, r"^budget\.until: expected a share such as 0\.01, got '1%'"),
        ({"until": True}, r"^budget\.until: expected a finite number"),
        ({"until": float("nan")}, r"^budget\.until: expected a finite number"),
        ({"patience": 1.5}, r"^budget\.patience: expected a whole number"),
        ({"patience": 0}, r"^budget\.patience: must be 1 or more, not 0"),
    ],
)
def test_a_budget(arguments, message):
    with pytest.raises(pm.ConfigError, match=message):
        pm.Budget(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include_path": 3}, r"^evaluate\.include_path: expected a path"),
        ({"cache": ""}, r"^evaluate\.cache: expected a path"),
        ({"splits": ["search", "held_out"]}, r"^evaluate\.splits: .*\['search', 'h"),
        ({"splits": {"search": 1, "held_out": "b"}}, r"^evaluate\.splits\.search: "),
        ({"splits": {1: "a", 2: "b"}}, r"^evaluate\.splits: .*got the key 1"),
        (
            {"backend": 3},
            r"^evaluate\.backend: expected 'vllm', the name of another model",
        ),
        ({"backend": {"nam": "vllm"}}, r"^evaluate\.backend: .*'name': 'vllm'"),
        ({"race": "95%"}, r"^evaluate\.race: expected a confidence such as 0\.95"),
        ({"race": True}, r"^evaluate\.race: expected a finite number"),
        ({"batch_size": "8"}, r"^evaluate\.batch_size: expected a whole number"),
        ({"batch_size": None}, r"^evaluate\.batch_size: expected a whole number"),
        ({"search_items": 2.5}, r"^evaluate\.search_items: expected a whole number"),
        ({"time_limit": float("nan")}, r"^evaluate\.time_limit: expected a finite"),
    ],
)
def test_an_evaluation(arguments, message):
    with pytest.raises(pm.ConfigError, match=message):
        pm.Evaluation(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routes": {"blocks": 4}}, r"^then\.routes: expected RouteSpace\("),
        ({"routes": pm.RouteSpace}, r"^then\.routes: .*class RouteSpace; write Route"),
        ({"trials": "20"}, r"^then\.trials: expected a whole number"),
        ({"front": 2.5}, r"^then\.front: expected a whole number"),
        ({"prefer": ["gsm8k"]}, r"^then\.prefer: expected \{'gsm8k': 0\.7\}"),
        ({"prefer": {"a": "0.7"}}, r"^then\.prefer\.a: expected a finite number"),
        ({"sampler": "nsga"}, r"^then\.sampler: unknown name 'nsga'"),
    ],
)
def test_a_second_level(arguments, message):
    with pytest.raises(pm.ConfigError, match=message):
        pm.SecondLevel(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": ["a"]}, "unknown key 'modles'; did you mean 'models'"),
        ({"trials": "x"}, "trials: expected an integer"),
        ({"out": ""}, "^StudyConfig: out: "),
        ({"objectives": [{"sparsity": 3}]}, "objectives.0.sparsity"),
    ],
)
def test_the_content_of_a_file(changes, message):
    with pytest.raises(pm.ConfigError, match=message):
        pm.StudyConfig(**{**CONTENT, **changes})


def test_every_problem_of_a_content_is_told():
    with pytest.raises(pm.ConfigError, match=r"base: required.*seed: expected an int"):
        pm.StudyConfig(models=["a", "c"], objectives=[{"sparsity": True}], seed="x")
