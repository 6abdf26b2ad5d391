import json
import logging
import re
import threading
import time

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import CmaEsSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from paretomerge.endpoint import BASE_URL_VARIABLE, KEY_VARIABLE, MODEL_VARIABLES
from paretomerge.errors import ConfigError
from paretomerge.search.baselines.llm import PROPOSER, LLMSampler
from paretomerge.search.baselines.llm_prompt import format_trial_log
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.search.observations import Observations
from tests.openai_server import (
    SOON,
    hangs_up,
    is_slow,
    never_ends,
    refuses_response_format,
    replies,
    says,
    serve,
)
from tests.search.baselines.test_llm_answers import CONDITIONS, GOOD, SPACE

SECRET = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (BASE_URL_VARIABLE, *MODEL_VARIABLES, KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")


def sampler_of(server, inner=None, **options) -> LLMSampler:
    defaults = {
        "space": SPACE,
        "conditions": CONDITIONS,
        "share": 1.0,
        "model": "any",
        "key": SECRET,
        "timeout": 60,
    }
    return LLMSampler(
        inner or RandomSampler(seed=0), base_url=server.url, **defaults | options
    )


def run(sampler, n: int, space=SPACE) -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    return more(study, n, space)


def more(study, n: int, space=SPACE) -> optuna.Study:
    for _ in range(n):
        trial = study.ask(space)
        study.tell(
            trial,
            [trial.params["weight/ada"], trial.params["step"] + trial.params["rank"]],
        )
    return study


def proposers(study) -> list[str]:
    return [t.system_attrs[PROPOSER] for t in study.trials]


def new_points():
    """A model that answers with another good point each time."""
    numbers = iter(range(1, 10_000))
    return lambda request: json.dumps(GOOD | {"weight/ada": 0.01 * next(numbers)})


def test_the_models_points_are_evaluated():
    with serve(says(new_points())) as server:
        study = run(sampler_of(server), 3)
    assert proposers(study) == ["llm"] * 3
    assert [t.params for t in study.trials] == [
        GOOD | {"weight/ada": 0.01 * i} for i in (1, 2, 3)
    ]


def test_the_model_is_told_the_space_the_directions_and_the_log():
    with serve(says(new_points())) as server:
        run(sampler_of(server), 2)
        system, user = (m["content"] for m in server.requests[1]["messages"])
    assert "merging" in system and "JSON" in system
    assert '"weight/ada": a number from 0 to 1.5\n' in user
    assert (
        '"density/ada": a number from 0.1 to 1; counts only where "method" is one of ["sparse"]'
        in user
    )
    assert '"rank": a whole number from 1 to 64 (think in logarithms)' in user
    assert '"step": a number from 0 to 1 in steps of 0.25' in user
    assert '"flag": one of [true, false, null, 1.5]' in user
    heading, line = user.splitlines()[-2:]
    assert heading.split("\t") == [
        "trial",
        "objective 1 (maximize)",
        "objective 2 (minimize)",
        *SPACE,
    ]
    assert line.split("\t") == [
        "0",
        "0.01",
        "8.75",
        '"sparse"',
        "0.01",
        "0.2",
        "8",
        "0.75",
        "true",
    ]


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "```json\n{}\n```",
        "Sure! Since trial 3 was good, {{a bit more}} of it:\n\n{}\n\nGood luck with {{it}}.",
        '<think>Perhaps {{"weight/ada": 9}}? No.</think>{}',
        "[{}]",
        "\ufeff \n{}",
    ],
)
def test_json_is_found_in_prose(wrap):
    with serve(says(wrap.format(json.dumps(GOOD)))) as server:
        assert run(sampler_of(server), 1).trials[0].params == GOOD
        assert len(server.requests) == 1


WRONG = {
    "unknown key": (GOOD | {"weight/eve": 1}, "'weight/eve' is not a parameter"),
    "missing": (
        {k: v for k, v in GOOD.items() if k != "rank"},
        '"rank": expected a whole number from 1 to 64.*; it is missing',
    ),
    "above": (
        GOOD | {"weight/ada": 1.5000001},
        "a number from 0 to 1.5; got 1.5000001",
    ),
    "below": (GOOD | {"density/ada": 0.0999}, "got 0.0999"),
    "NaN": (GOOD | {"weight/ada": float("nan")}, "got nan"),
    "infinite": (GOOD | {"weight/ada": float("inf")}, "got inf"),
    "huge": (GOOD | {"weight/ada": 10**400}, r"got 1000+\.\.\.0+"),
    "a string": (GOOD | {"weight/ada": "0.5"}, "got '0.5'"),
    "a truth": (GOOD | {"weight/ada": True}, "got True"),
    "a list": (GOOD | {"weight/ada": [0.5]}, r"got \[0.5\]"),
    "null": (GOOD | {"weight/ada": None}, "got None"),
    "nested": ({"parameters": GOOD}, "'parameters' is not a parameter"),
    "not whole": (GOOD | {"rank": 8.5}, "got 8.5"),
    "off the steps": (GOOD | {"step": 0.3}, "got 0.3"),
    "another choice": (GOOD | {"method": "Sparse"}, "one of .*; got 'Sparse'"),
    "a number for a truth": (GOOD | {"flag": 1}, "got 1"),
    "a list for a choice": (GOOD | {"method": ["sparse"]}, r"got \['sparse'\]"),
    "a choice for a number": (GOOD | {"flag": "true"}, "got 'true'"),
}


