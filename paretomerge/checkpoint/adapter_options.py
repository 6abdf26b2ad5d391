"""What an adapter_config.json of peft may say: only what is computed here, or what does not matter.

An option that nobody looked at could change what an adapter computes, so it is refused by name.
"""

from paretomerge.checkpoint.json_file import ReadOnlyJson
from paretomerge.errors import CheckpointError, shorten

_UNSUPPORTED = {
    "use_dora": "DoRA (use_dora)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "layer_replication": "one with replicated layers (layer_replication)",
    "alora_invocation_tokens": (
        "aLoRA (alora_invocation_tokens), which acts only behind its tokens, so no weights equal it"
    ),
    "alora_invocation_string": (
        "aLoRA (alora_invocation_string), which acts only behind its tokens, so no weights equal it"
    ),
    "lora_bias": "one whose factors have biases (lora_bias)",
    "trainable_token_indices": "one with trained tokens (trainable_token_indices)",
    "arrow_config": "a router of adapters (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}
# Those that are read, and those that say where or how an adapter was trained: its tensors name
# their modules, and nothing else of the training matters once it is over.
_KNOWN = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_rslora",
    "velora_config",
)
# With other initialisations, such as PiSSA, peft takes something off the model's own weights.
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "true", "false")
_EMPTY: tuple[object, ...] = (None, False, "", [], {})
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CURE = "merge it into its model with peft first"


def check_plain_lora(config: ReadOnlyJson, adapter: str) -> None:
    """Check that an adapter is LoRA without an extension that changes its mathematics.

    Args:
        config: adapter_config.json.
        adapter: Name of the adapter, for error messages.

    Raises:
        CheckpointError: If it is not, or has an option that is not known.
    """
    unsupported = _unsupported(config)
    if unsupported is not None:
        raise CheckpointError(
            f"{adapter}: expected a LoRA adapter, got {unsupported}; {_CURE}"
        )
    for key, value in config.items():
        if key not in _KNOWN and key not in _UNSUPPORTED and value not in _EMPTY:
            raise CheckpointError(
                f"{adapter}: adapter_config.json: {shorten(key)} is no option that is known here, "
                f"so the adapter may compute something else than LoRA; {_CURE}, or take the key "
                "out if it has no effect"
            )


def stores_transposed(
    model_config: ReadOnlyJson,
    config: ReadOnlyJson,
    shape: tuple[int, ...],
    factor_shape: tuple[int, int],
) -> bool:
    """Whether a module keeps the transpose of a linear layer's weight (Conv1D of GPT-2).

    peft goes by the class of the module, whatever `fan_in_fan_out` says.

    Args:
        model_config: config.json of the model.
        config: adapter_config.json.
        shape: Shape of the module's weight.
        factor_shape: Shape of B A.
    """
    is_conv1d = model_config.get("model_type") in CONV1D_MODELS
    if "auto_map" in model_config:
        is_conv1d = bool(config.get("fan_in_fan_out"))
    # The head of such a model is an ordinary linear layer.
    is_square = factor_shape[0] == factor_shape[1]
    return is_conv1d and (is_square or shape != factor_shape)


def _unsupported(config: ReadOnlyJson) -> str | None:
    """What an adapter is instead of plain LoRA; None if it is plain LoRA."""
    initialisation = config.get("init_lora_weights")
    named = initialisation.lower() if isinstance(initialisation, str) else "true"
    if named not in _PLAIN_INITIALISATIONS:
        return f"{shorten(initialisation)} (init_lora_weights)"
    for key, label in _UNSUPPORTED.items():
        if config.get(key) not in _EMPTY:
            return label
    kind = config.get("peft_type")
    return None if kind == "LORA" else str(kind)
