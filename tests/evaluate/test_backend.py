import pytest
from transformers import AutoModelForCausalLM

from paretomerge.errors import ConfigError, EvaluationError
from paretomerge.evaluate import checkpoint_folder as module
from paretomerge.evaluate.backend import Backend
from tests.evaluate.test_evaluate import harness, live
from tests.studies import open_search
from tests.study.test_build import write


def test_a_merge_on_disk_scores_as_the_live_one(specialists, tmp_path, monkeypatch):
    """By the harness's own `hf`, which loads what was written: the way that vllm goes too."""
    monkeypatch.setattr(module, "_SHARED_MEMORY", tmp_path)
    model = live(specialists / "models" / "scribe")
    backend = Backend("hf", {"device": "cpu", "dtype": "bfloat16"})
    elsewhere = harness(
        specialists, "reverse", "translate", backend=backend, search_items=20
    ).evaluate(model, "search")
    here = harness(specialists, "reverse", "translate", search_items=20).evaluate(
        model, "search"
    )
    assert {name: score.example_scores for name, score in elsewhere.items()} == {
        name: score.example_scores for name, score in here.items()
    }
    assert not list(tmp_path.iterdir())


def test_layers_that_a_route_repeats_are_written_each(specialists, pico):
    model = AutoModelForCausalLM.from_pretrained(pico / "ada")
    model.model.layers[1] = model.model.layers[0]
    shared = live(pico / "ada")
    with Backend("hf", {"device": "cpu"}).load(
        type(shared)(model, shared.tokenizer, {}), 4
    ) as written:
        assert len(written.model.model.layers) == len(model.model.layers)
        one, other = (written.model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
        assert one.data_ptr() != other.data_ptr() and (one == other).all()


def test_models_that_the_harness_does_not_know_are_told(specialists):
    with pytest.raises(EvaluationError, match=r"evaluate\.backend: .*hff"):
        harness(specialists, "reverse", backend=Backend("hff")).evaluate(
            live(specialists / "models" / "scribe"), "search"
        )


def test_study_yaml_names_it(tmp_path, pico):
    with pytest.raises(ConfigError, match="name a model of lm-evaluation-harness"):
        open_search(write(tmp_path, pico, evaluate={"backend": {"dtype": "auto"}}))
