"""A study of two levels, from its file to the written pick.

Merges in place, then routes through the models and the best merges.
"""

import pytest
from transformers import AutoModelForCausalLM

from paretomerge.decide.pick import Choice, write_pick
from paretomerge.errors import ConfigError, StudyError
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.record.trial import Trial
from paretomerge.report.html import write_report
from paretomerge.report.tables import rows
from paretomerge.study.checkpoint_scores import score_checkpoint
from paretomerge.study.second_level import SecondLevelPlan
from tests.studies import open_search
from tests.study.test_build import write

SCORE = """
import torch
def score(model, tokenizer):
    tokens = torch.arange(12).reshape(2, 6) + 3
    with torch.no_grad():
        return model(tokens).logits.float().std().item()
"""
FIRST, SECOND = 9, 7


def told(tmp_path, pico, then, **more):
    (tmp_path / "spread_of_logits.py").write_text(SCORE)
    objectives = [{"function": "spread_of_logits:score"}, {"size": "layers"}]
    space = {"methods": ["task_arithmetic", "dare_ties"]}
    settings = {
        "objectives": objectives,
        "space": space,
        "trials": FIRST,
        "then": then,
        "sampler": "evolver",
        "dtype": "float32",
    }
    return write(tmp_path, pico, **settings | more)


def opened(tmp_path, pico, then=None, **more):
    return open_search(
        told(
            tmp_path,
            pico,
            {"routes": {"blocks": 4}, "trials": SECOND, "front": 2} | (then or {}),
            **more,
        )
    )


@pytest.fixture
def finished(tmp_path, pico):
    study = opened(tmp_path, pico)
    study.run()
    return study


def test_from_the_file_to_the_pick(finished, tmp_path):
    trials = finished.trials()
    assert not [t.failure for t in trials if t.failure]
    assert [t.level for t in trials] == [0] * FIRST + [1] * SECOND and [
        t.number for t in trials
    ] == list(range(FIRST + SECOND))
    assert list(finished.second_level.space.sources) == ["ada", "bob", *finished.pool]
    assert len({finished.recipe(t).key for t in trials}) == len(
        {t.number for t in trials if t.same_as is None}
    )
    through = [
        t
        for t in trials
        if t.level
        and any(step.name in finished.pool for step in finished.recipe(t).steps)
    ]
    assert through, "no route goes through a merge of the first level"
    trial = through[0]
    write_pick(
        finished.results(), trial, tmp_path / "picked", Choice(trial=trial.number).text
    )
    assert (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "picked"
        ).config.num_hidden_layers
        == trial.scores["layers"].value
    )
    again = score_checkpoint(finished, str(tmp_path / "picked"), "search")
    assert {name: s.value for name, s in again.items()} == {
        name: s.value for name, s in trial.scores.items()
    }


def test_one_front_and_one_report_for_both(finished, tmp_path):
    front = finished.front()
    finished.hold_out(front)
    assert {t.level for t in front} <= {0, 1} and all(
        t.held_out for t in finished.front()
    )
    page = write_report(finished.results(), tmp_path / "report.html").read_text()
    assert (
        "Quality against layers" in page
        and "merged in place" in page
        and ">route<" in page
    )
    assert rows(finished.trials())[-1]["params"].keys() >= {"lead", "follow"}


def test_where_size_matters_the_pool_is_tried_with_fewer_layers(
    finished, tmp_path, pico
):
    shorter = {
        t.label: t for t in finished.trials() if t.label.endswith("middle left out")
    }
    assert list(shorter) == [f"{name}, middle left out" for name in finished.pool]
    assert {t.scores["layers"].value for t in shorter.values()} == {3}
    (tmp_path / "plain").mkdir()
    study = opened(
        tmp_path / "plain", pico, objectives=[{"function": "spread_of_logits:score"}]
    )
    study.run()
    assert not [t for t in study.trials() if t.label.endswith("middle left out")]


def test_what_is_known_is_not_scored_again(finished):
    """Sources and the pool's members are starts of the second level, and have scores from the
    first.
    """
    alone = {finished.recipe(t).key for t in finished.trials() if t.level}
    starts = finished.second_level.space.baselines()
    assert not [
        name
        for name in finished.second_level.space.sources
        if finished.second_level.recipe(starts[name]).key in alone
    ]


@pytest.mark.parametrize("stop", [4, FIRST, FIRST + 2])
def test_a_study_that_was_interrupted_goes_on_as_it_was(finished, tmp_path, pico, stop):
    (tmp_path / "again").mkdir()
    study = opened(tmp_path / "again", pico)
    study.run(stop)
    study = opened(tmp_path / "again", pico)
    study.run()
    assert [t.params for t in study.trials()] == [t.params for t in finished.trials()]
    assert [t.scores for t in study.trials()] == [t.scores for t in finished.trials()]


