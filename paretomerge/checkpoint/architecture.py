"""Where a tensor sits in the network, told from its name and the config, not from a list of known models."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from paretomerge.checkpoint.model_config import depths, text_config
from paretomerge.errors import CheckpointError, unknown_name

ROLES = ("attention", "mlp", "other")
"""Norms between blocks, embeddings and the head are `other`; a norm inside a block (`q_norm`) has the block's role."""

LANGUAGE = "text_decoder"
"""The module of a multimodal model that recipes route layers of; also reached as `default` and `language_model`."""

WHOLE = "default"
"""The only module of a model with one."""

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert|intermediate|dense|^fc\d", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|wte|wpe|embd|(^|\.)shared\.|project_in", re.IGNORECASE)
_HEAD = re.compile(
    r"head|embed_out|score|classifier|cls|predictions|vocab_|proj_out|pred_layer|logits|lm_output|pooler",
    re.IGNORECASE,
)
_FOREIGN = re.compile(
    r"vis(ion|ual)|image|video|audio|speech|multi_?modal|mm_|(?<!vocab_)projector|connector|resampler|perceiver|qformer",
    re.IGNORECASE,
)
_LANGUAGE = re.compile(r"language|text|llm")
_WRAPPERS = re.compile(r"^(?:(?:model|thinker)\.)+")
_TOKENS = re.compile(
    r"(embed_tokens|embed_in|tok_embeddings|word_embeddings|token_embedding|wte|shared|embeddings)\.weight$"
)
_TIED = re.compile(
    _TOKENS.pattern
    + r"|(lm_head|embed_out|proj_out|vocab_projector|(^|\.)output|(predictions|lm_head)\.decoder)\.weight$"
)
_NOT_TOKENS = re.compile(r"posit|wpe|type|norm|dense|transform(?!er)|per_layer", re.IGNORECASE)


@dataclass(frozen=True)
class Stack:
    """One numbered list of layers: `prefix` ends before the number (`model.layers.`).

    `main`: a recipe's layer ranges route it.
    """

    prefix: str
    depth: int
    main: bool

    def layer(self, name: str) -> int | None:
        """The tensor's layer in this stack; None outside, and for layers beyond the depth (a multi-token predictor)."""
        if not name.startswith(self.prefix):
            return None
        number = name[len(self.prefix) :].partition(".")[0]
        return int(number) if number.isdecimal() and int(number) < self.depth else None


