"""Layers that cannot stand at another place of the network are refused."""

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from paretomerge.errors import RecipeError
from paretomerge.merging.plan.make import make_plan

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3}
BERT_SIZES = SIZES | {
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig, str]] = {
    "modernbert": (
        ModernBertForMaskedLM,
        ModernBertConfig(**BERT_SIZES),
        r"would not use .*layers\.0\.attn_norm",
    ),
    "modernbert-decoder": (
        ModernBertDecoderForCausalLM,
        ModernBertDecoderConfig(**BERT_SIZES),
        r"would not use .*layers\.0\.attn_norm",
    ),
    "rwkv": (
        RwkvForCausalLM,
        RwkvConfig(**SIZES, attention_hidden_size=16, intermediate_size=24),
        r"needs .*blocks\.0\.pre_ln",
    ),
}


def sliced(folder: Path, *ranges: tuple[int, int]) -> str:
    slices = [
        f"{{sources: [{{model: {folder}, layer_range: [{first}, {end}]}}]}}"
        for first, end in ranges
    ]
    return f"merge_method: passthrough\nslices: [{', '.join(slices)}]\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_layer_of_another_kind(family: str, tmp_path: Path) -> None:
    model_class, config, problem = FAMILIES[family]
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path)
    make_plan(sliced(tmp_path, (0, 3)))
    make_plan(sliced(tmp_path, (0, 1), (2, 3)))
    make_plan(sliced(tmp_path, (0, 3), (1, 3)))
    message = f"layer 1 of .* cannot be layer 0 of the result: transformers {problem}"
    with pytest.raises(RecipeError, match=message):
        make_plan(sliced(tmp_path, (1, 3)))
    with pytest.raises(RecipeError, match=r"layer 0 of .* cannot be layer 1"):
        make_plan(sliced(tmp_path, (0, 1), (0, 1)))


def test_equal_layers_may_stand_anywhere(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, intermediate_size=24, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert len(make_plan(sliced(tmp_path, (1, 3), (0, 2))).route) == 4