@pytest.mark.parametrize(("answer", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_told_once_and_may_be_mended(answer, told):
    with serve(says(json.dumps(answer)), says(json.dumps(GOOD))) as server:
        study = run(sampler_of(server), 1)
        assert study.trials[0].params == GOOD and proposers(study) == ["llm"]
        *_, mine, fault = server.requests[1]["messages"]
        assert mine["role"] == "assistant" and fault["role"] == "user"
        assert re.search(told, fault["content"])


@pytest.mark.parametrize("answer", [wrong for wrong, _ in WRONG.values()], ids=WRONG)
def test_two_wrong_answers_leave_it_to_the_inner_sampler(answer):
    with serve(says(json.dumps(answer))) as server:
        study = run(sampler_of(server), 1)
        assert len(server.requests) == 2
    assert proposers(study)[0].startswith("inner: an unusable answer, twice: ")
    assert study.trials[0].params == run(RandomSampler(seed=0), 1).trials[0].params


NO_JSON = [
    "",
    "I'd rather not.",
    "{",
    "{}",
    "[1, 2]",
    "null",
    '{"a":' * 5_000,
    "{" * 90_000,
    "{'weight/ada': 0.5}",
    "9" * 9_999,
]


@pytest.mark.parametrize("text", NO_JSON)
def test_no_json_at_all(text):
    with serve(says(text)) as server:
        study = run(sampler_of(server), 1)
        assert "no JSON object" in server.requests[1]["messages"][-1]["content"]
    assert proposers(study)[0].startswith("inner: an unusable answer")


def test_known_points_are_wrong():
    with serve(says(json.dumps(GOOD))) as server:
        study = run(sampler_of(server), 2)
        assert "known already" in server.requests[2]["messages"][-1]["content"]
    assert proposers(study)[0] == "llm" and "known already" in proposers(study)[1]


BAD_SERVERS = {
    "500": replies(500, Retry_After="0"),
    "500 for long": replies(500),
    "429": replies(429, Retry_After="0.05"),
    "429 for long": replies(429, Retry_After="3600"),
    "401 that tells the key": replies(401, f"wrong key {SECRET}".encode()),
    "slow": is_slow(2 * SOON, says(json.dumps(GOOD))),
    "closes": hangs_up(),
    "closes midway": hangs_up(
        b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": ['
    ),
    "endless": never_ends(),
    "trickles": never_ends(b"x", 0.02),
    "trickles headers": never_ends(b"x", 0.02, b"HTTP/1.0 200 OK\r\nX: "),
    "no JSON": replies(200, b"hello"),
    "HTML": replies(200, b"<!doctype html><title>Welcome</title>"),
    "no choices": replies(200, b'{"choices": []}'),
    "nothing said": says(None),
    "says the key": says(f'{{"{SECRET}": 1}}'),
    "too short a length": replies(
        200, b'{"choices": [{"message": {"content": "{}"}}]}', length=9
    ),
    "redirects": replies(307, Location="http://127.0.0.1:9/v1/chat/completions"),
    "refuses everything": replies(400),
}


@pytest.mark.parametrize("behaviour", BAD_SERVERS.values(), ids=BAD_SERVERS)
def test_the_study_goes_on_whatever_the_server_does(behaviour, caplog):
    with serve(behaviour) as server:
        start = time.monotonic()
        study = run(sampler_of(server, timeout=1), 2)
        assert time.monotonic() - start < SOON
        assert server.requests
    assert all(p.startswith("inner: ") for p in proposers(study))
    assert [t.params for t in study.trials] == [
        t.params for t in run(RandomSampler(seed=0), 2).trials
    ]
    (warning,) = [
        record for record in caplog.records if record.name.startswith("paretomerge")
    ]
    assert (
        warning.levelno == logging.WARNING
        and "RandomSampler proposes instead" in warning.getMessage()
    )
    assert SECRET not in caplog.text + str([t.system_attrs for t in study.trials])


def test_a_server_without_json_mode_is_fine():
    with serve(refuses_response_format(says(new_points()))) as server:
        assert proposers(run(sampler_of(server), 2)) == ["llm"] * 2


def test_a_dead_endpoint_is_left_alone_for_longer_and_longer():
    with serve(replies(401)) as server:
        study = run(sampler_of(server), 30)
        asked = [i for i, p in enumerate(proposers(study)) if "status 401" in p]
        assert asked == [0, 1, 2, 5, 10, 19] and len(server.requests) == len(asked)
        assert proposers(study)[3] == "inner: the model is paused until trial 5"


def test_a_rest_ends_somewhere():
    with serve(replies(401)) as server:
        study = run(sampler_of(server), 230)
        asked = [i for i, p in enumerate(proposers(study)) if "status 401" in p]
    assert max(np.diff(asked)) == 65


def test_a_success_ends_the_patience():
    flaky = [replies(401), replies(401), says(new_points())]
    with serve(*flaky, *flaky) as server:
        study = run(sampler_of(server), 7)
    assert [p == "llm" for p in proposers(study)] == [
        False,
        False,
        True,
        False,
        False,
        True,
        True,
    ]


def test_the_share_is_drawn_from_the_seed_and_the_rest_is_the_inner_samplers():
    with serve(says(new_points())) as server:
        studies = [run(sampler_of(server, share=0.3, seed=s), 60) for s in (1, 1, 2)]
    turns = [[p == "llm" for p in proposers(study)] for study in studies]
    assert turns[0] == turns[1] != turns[2]
    assert 8 <= sum(turns[0]) <= 28
    assert set(proposers(studies[0])) == {"llm", "inner: its turn"}


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
def test_shares_that_cannot_be(share):
    with pytest.raises(ConfigError, match="share"):
        LLMSampler(
            RandomSampler(), share=share, base_url="http://localhost:1/v1", model="any"
        )


def test_without_an_endpoint_it_says_how_to_set_one():
    with pytest.raises(ConfigError, match="Set OPENAI_BASE_URL"):
        LLMSampler(RandomSampler())


@pytest.mark.parametrize(
    "inner",
    [
        RandomSampler(seed=0),
        TPESampler(seed=0),
        NSGAIISampler(seed=0, population_size=4),
        MMMOSampler(seed=0, space=SPACE),
    ],
)
def test_inner_samplers_work_beside_it(inner):
    with serve(says(new_points())) as server:
        for space in (SPACE, None):
            study = run(sampler_of(server, inner, space=space, share=0.5, seed=1), 14)
            assert {"llm", "inner: its turn"} <= set(proposers(study))
            assert all(
                SPACE[n]._contains(SPACE[n].to_internal_repr(v))
                for t in study.trials
                for n, v in t.params.items()
            )


def test_an_inner_sampler_of_part_of_the_space_works_too():
    with serve(says(new_points())) as server:
        study = optuna.create_study(
            sampler=sampler_of(server, CmaEsSampler(seed=0), share=0.5, seed=1)
        )
        for _ in range(12):
            trial = study.ask(SPACE)
            study.tell(trial, trial.params["weight/ada"])
    assert {"llm", "inner: its turn"} <= set(proposers(study))


def test_nsga2_keeps_the_models_points_in_its_population():
    with serve(says(new_points())) as server:
        study = run(
            sampler_of(server, NSGAIISampler(seed=0, population_size=4), space=SPACE), 6
        )
    assert proposers(study) == ["llm"] * 6
    assert [t.system_attrs["NSGAIISampler:generation"] for t in study.trials] == [
        0,
        0,
        0,
        0,
        1,
        1,
    ]


def test_an_inferred_space_begins_with_the_inner_sampler():
    with serve(says(new_points())) as server:
        study = run(sampler_of(server, space=None), 3)
    assert proposers(study) == ["inner: no parameter is known yet", "llm", "llm"]


def test_enqueued_points_are_not_the_models_business():
    with serve(says(new_points())) as server:
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=sampler_of(server)
        )
        study.enqueue_trial(GOOD)
        study.enqueue_trial({"weight/ada": 0.25})
        more(study, 2)
        assert not server.requests
    assert (
        study.trials[0].params == GOOD and study.trials[1].params["weight/ada"] == 0.25
    )
    assert (
        PROPOSER not in study.trials[0].system_attrs
        and study.trials[1].system_attrs[PROPOSER] == "inner: some values are enqueued"
    )


def test_a_space_with_a_single_value_is_asked_without_it():
    space = {
        "weight/ada": FloatDistribution(0, 1),
        "only": CategoricalDistribution(("this",)),
        "flat": FloatDistribution(1, 1),
    }
    with serve(says('{"weight/ada": 0.5}')) as server:
        study = optuna.create_study(
            sampler=sampler_of(
                server, space=space, conditions={"weight/ada": [("only", ("this",))]}
            )
        )
        trial = study.ask(space)
        assert trial.params == {"weight/ada": 0.5, "only": "this", "flat": 1.0}
        assert "only" not in server.requests[0]["messages"][1]["content"]


def test_the_inner_samplers_hooks_are_called():
    calls = []

    class Inner(RandomSampler):
        def reseed_rng(self):
            calls.append("reseed")

        def before_trial(self, study, trial):
            calls.append("before")

        def after_trial(self, study, trial, state, values):
            calls.append("after")

    with serve(replies(401)) as server:
        sampler = sampler_of(server, Inner(seed=0))
        run(sampler, 1)
        sampler.reseed_rng()
    assert calls == ["before", "after", "reseed"]


def test_parallel_asks_do_not_trip_over_each_other():
    with serve(is_slow(0.05, says(new_points()))) as server:
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=sampler_of(server)
        )
        threads = [threading.Thread(target=more, args=(study, 3)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (
        proposers(study) == ["llm"] * 12
        and len({t.params["weight/ada"] for t in study.trials}) == 12
    )


def test_the_log_has_the_best_and_the_latest_within_its_size():
    study = optuna.create_study(directions=["maximize", "minimize"])
    space = {
        "w": FloatDistribution(0, 1),
        "u": FloatDistribution(1e-6, 1, log=True),
        "n": IntDistribution(0, 9),
    }
    for i in range(100):
        values = [1.0, 0.123456] if i == 3 else [i / 1000, 1 + i / 100]
        attributes = {"stderr": [0.0123, 0.5]} if i == 3 else {}
        params = {"w": i / 100 + 0.000123, "u": 1.23456e-5, "n": 3}
        study.add_trial(
            create_trial(
                params=params, distributions=space, values=values, user_attrs=attributes
            )
        )
    study.add_trial(
        create_trial(params=params, distributions=space, state=TrialState.FAIL)
    )
    heading, *lines = format_trial_log(study, Observations.of(study), space, 400)
    assert heading.split("\t")[1:3] == [
        "objective 1 (maximize)",
        "objective 2 (minimize)",
    ]
    assert sum(len(line) + 1 for line in lines) <= 400 and len(lines) > 5
    numbers = [int(line.split("\t")[0]) for line in lines]
    assert numbers == sorted(numbers) and {3, 99, 100} <= set(numbers)
    assert lines[numbers.index(3)] == "3\t1±0.01\t0.1235±0.5\t0.03\t1.235e-05\t3"
    assert lines[-1].split("\t")[1:3] == ["failed", "failed"]
    assert format_trial_log(study, Observations.of(study), space, 0) == [heading]


def test_infeasible_trials_are_marked_and_not_among_the_best():
    study = optuna.create_study(directions=["maximize", "maximize"])
    space = {"w": FloatDistribution(0, 1)}
    for i in range(10):
        trial = study.ask(space)
        trial.set_constraint("size", 1.0 if i == 2 else -1.0)
        study.tell(trial, [9.0, 9.0] if i == 2 else [i / 10, i / 10])
    lines = format_trial_log(study, Observations.of(study), space, 1000)
    assert lines[3].startswith("2 (infeasible)\t") and len(lines) == 11
    assert not any(
        line.startswith("2 ")
        for line in format_trial_log(study, Observations.of(study), space, 50)
    )


def test_metric_names_are_used():
    with serve(says(new_points())) as server:
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=sampler_of(server)
        )
        with pytest.warns(optuna.exceptions.ExperimentalWarning):
            study.set_metric_names(["maths", "size"])
        more(study, 1)
        assert (
            "maths (maximize)\tsize (minimize)"
            in server.requests[0]["messages"][1]["content"]
        )


def test_hundreds_of_parameters():
    space = {
        f"weight/model-{i}/3/attention": FloatDistribution(-0.5, 1.5)
        for i in range(300)
    }
    with serve(
        says(
            lambda request: json.dumps(
                {name: len(server.requests) / 9 for name in space}
            )
        )
    ) as server:
        study = optuna.create_study(sampler=sampler_of(server, space=space))
        for _ in range(3):
            study.tell(study.ask(space), 0.0)
    assert proposers(study) == ["llm"] * 3


def test_of_many_faults_some_are_told():
    space = {
        f"weight/a-model-with-quite-a-long-name-{i}": FloatDistribution(0, 1)
        for i in range(300)
    }
    with serve(says('{"x": 1}')) as server:
        study = optuna.create_study(sampler=sampler_of(server, space=space))
        study.ask(space)
        told = server.requests[1]["messages"][-1]["content"]
    assert (
        '"weight/a-model-with-quite-a-long-name-8": expected a number from 0 to 1; it is missing'
        in told
    )
    assert "and 291 more such faults" in told and len(proposers(study)[0]) < 320