@dataclass(frozen=True)
class Architecture:
    """Tensor names of one model, with the numbered stacks found in them; the main ones first.

    A decoder has one main stack, and so has the language part of a multimodal model. An encoder-decoder has two, if they
    are of equal depth, else its decoder is the main one. Without any (ALBERT shares one layer), all tensors are outside.
    """

    names: tuple[str, ...]
    stacks: tuple[Stack, ...]
    vocab_size: int | None = None
    multimodal: bool = False

    @classmethod
    def infer(cls, names: Iterable[str], config: Mapping[str, Any]) -> "Architecture":
        """Stacks are the outermost numbered lists; the main ones are as deep as the config's text part says."""
        names = tuple(names)
        text = text_config(config)
        lists = {
            prefix: found
            for prefix, found in _numbered(names).items()
            if found == set(range(len(found)))
        }
        expected = depths(text)
        predictors = (
            text.get("num_nextn_predict_layers") or 0
        )  # DeepSeek numbers them on, after the last layer
        deep = {
            prefix: n
            for prefix, found in lists.items()
            for n in expected
            if 0 <= len(found) - n <= predictors
        }
        if not expected and lists:
            deep = {prefix: len(found) for prefix, found in lists.items() if len(found) > 1}
        main = _main(deep, names)
        longest = max(map(len, lists.values()), default=0)
        if expected and not main and longest > 1:
            raise CheckpointError(
                f"expected {' or '.join(map(str, expected))} numbered layers, as the config says; got "
                f"{ {prefix: len(found) for prefix, found in lists.items()} }; do the config and the weights come from one model?"
            )
        stacks = [Stack(prefix, deep[prefix], True) for prefix in main]
        stacks += [
            Stack(prefix, len(found), False)
            for prefix, found in lists.items()
            if prefix not in main and len(found) > 1
        ]
        size = text.get("vocab_size")
        multimodal = text is not config or any(
            _FOREIGN.search(top) for top in {_top(name) for name in names}
        )
        return cls(
            names, tuple(stacks), size if isinstance(size, int) else None, multimodal and bool(main)
        )

    @cached_property
    def main(self) -> tuple[Stack, ...]:
        """The stacks that layer ranges route, all of one depth; () where no layers are numbered."""
        return tuple(stack for stack in self.stacks if stack.main)

    @property
    def depth(self) -> int:
        """Layers of each main stack, L; 0 without one."""
        return self.main[0].depth if self.main else 0

    @property
    def prefix(self) -> str:
        """Where the first main stack is; '' without one."""
        return self.main[0].prefix if self.main else ""

    def layer(self, name: str) -> int | None:
        """The layer of a main stack that a tensor belongs to; None outside the layers."""
        return next(
            (layer for stack in self.main if (layer := stack.layer(name)) is not None), None
        )

    def beyond(self, name: str) -> bool:
        """Whether a tensor is of a layer after the last (DeepSeek's multi-token predictor)."""
        numbers = (
            name[len(stack.prefix) :].partition(".")[0]
            for stack in self.main
            if name.startswith(stack.prefix)
        )
        return self.layer(name) is None and any(number.isdecimal() for number in numbers)

    def at_layer(self, name: str, layer: int) -> str:
        """The same tensor in another layer of its stack."""
        stack = next(stack for stack in self.main if stack.layer(name) is not None)
        return f"{stack.prefix}{layer}.{name[len(stack.prefix) :].partition('.')[2]}"

    @cached_property
    def by_layer(self) -> Mapping[int | None, tuple[str, ...]]:
        """Tensor names per layer, under None those outside. Layers differ: the first may be dense or own a bias table."""
        groups: dict[int | None, list[str]] = defaultdict(list)
        for name in self.names:
            groups[self.layer(name)].append(name)
        return {layer: tuple(group) for layer, group in groups.items()}

    def role(self, name: str) -> str:
        """One of ROLES, in any stack."""
        for segment in self._segments(name):
            if _NORM.search(segment):
                return "other"
            if _ATTENTION.search(segment):
                return "attention"
            if _MLP.search(segment):
                return "mlp"
        return "other"

    def is_embedding(self, name: str) -> bool:
        """Whether a tensor outside the layers comes before them (it takes the parameters of the first slice)."""
        return self.layer(name) is None and bool(_EMBEDDING.search(name)) and not _HEAD.search(name)

    def vocabulary_axis(self, name: str, shape: Sequence[int]) -> int | None:
        """Along which axis a tensor has one entry per token: 0 for embeddings, head and its bias, 1 for BART's (1, vocab)
        bias; None for all others, position embeddings included."""
        ours = self.module(name) in (LANGUAGE, WHOLE) and not any(
            stack.layer(name) is not None for stack in self.stacks
        )
        if (
            not ours
            or _NOT_TOKENS.search(name)
            or not (_EMBEDDING.search(name) or _HEAD.search(name))
        ):
            return None
        sizes = tuple(shape)
        if sizes[:1] == (self.vocab_size,):
            return 0
        return 1 if sizes == (1, self.vocab_size) else None

    def is_vocabulary(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the tensor's rows are tokens."""
        return self.vocabulary_axis(name, shape) == 0

    def stand_in(self, name: str) -> str | None:
        """What this checkpoint has for a tensor of that name: itself; for a tied head or a shared embedding that was not
        written, the input embedding; the name without or with the base model's prefix; None where there is nothing."""
        if name in self._known:
            return name
        head = name.split(".", 1)[0]
        bare = [
            name[len(head) + 1 :],
            f"{self.prefix.split('.', 1)[0]}.{name}",
            name.replace(".decoder.bias", ".bias"),
        ]
        if found := next((other for other in bare if other in self._known), None):
            return found
        return self._input_embedding if _TIED.search(name) else None

    def ties(self, name: str) -> bool:
        """Whether a head of that name is the input embedding here."""
        head = bool(_TIED.search(name)) and not _TOKENS.search(name) and name not in self._known
        return (
            head
            and self._input_embedding is not None
            and self.stand_in(name) == self._input_embedding
        )

    def module(self, name: str) -> str:
        """`default` in a model of one module. In a multimodal one `text_decoder` for the language part (with its
        embeddings, norm and head), and the dotted name's top, without `model.`, for the rest: `visual`, `vision_tower`."""
        if not self.multimodal:
            return WHOLE
        top = _top(name)
        return top if top in self._foreign else LANGUAGE

    @cached_property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """Tensor names per module."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            groups[self.module(name)].append(name)
        return {module: tuple(group) for module, group in groups.items()}

    def find_module(self, alias: str) -> str:
        """The module that a recipe means: its name, or for the language part any of text_decoder, language_model, default."""
        if alias in self.modules:
            return alias
        if alias in (LANGUAGE, WHOLE, "language_model"):
            return LANGUAGE if self.multimodal else WHOLE
        raise CheckpointError(unknown_name("module", alias, self.modules))

    def filters(self, role: str) -> tuple[str, ...]:
        """mergekit filters (substrings of tensor names) that together select `role` and nothing else."""
        ours = [name for name in self.names if self.role(name) == role]
        others = [name for name in self.names if self.role(name) != role]
        clean: dict[str, bool] = {}
        chosen: set[str] = set()
        for name in ours:
            for pattern in self._patterns(name):
                if pattern not in clean:
                    clean[pattern] = not any(pattern in other for other in others)
                if clean[pattern]:
                    chosen.add(pattern)
                    break
        return tuple(sorted(chosen))

    def _segments(self, name: str) -> list[str]:
        """The dotted parts after the layer's number, then the list's own name (XLM has `attentions.3.q_lin`)."""
        stack = next((stack for stack in self.stacks if stack.layer(name) is not None), None)
        if stack is None:
            return []
        return [*name[len(stack.prefix) :].split(".")[1:], stack.prefix.split(".")[-2]]

    def _patterns(self, name: str) -> Iterator[str]:
        """Substrings of a name, the fewest parts first; those with the layer's number after those for all layers."""
        parts = self._segments(name)[:-1]
        number = name.split(".")[-len(parts) - 1]
        for width in range(1, len(parts)):
            yield from (f".{'.'.join(parts[i : i + width])}." for i in range(len(parts) - width))
        yield from (f".{number}.{'.'.join(parts[:width])}." for width in range(1, len(parts)))
        yield name

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _input_embedding(self) -> str | None:
        found = [
            n
            for n in self.by_layer.get(None, ())
            if _TOKENS.search(n) and not _NOT_TOKENS.search(n)
        ]
        found = [n for n in found if self.module(n) in (LANGUAGE, WHOLE)]
        return min(found, key=lambda n: (n.count("."), n), default=None)

    @cached_property
    def _foreign(self) -> frozenset[str]:
        """Tops that are not of the language part."""
        tops = {_top(name) for name in self.names}
        home = {_top(stack.prefix) for stack in self.main}
        if any(
            _LANGUAGE.search(top) for top in home
        ):  # it has a name of its own, so the rest but the head is foreign
            return frozenset(top for top in tops - home if not _HEAD.search(top))
        stacked = {_top(stack.prefix) for stack in self.stacks} - home
        return frozenset(top for top in tops - home if top in stacked or _FOREIGN.search(top))


def _top(name: str) -> str:
    return _WRAPPERS.sub("", name).partition(".")[0]


def _numbered(names: Iterable[str]) -> dict[str, set[int]]:
    """Prefix -> the numbers that follow it; experts are numbered inside layers, only the outermost list counts."""
    numbered: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := re.search(r"(?<=\.)\d+(?=\.)", name):
            numbered[name[: match.start()]].add(int(match.group()))
    return numbered


def _main(deep: Mapping[str, int], names: Sequence[str]) -> tuple[str, ...]:
    """Of the lists that are deep enough, the language's, and those that share its layers or face it."""
    homes = {name[: match.start()] for name in names if (match := _TOKENS.search(name))}
    order = sorted(
        deep,
        key=lambda p: (
            bool(_FOREIGN.search(p)),
            not _LANGUAGE.search(p),
            not _near(p, homes),
            -deep[p],
            len(p),
            p,
        ),
    )
    if not order:
        return ()
    best = order[0]
    swapped = re.sub(
        r"\b(en|de)coder\b", lambda m: "decoder" if m[1] == "en" else "encoder", best, count=1
    )
    if swapped != best and swapped in deep:
        decoder = next(p for p in (best, swapped) if re.search(r"\bdecoder\b", p))
        return (
            tuple(sorted((best, swapped), reverse=True))
            if deep[best] == deep[swapped]
            else (decoder,)
        )
    parent = best.rpartition(".")[0].rpartition(".")[0]
    return (
        best,
        *(
            p
            for p in order[1:]
            if p.rpartition(".")[0].rpartition(".")[0] == parent and deep[p] == deep[best]
        ),
    )


def _near(prefix: str, homes: Set[str]) -> bool:
    """Whether a token embedding sits beside the list: `model.embed_tokens` of `model.layers.`, `bert.embeddings` of BERT's."""
    parent = prefix.rstrip(".").rpartition(".")[0]
    bases = (home.removesuffix("embeddings.") for home in homes if home.endswith(".embeddings."))
    return any(home.startswith(parent) for home in homes) or any(
        prefix.startswith(base) for base in bases
    )
