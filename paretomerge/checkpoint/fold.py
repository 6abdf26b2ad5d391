"""How layers read and write the residual stream: what lets a scale of the stream be folded into their weights.

Let the stream be multiplied by s_t > 0 on its way into layer t, and S_t be the product of s_1 to s_t. The model that
carries h / S_t in place of h adds f / S_t in layer t, where f is what the layer adds to h; it needs no multiplication of the
stream, and its final norm cancels S. A norm at the layer's entrance cancels S there, too, up to its epsilon; a layer
without one has what it reads multiplied by S.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from paretomerge.checkpoint.model_config import text_config
from paretomerge.errors import CheckpointError


@dataclass(frozen=True)
class Fold:
    """Parts of tensors' names. adds: what is divided by S. reads: what is multiplied by it.

    about: the value in `adds` that adds nothing: -1 where a norm multiplies by 1 + weight.
    """

    adds: tuple[str, ...]
    reads: tuple[str, ...] = ()
    about: float = 0.0


_LLAMA = Fold(("o_proj", "down_proj"))
_GEMMA = Fold(
    ("post_attention_layernorm", "post_feedforward_layernorm"), about=-1.0
)  # norms at the layers' exits, too

FOLDS: Mapping[str, Fold] = MappingProxyType(
    {
        "gemma2": _GEMMA,
        "gemma3_text": _GEMMA,
        "gpt2": Fold(("c_proj",)),
        "gpt_neox": Fold(("attention.dense", "dense_4h_to_h")),
        "granite": _LLAMA,
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "olmo2": Fold(  # norms at the exits alone
            ("post_attention_layernorm", "post_feedforward_layernorm"),
            ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        ),
        "phi3": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "smollm3": _LLAMA,
        "starcoder2": Fold(("o_proj", "c_proj")),
    }
)
"""model_type -> where its layers read and write the stream; each is tested against a forward pass with explicit scales."""


def fold_of(config: Mapping[str, Any]) -> Fold:
    """The fold of a model, by its config. Raises CheckpointError where none is known to be exact."""
    kind = str(text_config(config).get("model_type"))
    if kind not in FOLDS:
        raise CheckpointError(
            f"{kind}: expected a family whose stream can be scaled ({', '.join(FOLDS)}), got another; leave out the scales of the route"
        )
    return FOLDS[kind]
