"""Pico models of many architectures, in milliseconds.

ARCHITECTURES builds them, `run` calls any of them.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 48
_WIDTH = 16
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": _WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_VISION = {
    "hidden_size": _WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _build(
    name: str, head: str, config: str = "", **settings: Any
) -> Callable[[], PreTrainedModel]:
    """A builder of the class `name` + `head`.

    Its config (of the class `config`, else `name`) has _DECODER's settings and these.
    """

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        plain = {} if "text_config" in settings else _DECODER
        made = getattr(transformers, f"{config or name}Config")(**{**plain, **settings})
        return getattr(transformers, name + head)(made).eval()

    return build


def _decoder(name: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    return _build(name, "ForCausalLM", **settings)


def _multimodal(
    name: str, text: dict[str, Any], vision: dict[str, Any], **settings: Any
) -> Callable[[], PreTrainedModel]:
    return _build(
        name,
        "ForConditionalGeneration",
        text_config={**_DECODER, **text},
        vision_config=vision,
        **settings,
    )


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _decoder("Llama", tie_word_embeddings=False),
    "mistral": _decoder("Mistral", tie_word_embeddings=False),
    "qwen2": _decoder(
        "Qwen2",
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen3": _decoder("Qwen3", head_dim=8),
    "gemma2": _decoder("Gemma2", head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": _build(
        "Gemma3", "ForCausalLM", "Gemma3Text", head_dim=8, sliding_window=8
    ),
    "phi3": _decoder("Phi3", num_key_value_heads=2),
    "gpt2": _build(
        "GPT2",
        "LMHeadModel",
        n_embd=_WIDTH,
        n_layer=3,
        n_head=2,
        n_positions=32,
        n_inner=24,
    ),
    "gpt_neox": _decoder("GPTNeoX", tie_word_embeddings=False),
    "olmo2": _decoder("Olmo2"),
    "mixtral": _decoder("Mixtral", num_local_experts=4),
    "qwen3_moe": _decoder(
        "Qwen3Moe", **_MOE, mlp_only_layers=[0], decoder_sparse_step=1, head_dim=8
    ),
    "gpt_oss": _decoder(
        "GptOss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
    ),
    "deepseek_v3": _decoder(
        "DeepseekV3",
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "falcon": _decoder("Falcon", new_decoder_architecture=False, multi_query=True),
    "stablelm": _decoder("StableLm"),
    "granite": _decoder("Granite"),
    "cohere": _decoder("Cohere"),
    "bloom": _decoder("Bloom", n_layer=3, n_head=2),
    "opt": _decoder("OPT", ffn_dim=24, word_embed_proj_dim=_WIDTH),
    "starcoder2": _decoder("Starcoder2"),
    "smollm3": _decoder("SmolLM3", no_rope_layers=[1, 1, 0]),
    "mamba": _decoder("Mamba", state_size=4),
    "jamba": _decoder(
        "Jamba",
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
    ),
    "bert": _build("Bert", "ForMaskedLM"),
    "roberta": _build("Roberta", "ForMaskedLM", max_position_embeddings=34),
    "distilbert": _build(
        "DistilBert", "ForMaskedLM", dim=_WIDTH, n_layers=3, n_heads=2, hidden_dim=24
    ),
    "albert": _build("Albert", "ForMaskedLM", embedding_size=8),
    "t5": _build(
        "T5",
        "ForConditionalGeneration",
        d_model=_WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=3,
        num_heads=2,
        decoder_start_token_id=0,
    ),
    "bart": _build(
        "Bart",
        "ForConditionalGeneration",
        d_model=_WIDTH,
        num_hidden_layers=2,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
    "qwen2_vl": _multimodal(
        "Qwen2VL",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            }
        },
        {
            "depth": 2,
            "embed_dim": _WIDTH,
            "hidden_size": _WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=45,
        video_token_id=46,
        vision_start_token_id=43,
        vision_end_token_id=44,
    ),
    "llava": _multimodal(
        "Llava",
        {"model_type": "llama"},
        {**_VISION, "model_type": "clip_vision_model"},
        image_token_index=45,
    ),
    "gemma3_vl": _multimodal(
        "Gemma3",
        {"model_type": "gemma3_text", "head_dim": 8},
        {**_VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=45,
    ),
}


def run(model: PreTrainedModel) -> torch.Tensor:
    """Logits of two short sequences, `(2, 6, vocabulary)`."""
    tokens = torch.arange(12).reshape(2, 6) + 3
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens + 12
    with torch.no_grad():
        return model(**inputs).logits
