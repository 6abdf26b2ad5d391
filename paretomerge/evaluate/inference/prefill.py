"""Prompts read side by side; what all of them begin with, such as the examples of a few-shot task, is read once."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache

from paretomerge.evaluate.inference.padding import padded_left

Tokens = tuple[int, ...]
_WORTH = 2 / 3  # of the tokens: a second forward pass has a price of its own
_LEAST = 4  # rows that make a group of their own


@dataclass(frozen=True)
class Reading:
    """What a model has read. logits: of each row's last position, `(rows, 1, vocabulary)` (or more positions before it). cache: keys
    and values; mask: which of its places are tokens, `(rows, places)`.
    """

    logits: torch.Tensor
    cache: Any
    mask: torch.Tensor


def goes_on(model: Any) -> bool:
    """Whether a model can go on from its cache, row by row at positions of their own."""
    if getattr(model, "_is_stateful", False) or not {"position_ids", "past_key_values"} <= _accepts(
        model
    ):
        return False
    return all(
        hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=model.config).layers
    )  # not of convolutions


def last_alone(model: Any, positions: int = 1) -> dict[str, int]:
    """The argument that has only the last positions carried to the vocabulary, where the model knows it."""
    return {"logits_to_keep": positions} if "logits_to_keep" in _accepts(model) else {}


def read(model: Any, rows: Sequence[Tokens], ahead: int) -> Reading:
    """Read `rows`, padded on the left behind what they all begin with. ahead: tokens that are going to follow at most."""
    head = common([(row, len(row) - 1) for row in rows])
    window = _window(model)
    if window is not None and max(map(len, rows)) + ahead > window:
        head = ()  # windows count places: padding between the head and a row would push the head out of sight too early
    ids, mask, places = padded_left([row[len(head) :] for row in rows], model.device)
    cache = repeated(model, head, len(rows)) if head else None
    mask = torch.cat([mask.new_ones(len(rows), len(head)), mask], 1)
    more = last_alone(model)
    state = model(
        ids,
        attention_mask=mask,
        position_ids=places + len(head),
        past_key_values=cache,
        use_cache=True,
        **more,
    )
    return Reading(state.logits, state.past_key_values, mask)


def repeated(model: Any, head: Tokens, rows: int) -> Any:
    """The cache of `head`, read once, for so many rows."""
    cache = model(
        torch.tensor([head], device=model.device), use_cache=True, **last_alone(model)
    ).past_key_values
    cache.batch_select_indices(torch.zeros(rows, dtype=torch.long, device=model.device))
    return cache


def common(rows: Sequence[tuple[Tokens, int]]) -> Tokens:
    """What `rows` all begin with, each at most as far as the number beside it; nothing where that saves too little."""
    first, *rest = (tokens for tokens, _ in rows)
    most = min(end for _, end in rows)
    length = min((_alike(first[:most], other) for other in rest), default=0)
    tokens = sum(len(row) for row, _ in rows)
    return first[:length] if tokens - (len(rows) - 1) * length <= _WORTH * tokens else ()


def grouped(prompts: Sequence[Tokens]) -> list[list[int]]:
    """Numbers of the prompts in groups that are to be read together: those that share at least half of the longest of them, and one
    of all others; the longest first, so that memory runs out at once or never.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    groups: list[list[int]] = []
    head: Tokens = ()
    longest = 0
    for i in order:
        shared, longer = _alike(head, prompts[i]), max(longest, len(prompts[i]))
        if groups and 2 * shared >= longer:
            groups[-1].append(i)
            head, longest = head[:shared], longer
        else:
            groups.append([i])
            head, longest = prompts[i], len(prompts[i])
    alone = [i for group in groups if len(group) < _LEAST for i in group]
    together = [
        sorted(g, key=lambda i: (-len(prompts[i]), prompts[i]))
        for g in (alone, *(g for g in groups if len(g) >= _LEAST))
        if g
    ]
    return sorted(together, key=lambda g: (-len(prompts[g[0]]), prompts[g[0]]))


def _alike(one: Tokens, other: Tokens) -> int:
    """Tokens that both begin with."""
    if one == other[: len(one)]:
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _accepts(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _window(model: Any) -> int | None:
    """Places that the shortest attention window sees, if there is any."""
    config = model.config.get_text_config()
    known = [
        getattr(config, name, None)
        for name in ("sliding_window", "attention_chunk_size", "window_size")
    ]
    return min((w for w in known if isinstance(w, int) and w > 0), default=None)
