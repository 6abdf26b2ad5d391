"""A study over routes through layers, from its file to the written pick."""

import pytest
from transformers import AutoModelForCausalLM

from paretomerge.decide.pick import Choice, choose, write_pick
from paretomerge.errors import ParetoMergeError
from paretomerge.report.html import write_report
from paretomerge.study.checkpoint_scores import score_checkpoint
from tests.studies import open_search
from tests.study.test_build import write

SCORE = """
import torch
def score(model, tokenizer):
    tokens = torch.arange(12).reshape(2, 6) + 3
    with torch.no_grad():
        return model(tokens).logits.float().std().item()
"""


@pytest.fixture
def study(tmp_path, pico):
    objectives = [
        {"function": "spread_of_logits:score"},
        {"size": "layers"},
        {"size": "parameters"},
    ]
    path = write(
        tmp_path,
        pico,
        space={"routes": {"blocks": 4}},
        objectives=objectives,
        sampler="mmmo",
        dtype="float32",
    )
    (tmp_path / "spread_of_logits.py").write_text(SCORE)
    return open_search(path)


def test_from_the_file_to_the_pick(study, tmp_path):
    study.run(14)
    assert not [t.failure for t in study.trials() if t.failure]
    assert [t.label for t in study.trials()[:6]] == [
        "ada",
        "bob",
        "ada, then bob",
        "bob, then ada",
        "ada, middle twice",
        "bob, middle twice",
    ]
    assert [t.scores["layers"].value for t in study.trials()[:6]] == [4, 4, 4, 4, 5, 5]
    assert len({t.scores["layers"].value for t in study.trials()}) > 2
    front = study.front()
    study.hold_out(front)
    choice = Choice(trial=front[0].number)
    picked = choose(study.results(), choice)
    write_pick(study.results(), picked, tmp_path / "picked", choice.text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "picked")
    assert model.config.num_hidden_layers == front[0].scores["layers"].value
    again = score_checkpoint(study, str(tmp_path / "picked"), "search")
    assert {name: s.value for name, s in again.items()} == {
        name: s.value for name, s in front[0].scores.items()
    }
    write_report(study.results(), tmp_path / "report.html")
    assert "bob, then ada" in (tmp_path / "report.html").read_text()


def test_fewer_layers_are_better_unless_told(study):
    assert [(o.name, o.maximise) for o in study.goals.objectives] == [
        ("score", True),
        ("layers", False),
        ("parameters", False),
    ]


def test_a_route_has_no_sparsity(tmp_path, pico):
    study = open_search(
        write(
            tmp_path,
            pico,
            space={"routes": {}},
            objectives=[{"function": "mine:score"}, {"sparsity": True}],
        )
    )
    with pytest.raises(ParetoMergeError, match="this merge has no sparsity"):
        study.run(12)


def test_families_without_a_fold_are_searched_without_scales(
    tmp_path, pico, monkeypatch
):
    monkeypatch.setattr("paretomerge.checkpoint.fold.FOLDS", {})
    study = open_search(write(tmp_path, pico, space={"routes": {}}))
    assert not [name for name in study.space.distributions if name.startswith("scale/")]
    assert "scales of the residual stream are left out: llama" in study.space.notes[0]
