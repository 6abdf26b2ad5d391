"""Folds a scale of the residual stream into the weights of an ordinary checkpoint.

Let the residual stream be multiplied by s_t > 0 on its way into layer t, and let S_t be the product
of s_1 to s_t. A model that carries h / S_t in place of h adds f / S_t in layer t, where f is what
the layer adds to h. It needs no multiplication of the stream, and its final norm cancels S. A norm
at the entrance of a layer cancels S as well, up to its epsilon. In a layer without such a norm, the
matrices that read the stream are multiplied by S.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from paretomerge.checkpoint.json_file import ReadOnlyJson
from paretomerge.checkpoint.model_config import text_config
from paretomerge.errors import CheckpointError


@dataclass(frozen=True)
class Fold:
    """The tensors that a scale S of the stream is folded into, by parts of their names.

    Attributes:
        writes: Tensors that write to the stream; they are divided by S.
        reads: Tensors that read the stream without a norm before them; they are multiplied by S.
        neutral: The value in `writes` that adds nothing to the stream: -1 where a norm multiplies
            by 1 + weight, else 0.
    """

    writes: tuple[str, ...]
    reads: tuple[str, ...] = ()
    neutral: float = 0.0


_LLAMA = Fold(("o_proj", "down_proj"))
# Gemma has norms at the exits of its layers as well; they multiply by 1 + weight.
_GEMMA = Fold(("post_attention_layernorm", "post_feedforward_layernorm"), neutral=-1.0)
# OLMo 2 has norms only at the exits, so its entrances read the scaled stream.
_OLMO2 = Fold(
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
)

FOLDS: Mapping[str, Fold] = MappingProxyType(
    {
        "gemma2": _GEMMA,
        "gemma3_text": _GEMMA,
        "gpt2": Fold(("c_proj",)),
        "gpt_neox": Fold(("attention.dense", "dense_4h_to_h")),
        "granite": _LLAMA,
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "olmo2": _OLMO2,
        "phi3": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "smollm3": _LLAMA,
        "starcoder2": Fold(("o_proj", "c_proj")),
    }
)
"""`model_type` -> its fold; each is tested against a forward pass with explicit scales."""


def fold_of(config: ReadOnlyJson) -> Fold:
    """Return the fold of a model.

    Args:
        config: The model's config.json.

    Raises:
        CheckpointError: If no exact fold is known for the architecture.
    """
    model_type = str(text_config(config).get("model_type"))
    if model_type not in FOLDS:
        raise CheckpointError(
            f"{model_type}: the residual stream can be scaled only in these architectures: "
            f"{', '.join(FOLDS)}; leave out the scales of the route"
        )
    return FOLDS[model_type]
