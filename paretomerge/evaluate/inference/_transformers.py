"""Private names of transformers; `tests/evaluate/test_adapters.py` fails when one changes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION_CONFIG_METADATA = ("_from_model_config", "transformers_version")
"""Keys of a `GenerationConfig` that say where it comes from."""


def is_stateful(model: "PreTrainedModel") -> bool:
    """Whether a model carries a recurrent state, which cannot be rewound like a key-value cache."""
    return bool(getattr(model, "_is_stateful", False))