def test_levels_share_the_sources_in_memory(finished):
    assert isinstance(finished.first_level.model, ResidentModel)
    for name in finished.space.sources.values():
        assert (
            finished.second_level.model.checkpoints[name]
            is finished.first_level.model.checkpoints[name]
        )


def test_a_preference_picks_the_one_merge(tmp_path, pico):
    study = opened(tmp_path, pico, {"front": None, "prefer": {"score": 1.0}})
    study.run()
    best = max(
        (t for t in study.trials() if not t.level),
        key=lambda t: t.scores["score"].value,
    )
    assert list(study.pool) == [f"trial-{best.number}"]


def test_the_first_level_alone_has_no_pool(tmp_path, pico):
    study = opened(tmp_path, pico)
    study.run(FIRST)
    with pytest.raises(StudyError, match="second level has not begun"):
        _ = study.pool
    assert len(study.front()) >= 1


def test_another_study_begins_with_the_first_level_of_this_one(
    finished, tmp_path, pico
):
    (tmp_path / "next").mkdir()
    study = open_search(
        told(tmp_path / "next", pico, None, warm_start=["../study.yaml"])
    )
    assert len(study.warm_start.scored) == FIRST


@pytest.mark.parametrize(
    ("then", "more", "message"),
    [
        ({"front": 2, "prefer": {"score": 1}}, {}, "one of `front` and `prefer`"),
        (
            {"front": None, "prefer": {"scor": 1}},
            {},
            "then.prefer: .*did you mean 'score'",
        ),
        ({"front": None, "prefer": {"score": 0}}, {}, "one of them above 0"),
        ({"routes": {"blocks": 9}}, {}, "then.routes.blocks: expected 1 to 4"),
        ({"sampler": "polcy"}, {}, "did you mean 'policy'"),
        ({"fronts": 2}, {}, "did you mean 'front'"),
        ({}, {"space": {"routes": {}}}, "the first level must merge weights"),
        (
            {},
            {
                "objectives": [
                    {"function": "spread_of_logits:score"},
                    {"sparsity": True},
                ]
            },
            "routes have no sparsity, which 'sparsity' asks for",
        ),
    ],
)
def test_what_cannot_be_is_told_before_the_search(tmp_path, pico, then, more, message):
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, pico, then, **more)


def test_a_rule_that_only_the_second_sampler_cannot_follow_is_told_before_the_search(
    tmp_path, pico
):
    study = opened(
        tmp_path, pico, {"sampler": "nsga2"}, sampler="mmmo", budget={"until": "1%"}
    )
    with pytest.raises(ConfigError, match=r"budget.until: NSGAIISampler"):
        study.run()
    assert not study.trials()


def test_sources_that_could_not_be_scored_do_not_stop_it(tmp_path, pico):
    path = told(
        tmp_path,
        pico,
        {"routes": {"blocks": 2}, "trials": 2, "front": 2},
        sampler="qmc",
        trials=6,
    )
    (tmp_path / "spread_of_logits.py").write_text(
        SCORE.replace("import torch", "import torch\ncalls = []").replace(
            "    tokens",
            "    calls.append(1)\n    if len(calls) <= 2:\n        raise RuntimeError('away')\n  "
            "  tokens",
            1,
        )
    )
    study = open_search(path)
    study.run()
    assert (
        all(t.failure for t in study.trials()[:2])
        and [t.level for t in study.trials() if not t.failure][-1] == 1
    )


def test_what_routes_cannot_do_is_noted_before_the_search(tmp_path, pico, monkeypatch):
    monkeypatch.setattr("paretomerge.checkpoint.fold.FOLDS", {})
    study = opened(tmp_path, pico)
    assert "scales of the residual stream are left out: llama" in study.then.notes[0]


def test_the_pool_is_of_the_front_without_the_sources():
    objectives = [Objective("a"), Objective("b")]
    points = {
        "ada": (1.0, 0.0),
        "": (0.8, 0.7),
        "soup": (0.5, 0.9),
        "worse": (0.4, 0.4),
    }
    trials = [
        Trial(n, {}, {"a": Score(a), "b": Score(b)}, label)
        for n, (label, (a, b)) in enumerate(points.items())
    ]

    def pool(reference=(-0.1, -0.1), **settings):
        then = SecondLevelPlan(9, lambda recipes: None, lambda space: None, **settings)
        return then.choose_pool(trials, objectives, reference, {"ada", "bob"})

    assert pool() == [1, 2] and pool(front=1) == [
        1
    ]  # neither a source nor what another dominates
    assert pool(None) == [1, 2]  # no source could be scored
    assert pool(prefer=(0.1, 0.9)) == [2] and pool(prefer=(1.0, 0.0)) == []
    assert (
        SecondLevelPlan(9, lambda recipes: None, lambda space: None).choose_pool(
            [], objectives, (), ()
        )
        == []
    )
