"""Trials in the actors of a Ray cluster; skipped where Ray is not installed."""

import os
import signal
import warnings
from pathlib import Path

import pytest

import paretomerge as pm
from paretomerge.errors import ConfigError, StudyError
from tests.study.test_workers import norm, total

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False},
        )
        cluster.add_node(num_cpus=1)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def make(pico, tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(tmp_path)

    def make(first=norm, **workers):
        if not isinstance(first, pm.Perplexity):
            first = pm.Function(first, name="norm")
        return pm.Study(
            pico / "base",
            [pico / "ada", pico / "bob"],
            [first, pm.Function(total)],
            sampler="random",
            out="runs/ray",
            workers={"ray": {"address": cluster.address, **workers}},
        )

    return make


@pytest.mark.filterwarnings("ignore")
def test_a_study_on_two_nodes(make, pico, tmp_path):
    marker = str(tmp_path / "died")

    def dies_once(model, tokenizer):
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
        return norm(model, tokenizer)

    study = make(dies_once)
    study.optimize(n_trials=7, show_progress_bar=False)
    trials = study.get_trials()
    assert len(trials) == 7 and not [trial for trial in trials if trial.failure]
    retried = [trial for trial in trials if trial.retried]
    assert len(retried) == 1 and "Ray actor died" in retried[0].retried
    assert all(trial.held_out for trial in study.front())
    alone = pm.Study(
        pico / "base",
        [pico / "ada", pico / "bob"],
        [pm.Function(norm, name="norm"), pm.Function(total)],
        sampler="random",
        out="runs/alone",
    )
    alone.optimize(n_trials=4, show_progress_bar=False, held_out=False)
    expected = {trial.label: trial.scores for trial in alone.get_trials()}
    for trial in trials:
        if trial.label in expected:
            assert trial.scores == expected[trial.label]


@pytest.mark.filterwarnings("ignore")
def test_an_actor_that_cannot_be_made_ends_the_search(make, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a b c")
    study = make(pm.Perplexity(str(corpus)))
    study.check()
    corpus.unlink()
    with pytest.raises(StudyError, match=r"an actor cannot be made: .*corpus"):
        study.optimize(n_trials=2, show_progress_bar=False)
    assert not study.get_trials()


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_without_room_is_refused_before_the_first_trial(make):
    study = make(num_gpus=1)
    with pytest.raises(
        ConfigError, match=r"an actor needs 1 GPU, and the cluster has 0"
    ):
        study.optimize(n_trials=2, show_progress_bar=False)
    assert not study.get_trials()
