from dataclasses import replace

import pytest

from paretomerge.decide.pick import Choice, write_pick
from paretomerge.merging.engine import merge
from paretomerge.study.checkpoint_scores import score_checkpoint
from tests.checkpoint.test_adapter import UP, adapter, alone, factors
from tests.studies import open_search
from tests.study.test_build import write


@pytest.mark.parametrize("name", ["near", "sparsity"])
def test_sparsity_of_any_name_is_searched_and_measured_again_from_disk(
    tmp_path, pico, name
):
    path = write(
        tmp_path,
        pico,
        objectives=[{"function": "mine:score"}, {"sparsity": True, "name": name}],
    )
    study = open_search(path)
    study.run(3)
    trial = study.trials()[2]
    assert not trial.failure
    out = write_pick(study.results(), trial, tmp_path / "out", Choice(trial=2).text)
    assert score_checkpoint(study, str(out), "search")[name].value == pytest.approx(
        trial.scores[name].value, abs=1e-6
    )


def test_a_model_with_an_adapter_scores_what_their_merge_scores(tmp_path, pico):
    base = pico / "base"
    lora = adapter(tmp_path / "lora", factors(UP, (32, 16)))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    path = write(tmp_path, pico, objectives=[{"perplexity": str(text)}])
    search = open_search(path)
    score = score_checkpoint(search, f"{base}+{lora}", "search")["perplexity"]
    whole = merge(replace(alone(base, lora), dtype="bfloat16"), tmp_path / "whole")
    assert score == score_checkpoint(search, str(whole), "search")["perplexity"]
    assert score != score_checkpoint(search, str(base), "search")["perplexity"]


def test_a_watched_perplexity_is_scored_on_held_out_windows_alone(tmp_path, pico):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    perplexity = {"perplexity": str(text)}
    path = write(tmp_path, pico, watch=[perplexity])
    search = open_search(path)
    model = str(pico / "base")
    assert "perplexity" not in score_checkpoint(search, model, "search")
    watched = score_checkpoint(search, model, "held_out")["perplexity"]
    (tmp_path / "b").mkdir()
    searched = open_search(write(tmp_path / "b", pico, objectives=[perplexity]))
    assert watched == score_checkpoint(searched, model, "held_out")["perplexity"]
