"""The private names of lm_eval and transformers that the package uses mean what they meant."""

import inspect
import logging
import sys
from types import SimpleNamespace

import datasets
import pytest
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from paretomerge.evaluate import _lm_eval
from paretomerge.evaluate.inference._hflm import ReplaceableHFLM
from paretomerge.evaluate.inference._transformers import (
    GENERATION_CONFIG_METADATA,
    is_stateful,
)
from tests.evaluate.test_evaluate import harness


def test_a_task_applies_the_filters_in_its_list(specialists):
    task = harness(specialists, "sort").examples("search")["sort"].task
    first, *_ = _lm_eval.filters(task).values()
    assert first is task._filters[0]
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [(0.0, True)], {}
    task.apply_filters()
    assert set(task.instances[0].filtered_resps) == {first.name}
    task._filters = []
    default = _lm_eval.filters(task)["none"]
    assert default.name == "none"
    instance = SimpleNamespace(resps=["first", "second"], filtered_resps={}, doc={})
    default.apply([instance])
    assert instance.filtered_resps == {"none": "first"}


def test_log_likelihoods_of_all_kinds_go_through_one_method(specialists):
    model = AutoModelForCausalLM.from_pretrained(specialists / "models" / "scribe")
    other = AutoModelForCausalLM.from_pretrained(specialists / "models" / "mirror")
    tokenizer = AutoTokenizer.from_pretrained(specialists / "models" / "scribe")
    received = []

    class Recording(ReplaceableHFLM):
        def token_log_likelihoods(self, requests):
            received.extend(requests)
            return [(-1.0, True)] * len(requests)

    lm = Recording(pretrained=model, tokenizer=tokenizer, batch_size=2)
    assert lm.model is model and lm.config is model.config
    lm.set_model(other)
    assert lm.model is other and lm.config is other.config
    request = SimpleNamespace(args=("ab", "c"))
    assert lm.loglikelihood([request], disable_tqdm=True) == [(-1.0, True)]
    assert received == [tuple(lm._encode_pair("ab", "c"))]
    rolling = SimpleNamespace(args=("abc",))
    assert lm.loglikelihood_rolling([rolling], disable_tqdm=True) == [-1.0]
    assert len(received) == 2


def test_the_hook_has_the_arguments_of_the_harness():
    theirs = inspect.signature(HFLM._loglikelihood_tokens).parameters
    ours = inspect.signature(ReplaceableHFLM._loglikelihood_tokens).parameters
    assert list(ours) == list(theirs)


def test_models_with_a_recurrent_state_say_so():
    assert PreTrainedModel._is_stateful is False
    assert MambaForCausalLM._is_stateful is True
    assert is_stateful(MambaForCausalLM) and not is_stateful(PreTrainedModel)


@pytest.mark.parametrize("name", GENERATION_CONFIG_METADATA)
def test_a_generation_config_has_its_origin_as_metadata(name):
    assert hasattr(GenerationConfig(), name)


def test_what_the_harness_prints_is_silenced_and_its_settings_come_back(capsys):
    logger = logging.getLogger("lm_eval")
    before = logger.level, datasets.are_progress_bars_disabled()
    with _lm_eval.quiet():
        sys.stdout.write("noise")
        assert logger.level == logging.ERROR and datasets.are_progress_bars_disabled()
    assert (logger.level, datasets.are_progress_bars_disabled()) == before
    assert capsys.readouterr().out == ""
