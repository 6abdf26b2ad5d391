"""The internals of transformers that `live/names.py` uses: these tests fail when they change."""

import pytest
import torch

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError
from paretomerge.merging.live.names import names_in_model
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


def test_the_internals_have_their_interface():
    import inspect

    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    assert (
        next(iter(inspect.signature(get_model_conversion_mapping).parameters))
        == "model"
    )
    assert isinstance(WeightRenaming, type)
    renamed, _ = rename_source_key("old.weight", [WeightRenaming("old", "new")], [])
    assert renamed == "new.weight"


def test_a_tensor_without_a_place_is_an_error():
    with pytest.raises(CheckpointError, match="no tensor of its own for 'elsewhere'"):
        names_in_model(ARCHITECTURES["llama"](), ["elsewhere"])
