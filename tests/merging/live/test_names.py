"""The internals of transformers that `live/names.py` uses: these tests fail when they change."""

import pytest
import torch

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError
from paretomerge.merging.live.names import loading_layout, names_in_model
from tests.architectures import ARCHITECTURES


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
def test_every_tensor_of_a_checkpoint_is_found_with_its_values(family, tmp_path):
    from transformers import AutoModelForCausalLM

    ARCHITECTURES[family]().save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    state = model.state_dict()
    names = names_in_model(model, checkpoint.headers)
    assert names.keys() == checkpoint.headers.keys()
    for name, name_in_model in names.items():
        assert torch.equal(state[name_in_model], checkpoint.tensor(name))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_tensors_that_are_packed_are_converted_as_transformers_does_it(
    family, tmp_path
):
    from transformers import AutoModelForCausalLM

    ARCHITECTURES[family]().save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    state = model.state_dict()
    layout = loading_layout(model, checkpoint.headers)
    names = set(layout.renamed)
    for conversion in layout.conversions:
        names |= conversion.members.keys()
        tensors = {name: checkpoint.tensor(name) for name in conversion.members}
        for name, result in conversion.apply(model, tensors).items():
            assert torch.equal(state[name], result)
    assert layout.conversions and not layout.unused
    assert names == checkpoint.headers.keys()


def test_tensors_that_transformers_does_not_read_are_known():
    model = ARCHITECTURES["llama"]()
    layout = loading_layout(model, ["elsewhere", "lm_head.weight"])
    assert layout.unused == {"elsewhere"}
    assert layout.renamed == {"lm_head.weight": "lm_head.weight"}


def test_packed_tensors_have_no_place_of_their_own(tmp_path):
    model = ARCHITECTURES["mixtral"]()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"packs or permutes .*experts.0"):
        names_in_model(model, Checkpoint(str(tmp_path)).headers)
