"""Load a model as the class that its config names."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.companions import tokenizer_files
from paretomerge.checkpoint.json_file import ReadOnlyJson
from paretomerge.errors import CheckpointError
from paretomerge.merging.live.quiet import without_progress_bars

if TYPE_CHECKING:
    import torch
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

# In the order in which they are asked where a config names no class.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)


def load_model(folder: Path, dtype: "torch.dtype | None") -> "PreTrainedModel":
    """Load a model as the class that its config names.

    Args:
        folder: The model's folder.
        dtype: The dtype of the loaded weights; None for the one that config.json states.

    Returns:
        The model, on the CPU.

    Raises:
        CheckpointError: If transformers cannot load it, or has no class for it.
    """
    config = read_config(folder)
    # Left over from an earlier state of the weights; only full-precision weights can be merged.
    # With it, transformers would ask for the quantiser, or quantise what it loads.
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    chosen = model_class(config)
    try:
        with without_progress_bars():
            model: PreTrainedModel = chosen.from_pretrained(
                folder, config=config, dtype=dtype or "auto"
            )
    # Model classes raise exceptions of any class for files that they do not know.
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load it as {chosen.__name__}: {_cause(error)}"
        ) from error
    return model


def read_config(folder: Path) -> "PretrainedConfig":
    """Read a model's config as transformers does.

    Args:
        folder: The model's folder.

    Returns:
        The config.

    Raises:
        CheckpointError: If transformers does not know such a model.
    """
    from transformers import AutoConfig

    try:
        # Never None, with which transformers asks at a terminal whether to run a model's own code.
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # config classes raise exceptions of any class
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{folder}: transformers knows the model only by Python code in its folder "
                "(`auto_map` in config.json), which is never run. Such models cannot be searched; "
                "`paretomerge merge` merges them, since it reads tensors alone"
            ) from error
        raise CheckpointError(
            f"{folder}: transformers cannot read config.json: {_cause(error)}"
        ) from error
    return config


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer of a model.

    Args:
        folder: The model's folder.

    Returns:
        The tokenizer; None where the folder has no file of one, such as an image classifier's.

    Raises:
        CheckpointError: If transformers cannot load it.
    """
    if not tokenizer_files(folder):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raise exceptions of any class
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({_cause(error)}); copy the files of the "
            "tokenizer, such as tokenizer.json, into the folder"
        ) from error
    return tokenizer


def _cause(error: Exception) -> str:
    """The first line of an error: transformers adds advice for developers in further lines."""
    lines = str(error).strip().splitlines()
    first_line = lines[0].rstrip(".: ") if lines else ""
    return f"{type(error).__name__}: {first_line}"


def model_class(config: "PretrainedConfig") -> "type[PreTrainedModel]":
    """Choose the class of a model: the one that its config names, else one that writes text.

    Args:
        config: The model's config.

    Returns:
        A class of transformers.

    Raises:
        CheckpointError: If transformers has no class for the config.
    """
    import transformers

    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    for name in _AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            # Some configs have several classes.
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
    raise CheckpointError(
        f"transformers has no class of its own for models of type {config.model_type}, so they "
        "cannot be searched in memory; merge them with `paretomerge merge`"
    )


def empty_model(content: ReadOnlyJson) -> "PreTrainedModel":
    """Build a model without memory for its parameters.

    Args:
        content: The content of a config.json, which may describe another depth than any file.

    Returns:
        The model. Its buffers, such as rotary frequencies, are computed from the config: no
        checkpoint has them.

    Raises:
        CheckpointError: If transformers has no class for the config.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.for_model(**content)
    chosen = model_class(config)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = chosen._from_config(config)
    model.tie_weights()
    return model
