"""The config.json of a mixture of experts, made of that of its dense base."""

from paretomerge.checkpoint.json_file import JsonObject, ReadOnlyJson
from paretomerge.checkpoint.model_config import with_class_defaults
from paretomerge.errors import CheckpointError
from paretomerge.systems.moe.targets import MIXTRAL, QWEN2_MOE, Target

_CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "rope_parameters",
)
_SLIDING = "sliding_attention"
_FULL = "full_attention"


def moe_config(
    target: Target,
    base: str,
    config: ReadOnlyJson,
    dtype: str,
    experts: tuple[int, int],
    widths: tuple[int, int | None],
) -> JsonObject:
    """Make the config of a mixture of experts.

    Every value is stated: where the dense base leaves one to its class, the class of the result may
    have another default, as it has for the frequencies of rotary positions.

    Args:
        target: The architecture of the result.
        base: The base's name, for messages.
        config: config.json of the base.
        dtype: Dtype of the result.
        experts: The numbers of experts and of experts per token.
        widths: The inner widths of the routed experts and of the shared one.

    Returns:
        The content of config.json.

    Raises:
        CheckpointError: If the architecture cannot express what the base is.
    """
    full = with_class_defaults(config)
    result: JsonObject = {
        "architectures": [target.class_name],
        "model_type": target.model_type,
    }
    for key in _CARRIED:
        result[key] = full[key]
    result["dtype"] = dtype
    result |= _old_rope_keys(full["rope_parameters"])
    result |= _head_width(target, base, full)
    result |= _windows(target, base, full)
    n_experts, n_per_token = experts
    width, shared_width = widths
    result |= {
        "num_experts_per_tok": n_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    if target is MIXTRAL:
        result |= {
            "num_local_experts": n_experts,
            "intermediate_size": width,
            "router_jitter_noise": 0.0,
        }
        return result
    result |= {
        "num_experts": n_experts,
        "moe_intermediate_size": width,
        # The default of the classes is false: the weights of the experts would not sum to 1.
        "norm_topk_prob": True,
        # Every layer has experts.
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if target is QWEN2_MOE:
        result |= {"shared_expert_intermediate_size": shared_width, "qkv_bias": True}
    else:
        result["attention_bias"] = False
    return result


def _old_rope_keys(rope: ReadOnlyJson) -> JsonObject:
    """The rotary positions as transformers 4 and vLLM read them; transformers 5 reads both."""
    keys: JsonObject = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        scaling = dict(rope)
        del scaling["rope_theta"]
        keys["rope_scaling"] = scaling
    return keys


def _head_width(target: Target, base: str, full: ReadOnlyJson) -> JsonObject:
    """The width of an attention head, for architectures that state it."""
    derived = full["hidden_size"] // full["num_attention_heads"]
    width = full.get("head_dim") or derived
    if target is not QWEN2_MOE:
        return {"head_dim": width}
    if width != derived:
        raise CheckpointError(
            f"{base}: head_dim is {width}, and a Qwen2-MoE has hidden_size / num_attention_heads "
            f"= {derived}; build another architecture"
        )
    return {}


def _windows(target: Target, base: str, full: ReadOnlyJson) -> JsonObject:
    """The sliding windows of attention."""
    window = full.get("sliding_window")
    depth = full["num_hidden_layers"]
    # Qwen has a kind for each layer, Mistral windows in all layers, and Llama none.
    kinds = [_FULL if window is None else _SLIDING] * depth
    if full["model_type"] in ("qwen2", "qwen3"):
        kinds = full["layer_types"]
    is_sliding = _SLIDING in kinds
    if target is MIXTRAL:
        return {"sliding_window": window}
    result: JsonObject = {
        "use_sliding_window": is_sliding,
        "sliding_window": window if is_sliding else None,
    }
    if target is QWEN2_MOE:
        # Stated, as its rule without the list is another one than Qwen2's.
        result["layer_types"] = kinds
        result["max_window_layers"] = full.get("max_window_layers", depth)
        return result
    if is_sliding and _FULL in kinds:
        raise CheckpointError(
            f"{base}: has sliding windows in some layers, and a Qwen3-MoE in all or none; "
            "use a base without (`use_sliding_window: false`)"
        )
    return result
