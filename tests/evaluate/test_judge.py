import json

import pytest

from paretomerge.errors import ConfigError, EvaluationError
from paretomerge.evaluate.judge import JudgeEvaluator
from paretomerge.record.trial import Trial
from tests.evaluate.test_evaluate import live
from tests.openai_server import says, serve
from tests.studies import open_search
from tests.study.test_build import write


def prompts(path, n=8, **more):
    path.write_text(
        "".join(
            json.dumps({"prompt": "abcdefgh"[i % 8] * (1 + i // 8) + "=", **more})
            + "\n"
            for i in range(n)
        )
    )
    return path


def test_answers_are_graded_once_and_the_halves_are_apart(tmp_path, pico):
    with serve(says('{"thought": "{short}"} so: {"score": 7}')) as server:
        judge = JudgeEvaluator(
            "good",
            prompts(tmp_path / "p.jsonl", reference="ref"),
            "short and right",
            server.url,
            "any",
            6,
        )
        model = live(pico / "ada")
        score = judge.evaluate(model, "search")["good"]
        assert (score.value, score.n, score.stderr) == (0.7, 4, 0.0)
        asked = [request["messages"] for request in server.requests]
        assert len(asked) == 4 and all(
            "short and right" in messages[0]["content"] for messages in asked
        )
        assert {messages[1]["content"].split("\n")[1] for messages in asked} == {
            "a=",
            "c=",
            "e=",
            "g=",
        }
        assert all(
            "<reference>\nref" in messages[1]["content"]
            and "<answer>" in messages[1]["content"]
            for messages in asked
        )
        judge.evaluate(model, "search")
        assert len(server.requests) == 4
        judge.evaluate(model, "held_out")
        assert len(server.requests) == 8


@pytest.mark.parametrize(
    "reply",
    [
        "good!",
        '{"score": 11}',
        '{"score": "7"}',
        '{"score": true}',
        "[7]",
        '{"points": 7}',
    ],
)
def test_a_judge_that_says_something_else_fails_the_trial(tmp_path, pico, reply):
    with (
        serve(says(reply)) as server,
        pytest.raises(EvaluationError, match="0 to 10} from the judge, got"),
    ):
        JudgeEvaluator(
            "good", prompts(tmp_path / "p.jsonl"), "c", server.url, "any", 3
        ).evaluate(live(pico / "ada"), "search")


def test_a_judge_that_is_away_fails_the_trial(tmp_path, pico):
    judge = JudgeEvaluator(
        "good", prompts(tmp_path / "p.jsonl"), "c", "http://127.0.0.1:9", "any", 3
    )
    with pytest.raises(
        EvaluationError, match=r"Cannot reach the judge at http://127\.0\.0\.1:9: "
    ):
        judge.evaluate(live(pico / "ada"), "search")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "expected a file of JSON lines"),
        ("{", "expected a file of JSON lines"),
        ('{"prompt": 1}\n' * 4, "a text as `prompt`"),
        ('{"prompt": "a"}\n' * 4, "four different prompts or more, got 1"),
    ],
)
def test_prompts_that_cannot_be_used_are_told(tmp_path, content, told):
    if content:
        (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=told):
        JudgeEvaluator("good", tmp_path / "p.jsonl", "c")


def test_a_study_may_have_a_judge_and_needs_it_only_to_score(
    tmp_path, pico, monkeypatch
):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL", "PARETOMERGE_LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    prompts(tmp_path / "p.jsonl")
    path = write(
        tmp_path,
        pico,
        objectives=[
            {"judge": {"prompts": "p.jsonl", "criteria": "c", "max_tokens": 3}},
            {"function": "mine:score"},
        ],
    )
    study = open_search(path)
    assert [o.name for o in study.goals.objectives] == [
        "judge",
        "score",
    ] and study.goals.objectives[0].maximise
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL"):
        study.goals.objectives and study.goals.evaluator.evaluate(
            study.load(Trial(0, next(iter(study.space.baselines().values())))),
            "search",
        )
    with serve(says('{"score": 4}')) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_MODEL", "any")
        again = open_search(path)
        again.run(3)
        assert again.trials()[2].scores["judge"].value == pytest.approx(0.4)
    prompts(tmp_path / "p.jsonl", 10)
    with pytest.raises(Exception, match="files of scores changed"):
        open_search(path)
