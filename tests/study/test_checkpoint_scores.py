import pytest

from paretomerge.decide.pick import Choice, write_pick
from paretomerge.study.checkpoint_scores import score_checkpoint
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
