"""Where a tensor is in the network, inferred from its name and the config.

There is no list of known models: layers are numbered lists in the names, as long as the config's
depth; roles, embeddings and modules are recognised by parts of the names.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from paretomerge.checkpoint.json_file import ReadOnlyJson
from paretomerge.checkpoint.model_config import (
    declares_own_head,
    depths,
    text_config,
)
from paretomerge.errors import CheckpointError, unknown_name

ROLES = ("attention", "mlp", "other")
"""Roles of tensors. Norms between blocks, embeddings and the head are `other`; a norm inside a
block (`q_norm`) has the block's role."""

LANGUAGE_MODULE = "text_decoder"
"""The language part of a multimodal model, whose layers recipes route."""

DEFAULT_MODULE = "default"
"""The only module of a model with one; in a multimodal model, another name of its language part."""

_LANGUAGE_ALIASES = (LANGUAGE_MODULE, DEFAULT_MODULE, "language_model")

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_forward|moe|expert|intermediate|dense|^fc\d", re.IGNORECASE
)
_NORM = re.compile(r"norm|^ln", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|wte|wpe|embd|(^|\.)shared\.|project_in", re.IGNORECASE)
# Tensors after the layers: language model heads and those of classifiers and encoders.
_HEAD = re.compile(
    r"head|embed_out|score|classifier|cls|predictions|vocab_|proj_out|pred_layer|logits|lm_output"
    r"|pooler",
    re.IGNORECASE,
)
_OTHER_MODALITY = re.compile(
    r"vis(ion|ual)|image|video|audio|speech|multi_?modal|mm_|(?<!vocab_)projector|connector"
    r"|resampler|perceiver|qformer",
    re.IGNORECASE,
)
_LANGUAGE = re.compile(r"language|text|llm")
# Parts of names that only wrap the modules; `thinker` is Qwen-Omni's.
_WRAPPERS = re.compile(r"^(?:(?:model|thinker)\.)+")
_INPUT_EMBEDDING = re.compile(
    r"(embed_tokens|embed_in|tok_embeddings|word_embeddings|token_embedding|wte|shared|embeddings)"
    r"\.weight$"
)
# The heads and shared embeddings that a checkpoint may leave out if they are the input embedding.
_TIED = re.compile(
    _INPUT_EMBEDDING.pattern
    + r"|(lm_head|embed_out|proj_out|vocab_projector|(^|\.)output"
    r"|(predictions|lm_head)\.decoder)\.weight$"
)
# Masked language models keep the bias of the head twice: in the head, and in its last layer.
_TIED_BIAS = re.compile(r"(predictions|lm_head)(\.decoder)?\.bias$")
# Embeddings of positions and token types, and layers between the last block and the head.
_NOT_TOKENS = re.compile(
    r"posit|wpe|type|norm|dense|transform(?!er)|per_layer", re.IGNORECASE
)
# What a model computes without: predictors of further tokens, which only speculative decoding
# uses, and buffers that are computed from the config.
_PREDICTOR = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn\w*|multi_token_predict\w*)\.")
_BUFFER = re.compile(
    r"inv_freq$|rotary_emb\.|rope\.freqs$|(cos|sin)_cached$|masked_bias$|position_ids$"
    r"|(^|\.)h\.\d+\.attn\.bias$|layers\.\d+\.attention\.bias$"
)
_T = TypeVar("_T")
_LIST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_CODER = re.compile(r"\b(en|de)coder\b")


@dataclass(frozen=True)
class Stack:
    """One numbered list of layers.

    Attributes:
        prefix: The part of the names before the number (`model.layers.`).
        depth: Number of layers.
        is_main: Whether a recipe's layer ranges route it.
    """

    prefix: str
    depth: int
    is_main: bool

    def layer(self, name: str) -> int | None:
        """Return the layer of a tensor in this stack.

        None for tensors outside, and for layers beyond the depth (a multi-token predictor).
        """
        if not name.startswith(self.prefix):
            return None
        number = name.removeprefix(self.prefix).partition(".")[0]
        if number.isdecimal() and int(number) < self.depth:
            return int(number)
        return None


