"""Pico models of every family whose names or layout transformers changes while it loads them.

The config of a family has its defaults, except for sizes, which are the small ones below wherever
the family has them.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_SIZES = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size": 16,
    "hidden_size_per_layer_input": 4,
    "d_model": 16,
    "embed_dim": 16,
    "out_hidden_size": 16,
    "projection_dim": 16,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "d_ff": 24,
    "ffn_hidden_size": 24,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "num_layers": 2,
    "depth": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_heads": 2,
    "n_head": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "max_source_positions": 16,
    "num_mel_bins": 8,
    "image_size": 8,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "mm_tokens_per_image": 4,
    "mlp_ratio": 2,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "expert_ffn_hidden_size": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "qk_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "state_size": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 8,
    "text_hidden_size": 16,
    "projector_hidden_size": 16,
    "projection_hidden_dim": 16,
    "dense_intermediate_size": 24,
    "shared_intermediate_size": 8,
    "hidden_dim": 16,
    "dim_head": 8,
    "output_dim": 16,
    "downsample_hidden_size": 8,
    "mlp_dim": 24,
    "max_img_size": 16,
    "num_position_embeddings": 16,
    "num_patches": 16,
    "max_pos_emb": 16,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 45,
    "image_token_index": 45,
    "video_token_id": 46,
    "audio_token_id": 47,
    "audio_token_index": 47,
    "vision_start_token_id": 43,
    "vision_end_token_id": 44,
}
# They follow from the sizes.
_DERIVED = (
    "layer_types",
    "mlp_layer_types",
    "indexer_types",
    "rope_parameters",
    "rope_scaling",
    "quantization_config",
)

# Settings that a family needs besides.
_LFM2_LAYERS = ["conv", "full_attention", "conv"]
_DENSE_AND_SPARSE = ["dense", "sparse", "sparse"]
_NECK = {"output_channels": 8, "downsample_channels": [8, 16], "mlp_dim": 24}
_SETTINGS: dict[str, dict[str, Any]] = {
    "cosmos3_edge": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
        }
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": _DENSE_AND_SPARSE},
        "vision_config": {"sam_config": _NECK},
    },
    "dots1": {
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "emu3": {
        "vq_config": {"base_channels": 32},
        "vocabulary_map": {"<|extra_200|>": 3, "<image>": 4},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "mlp_layer_types": _DENSE_AND_SPARSE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        }
    },
    "gemma3n_text": {"intermediate_size": 24},
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 2,
            "index_topk": 16,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
        },
    },
    "got_ocr2": {"vision_config": _NECK},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {
        "text_config": {"head_dim": 8},
        "vision_config": {"max_vit_seq_len": 16, "max_image_size": 16},
    },
    "lfm2_moe": {"layer_types": _LFM2_LAYERS, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 2]}},
    "unlimited_ocr": {"vision_config": {"sam_config": _NECK}},
}


def build_pico(
    model_type: str, settings: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Build a small random model of a family, in float32."""
    kind = transformers.CONFIG_MAPPING[model_type]
    values = _small(kind().to_dict())
    _update(values, settings or _SETTINGS.get(model_type, {}))
    config = kind(**values)
    torch.manual_seed(0)
    model = model_class(model_type)(config).float().eval()
    # Biases and norms are all 0 or 1 at first.
    return moved(model, seed=5)


def model_class(model_type: str) -> Any:
    """The class that generates text, or else the plain one."""
    config = transformers.CONFIG_MAPPING[model_type]
    for auto in (
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForCausalLM,
        transformers.AutoModel,
    ):
        if config in auto._model_mapping:
            found = auto._model_mapping[config]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise KeyError(model_type)


def moved(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """The model after a small random step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def _small(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Small values for the sizes of a config and of its parts."""
    values: dict[str, Any] = {}
    for key, default in defaults.items():
        if key in _DERIVED:
            continue
        if isinstance(default, dict) and key.endswith("_config"):
            values[key] = _small(default)
        elif key == "model_type" and default:
            values[key] = default
        elif key in _SIZES and default is not None:
            values[key] = _like(default, _SIZES[key])
    return values


def _like(default: object, value: int) -> object:
    """A size as a family states it."""
    if isinstance(default, (list, tuple)):
        return [value] * len(default)
    return float(value) if isinstance(default, float) else value


def _update(values: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _update(values[key], value)
        else:
            values[key] = value
