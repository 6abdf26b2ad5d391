"""Whether models belong together, beyond the shapes of their tensors.

Weights mean something only in their network: with other heads, another activation or other token
ids, the same shapes hold something else, and their mean is noise.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from paretomerge.checkpoint.model_config import text_config, with_class_defaults
from paretomerge.checkpoint.tokenizer import read_tokens
from paretomerge.errors import CheckpointError, shorten
from paretomerge.merging.plan.plan import ModelConfig, Weights

# What a merge means nothing without.
_DECISIVE = (
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "num_kv_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "head_dim",
    "d_kv",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "activation",
    "dense_act_fn",
    "is_gated_act",
    "multi_query",
    "alibi",
    "position_embedding_type",
)
# What fine-tunes change on purpose, such as for longer texts. The result follows the base.
_FOLLOWED = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rotary_emb_base",
    "partial_rotary_factor",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "norm_epsilon",
    "sliding_window",
    "use_sliding_window",
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "scale_decoder_outputs",
    "id2label",
)
# Words in the type of a language model that tell that it is part of another one, and the 5 of
# Qwen2.5, whose language models are of the type `qwen2`.
_PART_WORDS = ("text", "vl", "omni", "model", "5")
_MAX_TOKENS_IN_MESSAGE = 3

ONE_VOCABULARY = (
    "in a recipe or a study, `tokenizer_source: union` or `base` brings them together; other "
    "commands take a model that such a recipe wrote (docs/recipes.md)"
)
"""What to do with models of several vocabularies, for messages."""

_MAX_VOCABULARIES = 16


@dataclass(frozen=True)
class Mismatch:
    """What speaks against merging a model into another one.

    Attributes:
        errors: What makes the merge meaningless.
        notes: Where the result follows the other model.
    """

    errors: tuple[str, ...]
    notes: tuple[str, ...]

    def raise_if_any(self) -> None:
        """Raise CheckpointError if there are errors."""
        if self.errors:
            listed = "; ".join(self.errors)
            raise CheckpointError(
                f"{listed}; do the models come from one base? --allow-mismatch takes them anyway"
            )


def find_mismatch(
    template_name: str,
    template: Weights,
    model: str,
    weights: Weights,
    same_vocabulary: bool = True,
    same_type: bool = True,
) -> Mismatch:
    """Compare the configs and the tokenizers of two models.

    Args:
        template_name: The model whose config the result follows, as the recipe names it.
        template: That model.
        model: Another model, as the recipe names it.
        weights: That model.
        same_vocabulary: Whether the models must give their tokens the same ids.
        same_type: Whether the models must be of one `model_type`.
    """
    errors = _differences(template.config, weights.config, _DECISIVE, template_name)
    kinds = _model_types(template.config, weights.config)
    if kinds and same_type:
        errors.insert(0, f"model_type is {kinds[1]!r}, {kinds[0]!r} in {template_name}")
    followed = _differences(template.config, weights.config, _FOLLOWED, template_name)
    notes = [f"{model}: {entry}, which the result follows" for entry in followed]
    moved = moved_tokens(template, weights) if same_vocabulary else []
    if moved:
        errors.append(
            f"{len(moved)} tokens have other ids than in {template_name}, such as "
            f"{', '.join(map(repr, moved[:_MAX_TOKENS_IN_MESSAGE]))} ({ONE_VOCABULARY})"
        )
    named = [f"{model}: {entry}" for entry in errors]
    return Mismatch(tuple(named), tuple(notes))


def moved_tokens(template: Weights, weights: Weights) -> list[str]:
    """Return the tokens that two models share and give different ids.

    Args:
        template: A model.
        weights: Another model.
    """
    file = _vocabulary_file(template.folder)
    other_file = _vocabulary_file(weights.folder)
    if file is None or other_file is None:
        return []
    return _moved_tokens(file, other_file)


def _model_types(
    config: ModelConfig, other_config: ModelConfig
) -> tuple[str, str] | None:
    """The kinds of two models if they differ; None if they agree or cannot be compared."""
    text, other_text = text_config(config), text_config(other_config)
    pairs = [(config, other_config), (text, other_text)]
    # A language model may be merged into one that also sees.
    if (text is not config) != (other_text is not other_config):
        pairs = [(text, other_text)]
    for part, other in pairs:
        kind, other_kind = part.get("model_type"), other.get("model_type")
        if not kind or not other_kind or kind == other_kind:
            continue
        if len(pairs) == 1 and _family(str(kind)) == _family(str(other_kind)):
            continue
        return str(kind), str(other_kind)
    return None


def _family(model_type: str) -> str:
    """What the types of a language model and of the same as a part of another one share.

    `qwen2` is `qwen2_5_vl_text` in Qwen2.5-VL, and `glm4` is `glm4v_text` in GLM-4V.
    """
    words = re.sub(r"(?<=\d)v(?=_|$)", "", model_type).split("_")
    return "_".join(word for word in words if word not in _PART_WORDS)


def _differences(
    config: ModelConfig,
    other_config: ModelConfig,
    keys: tuple[str, ...],
    template_name: str,
) -> list[str]:
    """Sentences on the keys whose values differ."""
    text, other = text_config(config), text_config(other_config)
    if all(text.get(key) == other.get(key) for key in keys):
        return []
    # A key that one config leaves out has the value of its class, and older configs spell some
    # keys differently.
    try:
        text = text_config(with_class_defaults(config))
        other = text_config(with_class_defaults(other_config))
    except CheckpointError:
        # What the configs say themselves is left to compare.
        pass
    sentences = []
    for key in keys:
        value, other_value = text.get(key), other.get(key)
        if key in text and key in other and not _is_equal(value, other_value):
            said = f"{key} is {shorten(other_value)}"
            sentences.append(f"{said}, {shorten(value)} in {template_name}")
    return sentences


def _is_equal(value: object, other: object) -> bool:
    """Whether two values agree, with keys as JSON has them."""
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)


class _VocabularyFile(NamedTuple):
    """A file that lists a vocabulary. The time and the size tell when it has been changed."""

    path: Path
    modified_ns: int
    size: int


def _vocabulary_file(folder: Path) -> _VocabularyFile | None:
    """The file with a model's vocabulary; None for tokenizers that only a library can read."""
    for name in ("tokenizer.json", "vocab.json", "vocab.txt"):
        path = folder / name
        if path.is_file():
            status = path.stat()
            return _VocabularyFile(path, status.st_mtime_ns, status.st_size)
    return None


# Both are remembered: a search plans thousands of merges of the same models.
@lru_cache(_MAX_VOCABULARIES)
def _moved_tokens(file: _VocabularyFile, other_file: _VocabularyFile) -> list[str]:
    """Tokens that two tokenizers share and give different ids."""
    ids, other_ids = _ids(file), _ids(other_file)
    moved = []
    for token, number in other_ids.items():
        if ids.get(token, number) != number:
            moved.append(token)
    return moved


@lru_cache(_MAX_VOCABULARIES)
def _ids(file: _VocabularyFile) -> Mapping[str, int]:
    """Token -> id; {} for a file that cannot be read."""
    path = file.path
    try:
        if path.name == "vocab.txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            return {token: number for number, token in enumerate(lines)}
        if path.name == "vocab.json":
            ids: dict[str, int] = json.loads(path.read_bytes())
            return ids if isinstance(ids, dict) else {}
        return read_tokens(path.parent).ids
    except (CheckpointError, ValueError):
        # Whatever needs the tokenizer says what is wrong with it.
        return {}