@dataclass(frozen=True)
class Architecture:
    """The names of one model's tensors, and the stacks of layers in them.

    A decoder has one main stack, and so has the language part of a multimodal model. An
    encoder-decoder has two if they are equally deep, else only its decoder is main. If no layers
    are numbered (ALBERT shares one layer), every tensor is outside the layers.

    Attributes:
        names: Names of all tensors.
        stacks: All stacks, the main ones first.
        vocab_size: Number of tokens that the config gives.
        multimodal: Whether the model has parts for other modalities than text.
        separated: Tensors that the config ties and an adapter made differ.
        own_head: Whether the config says that the head is a tensor of its own.
    """

    names: tuple[str, ...]
    stacks: tuple[Stack, ...]
    vocab_size: int | None = None
    multimodal: bool = False
    separated: frozenset[str] = frozenset()
    own_head: bool = False

    @classmethod
    def infer(cls, names: Iterable[str], config: ReadOnlyJson) -> "Architecture":
        """Infer the stacks of a model.

        Stacks are the outermost numbered lists; the main ones are as deep as the text part of the
        config says.

        Args:
            names: Names of all tensors.
            config: config.json.

        Raises:
            CheckpointError: If no list is as deep as the config says.
        """
        names = tuple(names)
        text = text_config(config)
        lists = _numbered_lists(names)
        candidates = _main_candidates(lists, text)
        main = _main_prefixes(candidates, names)
        expected = depths(text)
        if expected and not main and max(lists.values(), default=0) > 1:
            wanted = " or ".join(str(depth) for depth in expected)
            raise CheckpointError(
                f"expected {wanted} numbered layers, as the config says; got {lists}; "
                "do the config and the weights come from one model?"
            )
        stacks = []
        for prefix in main:
            depth = candidates[prefix]
            stacks.append(Stack(prefix, depth, is_main=True))
        for prefix, length in lists.items():
            if prefix not in main and length > 1:
                stacks.append(Stack(prefix, length, is_main=False))
        vocab_size = text.get("vocab_size")
        tops = {_top(name) for name in names}
        has_other_modality = any(_OTHER_MODALITY.search(top) for top in tops)
        has_nested_text = text is not config
        return cls(
            names=names,
            stacks=tuple(stacks),
            vocab_size=vocab_size if isinstance(vocab_size, int) else None,
            multimodal=bool(main) and (has_nested_text or has_other_modality),
            own_head=declares_own_head(config),
        )

    @cached_property
    def main_stacks(self) -> tuple[Stack, ...]:
        """The stacks that layer ranges route, all of one depth; () without numbered layers."""
        return tuple(stack for stack in self.stacks if stack.is_main)

    @property
    def depth(self) -> int:
        """Number of layers of each main stack; 0 without one."""
        return self.main_stacks[0].depth if self.main_stacks else 0

    @property
    def prefix(self) -> str:
        """Prefix of the first main stack; '' without one."""
        return self.main_stacks[0].prefix if self.main_stacks else ""

    def layer(self, name: str) -> int | None:
        """Return the layer of a main stack that a tensor belongs to; None outside the layers."""
        for stack in self.main_stacks:
            layer = stack.layer(name)
            if layer is not None:
                return layer
        return None

    def is_beyond_depth(self, name: str) -> bool:
        """Whether a tensor is in a layer after the last (DeepSeek's multi-token predictor)."""
        if self.layer(name) is not None:
            return False
        for stack in self.main_stacks:
            if name.startswith(stack.prefix):
                number = name.removeprefix(stack.prefix).partition(".")[0]
                if number.isdecimal():
                    return True
        return False

    def is_predictor(self, name: str) -> bool:
        """Whether a tensor belongs to a predictor of further tokens."""
        return self.is_named_predictor(name) or self.is_beyond_depth(name)

    def is_named_predictor(self, name: str) -> bool:
        """Whether a name alone says that its tensor belongs to a predictor of further tokens."""
        return bool(_PREDICTOR.search(name))

    def is_auxiliary(self, name: str) -> bool:
        """Whether a model computes the same without a tensor: a predictor or a buffer."""
        return self.is_predictor(name) or bool(_BUFFER.search(name))

    def at_layer(self, name: str, layer: int) -> str:
        """Return the name of the same tensor in another layer of its stack."""
        for stack in self.main_stacks:
            if stack.layer(name) is not None:
                after_prefix = name.removeprefix(stack.prefix)
                rest = after_prefix.partition(".")[2]
                return f"{stack.prefix}{layer}.{rest}"
        raise ValueError(f"{name} is not in a main stack")

    @cached_property
    def by_layer(self) -> Mapping[int | None, tuple[str, ...]]:
        """Tensor names by layer; under None those outside the layers.

        Layers differ: the first may be dense in a mixture of experts, or own a table of biases.
        """
        groups = defaultdict(list)
        for name in self.names:
            groups[self.layer(name)].append(name)
        return _frozen(groups)

    def role(self, name: str) -> str:
        """Return the role of a tensor in any stack, one of `ROLES`."""
        # The first part that says something decides: `self_attn.dense` is attention, not MLP.
        for segment in self._segments(name):
            if _NORM.search(segment):
                return "other"
            if _ATTENTION.search(segment):
                return "attention"
            if _MLP.search(segment):
                return "mlp"
        return "other"

    def is_embedding(self, name: str) -> bool:
        """Whether a tensor outside the layers comes before them.

        Such a tensor takes the parameters of the first slice.
        """
        is_outside = self.layer(name) is None
        # Some heads have "embed" in their names: `embed_out` of GPT-NeoX.
        is_head = bool(_HEAD.search(name))
        return is_outside and not is_head and bool(_EMBEDDING.search(name))

    def vocabulary_axis(self, name: str, shape: Sequence[int]) -> int | None:
        """Return the axis along which a tensor has one entry per token.

        Returns:
            0 for embeddings, the head and its bias, 1 for BART's bias of shape (1, tokens); None
            for all other tensors, position embeddings included.
        """
        if self.module(name) not in (LANGUAGE_MODULE, DEFAULT_MODULE):
            return None
        if any(stack.layer(name) is not None for stack in self.stacks):
            return None
        if _NOT_TOKENS.search(name):
            return None
        if not _EMBEDDING.search(name) and not _HEAD.search(name):
            return None
        # A name alone is not enough: a classifier's head has one row per class.
        sizes = tuple(shape)
        if sizes[:1] == (self.vocab_size,):
            return 0
        return 1 if sizes == (1, self.vocab_size) else None

    def is_vocabulary(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the rows of a tensor are tokens."""
        return self.vocabulary_axis(name, shape) == 0

    def find_equivalent(self, name: str) -> str | None:
        """Find what this checkpoint holds in place of a tensor of another checkpoint.

        Returns:
            The name itself if it is here; the name with or without the prefix of the base model;
            for a tied head or shared embedding that was not written, the input embedding; None
            if there is nothing.
        """
        if name in self._name_set:
            return name
        first_part = name.split(".", 1)[0]
        own_first_part = self.prefix.split(".", 1)[0]
        candidates = (
            name.removeprefix(f"{first_part}."),
            f"{own_first_part}.{name}",
            name.replace(".decoder.bias", ".bias"),
        )
        for candidate in candidates:
            if candidate in self._name_set:
                return candidate
        # Fuyu's `vision_embed_tokens` is no embedding of tokens.
        is_tied = _TIED.search(name) and not _OTHER_MODALITY.search(name)
        if not is_tied or self._is_lost_head(name):
            return None
        return self._input_embedding

    def lacks_head(self, name: str) -> bool:
        """Whether a name is that of a head that the config declares and the checkpoint lacks.

        Many tools save a model without its head: transformers would give it random values.
        """
        return self._is_lost_head(name) and self.find_equivalent(name) is None

    def _is_lost_head(self, name: str) -> bool:
        is_head = _TIED.search(name) and not _INPUT_EMBEDDING.search(name)
        return self.own_head and bool(is_head)

    def is_tied_head(self, name: str) -> bool:
        """Whether a head of that name is the input embedding in this checkpoint."""
        if name in self._name_set or self._input_embedding is None:
            return False
        # A shared embedding that was not written matches both patterns and is no head.
        if not _TIED.search(name) or _INPUT_EMBEDDING.search(name):
            return False
        return self.find_equivalent(name) == self._input_embedding

    def can_be_tied(self, name: str) -> bool:
        """Whether a tensor of that name is of an embedding or a head, which models may tie."""
        return bool(_TIED.search(name) or _TIED_BIAS.search(name))

    @property
    def has_head(self) -> bool:
        """Whether there is a head or a second embedding besides the input embedding."""
        candidates = self.by_layer.get(None, ())
        tieable = [name for name in candidates if _TIED.search(name)]
        return any(name != self._input_embedding for name in tieable)

    def module(self, name: str) -> str:
        """Return the module that a tensor belongs to.

        Returns:
            `default` in a model of one module. In a multimodal model `text_decoder` for the
            language part with its embeddings, norm and head; for the rest the first part of the
            name without `model.`, such as `visual` or `vision_tower`.
        """
        if not self.multimodal:
            return DEFAULT_MODULE
        top = _top(name)
        return top if top in self._other_modules else LANGUAGE_MODULE

    @cached_property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """Tensor names by module."""
        groups = defaultdict(list)
        for name in self.names:
            groups[self.module(name)].append(name)
        return _frozen(groups)

    def find_module(self, alias: str) -> str:
        """Return the module that a recipe names.

        Args:
            alias: Name of a module; for the language part also `text_decoder`, `language_model`
                or `default`.

        Raises:
            CheckpointError: If there is no such module.
        """
        if alias in self.modules:
            return alias
        if alias in _LANGUAGE_ALIASES:
            return LANGUAGE_MODULE if self.multimodal else DEFAULT_MODULE
        raise CheckpointError(unknown_name("module", alias, self.modules))

    def role_filters(self, role: str) -> tuple[str, ...]:
        """Return mergekit filters that together select the tensors of a role and no others.

        A filter is a substring of tensor names.
        """
        selected: list[str] = []
        others: list[str] = []
        for name in self.names:
            names = selected if self.role(name) == role else others
            names.append(name)
        # Layers share their patterns, so each pattern is compared with all names only once.
        is_exclusive: dict[str, bool] = {}
        filters: set[str] = set()
        for name in selected:
            for pattern in self._patterns(name):
                if pattern not in is_exclusive:
                    matches_other = any(pattern in other for other in others)
                    is_exclusive[pattern] = not matches_other
                if is_exclusive[pattern]:
                    filters.add(pattern)
                    break
        return tuple(sorted(filters))

    def _segments(self, name: str) -> list[str]:
        """The parts of a name after the layer's number, then the name of the list itself.

        The list's name counts as well: XLM has `attentions.3.q_lin`.
        """
        for stack in self.stacks:
            if stack.layer(name) is not None:
                parts = name.removeprefix(stack.prefix).split(".")
                list_name = stack.prefix.split(".")[-2]
                return [*parts[1:], list_name]
        return []

    def _patterns(self, name: str) -> Iterator[str]:
        """Substrings of a name that may serve as filters, short ones first.

        Those that hold for all layers come before those with the layer's number.
        """
        parts = self._segments(name)[:-1]
        number_position = -len(parts) - 1
        number = name.split(".")[number_position]
        for width in range(1, len(parts)):
            for start in range(len(parts) - width):
                middle = ".".join(parts[start : start + width])
                yield f".{middle}."
        for width in range(1, len(parts)):
            beginning = ".".join(parts[:width])
            yield f".{number}.{beginning}."
        yield name

    @cached_property
    def _name_set(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _input_embedding(self) -> str | None:
        """The token embedding of the language part with the fewest dots in its name."""
        candidates = []
        for name in self.by_layer.get(None, ()):
            if not _INPUT_EMBEDDING.search(name) or _NOT_TOKENS.search(name):
                continue
            if self.module(name) in (LANGUAGE_MODULE, DEFAULT_MODULE):
                candidates.append(name)
        return min(candidates, key=_by_number_of_dots, default=None)

    @cached_property
    def _other_modules(self) -> frozenset[str]:
        """First parts of names that do not belong to the language part."""
        tops = {_top(name) for name in self.names}
        language = {_top(stack.prefix) for stack in self.main_stacks}
        rest = tops - language
        # If the language part has a name of its own, only the head may be outside of it.
        if any(_LANGUAGE.search(top) for top in language):
            return frozenset(top for top in rest if not _HEAD.search(top))
        # Else its embeddings, norm and head are outside of it, and others show by their layers or
        # their name.
        with_layers = {_top(stack.prefix) for stack in self.stacks}
        named = {top for top in rest if _OTHER_MODALITY.search(top)}
        return frozenset((rest & with_layers) | named)


def _frozen(groups: Mapping[_T, Sequence[str]]) -> Mapping[_T, tuple[str, ...]]:
    return {key: tuple(names) for key, names in groups.items()}


def _top(name: str) -> str:
    """The first part of a name, without wrappers such as `model.`."""
    return _WRAPPERS.sub("", name).partition(".")[0]


def _by_number_of_dots(name: str) -> tuple[int, str]:
    return name.count("."), name


def _numbered_lists(names: Iterable[str]) -> dict[str, int]:
    """The outermost lists numbered from 0 without gaps: prefix -> length.

    Experts are numbered inside layers, so only the first number of a name counts.
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        match = _LIST_NUMBER.search(name)
        if match:
            prefix = name[: match.start()]
            numbers[prefix].add(int(match.group()))
    lists = {}
    for prefix, used_numbers in numbers.items():
        length = len(used_numbers)
        if used_numbers == set(range(length)):
            lists[prefix] = length
    return lists


def _main_candidates(lists: Mapping[str, int], text: ReadOnlyJson) -> dict[str, int]:
    """The lists that are as deep as the config says: prefix -> depth."""
    expected = depths(text)
    # DeepSeek numbers its multi-token predictors after the last layer.
    n_predictors = text.get("num_nextn_predict_layers") or 0
    candidates = {}
    for prefix, length in lists.items():
        if not expected and length > 1:
            candidates[prefix] = length
        for depth in expected:
            n_extra = length - depth
            if 0 <= n_extra <= n_predictors:
                candidates[prefix] = depth
    return candidates


def _main_prefixes(
    candidates: Mapping[str, int], names: Sequence[str]
) -> tuple[str, ...]:
    """The prefixes of the main stacks.

    The best candidate of the language part, with the encoder or decoder that faces it, or with
    the lists that share its layers (XLM numbers attention and MLP separately).
    """
    embedding_parents = set()
    for name in names:
        match = _INPUT_EMBEDDING.search(name)
        if match:
            embedding_parents.add(name[: match.start()])

    def rank(prefix: str) -> tuple[bool, bool, bool, int, int, str]:
        return (
            bool(_OTHER_MODALITY.search(prefix)),
            not _LANGUAGE.search(prefix),
            not _is_near_embedding(prefix, embedding_parents),
            -candidates[prefix],
            len(prefix),
            prefix,
        )

    order = sorted(candidates, key=rank)
    if not order:
        return ()
    best = order[0]
    counterpart = _counterpart(best)
    if counterpart != best and counterpart in candidates:
        # Layer ranges route both stacks if they can; the decoder alone makes a language model.
        if candidates[best] == candidates[counterpart]:
            return tuple(sorted((best, counterpart), reverse=True))
        is_decoder = re.search(r"\bdecoder\b", best)
        return (best,) if is_decoder else (counterpart,)
    siblings = []
    for prefix in order[1:]:
        is_beside = _parent(prefix) == _parent(best)
        if is_beside and candidates[prefix] == candidates[best]:
            siblings.append(prefix)
    return (best, *siblings)


def _counterpart(prefix: str) -> str:
    """The prefix with its first `encoder` replaced by `decoder`, or the other way round."""

    def swap(match: re.Match[str]) -> str:
        return "decoder" if match[1] == "en" else "encoder"

    return _CODER.sub(swap, prefix, count=1)


def _parent(prefix: str) -> str:
    """The module that holds a list: `model` of `model.layers.`."""
    return prefix.removesuffix(".").rpartition(".")[0]


def _is_near_embedding(prefix: str, embedding_parents: Set[str]) -> bool:
    """Whether a token embedding is beside the list.

    `model.embed_tokens` is beside `model.layers.`, and `bert.embeddings` beside BERT's layers.
    """
    parent = _parent(prefix)
    if any(home.startswith(parent) for home in embedding_parents):
        return True
    for home in embedding_parents:
        if home.endswith(".embeddings."):
            model = home.removesuffix("embeddings.")
            if prefix.startswith(model):
                return True
    return False
