"""Read prompts side by side, and their shared prefix only once.

The few-shot examples of a task are such a shared prefix: its keys and values are computed for one
row and repeated for all others.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from paretomerge.evaluate.inference._transformers import is_stateful
from paretomerge.evaluate.inference.batching import Tokens, pad_left

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_MAX_TOKEN_SHARE = 2 / 3
_MIN_GROUP = 4  # prompts; smaller groups are joined
_WINDOW_SETTINGS = ("sliding_window", "attention_chunk_size", "window_size")


@dataclass(frozen=True)
class PrefillOutput:
    """What a model computed from some prompts.

    Attributes:
        logits: Of each row's last position, `(rows, 1, vocabulary)`; models that cannot restrict
            them return more positions before it.
        cache: Keys and values of all positions.
        mask: Which positions of the cache are tokens, `(rows, positions)`; the others are padding.
    """

    logits: Tensor
    cache: "Cache"
    mask: Tensor


def supports_cache(model: "PreTrainedModel") -> bool:
    """Whether a model can continue from a key-value cache whose rows have different lengths."""
    needed = {"position_ids", "past_key_values"}
    takes_cache = needed <= _forward_parameters(model)
    if is_stateful(model) or not takes_cache:
        return False
    # layers of convolutions and linear attention cannot select rows of their cache
    layers = DynamicCache(config=model.config).layers
    return all(hasattr(layer, "batch_select_indices") for layer in layers)


def depends_on_prompt(model: "PreTrainedModel") -> bool:
    """Whether a model's weights depend on the prompt, as those of `systems.twin` do.

    Such a model reads each prompt as a whole and apart from what follows it, and its cache carries
    the prompt's weights.
    """
    return bool(getattr(model, "weights_depend_on_prompt", False))


def is_second_pass_worthwhile(n_tokens: int, n_tokens_in_one_pass: int) -> bool:
    """Whether reading a shared part in a pass of its own saves a third of the tokens or more."""
    # a second forward pass has a cost of its own
    return n_tokens <= _MAX_TOKEN_SHARE * n_tokens_in_one_pass


def keep_last_logits(model: "PreTrainedModel", positions: int = 1) -> dict[str, int]:
    """Arguments of `forward` that compute logits of the last positions only, where it has them."""
    if "logits_to_keep" in _forward_parameters(model):
        return {"logits_to_keep": positions}
    return {}


def prefill(
    model: "PreTrainedModel", prompts: Sequence[Tokens], max_new_tokens: int
) -> PrefillOutput:
    """Read prompts in one batch, padded on the left, behind their shared prefix.

    Args:
        model: A model that `supports_cache`.
        prompts: Token ids, at least one per prompt.
        max_new_tokens: How many tokens will be appended to a prompt at most.

    Returns:
        Logits, cache and mask; a row for each prompt.
    """
    # the last token of each prompt is read in its own row, which gives its logits
    lengths = [len(prompt) for prompt in prompts]
    ends = [length - 1 for length in lengths]
    prefix = shared_prefix(prompts, ends)
    window = _attention_window(model)
    longest_prompt = max(lengths)
    longest = longest_prompt + max_new_tokens
    if window is not None and longest > window:
        # windows count positions, padding included: padding between the prefix and a prompt's
        # rest would push the prefix out of the window too early
        prefix = ()
    if depends_on_prompt(model):
        prefix = ()
    n_rows = len(prompts)
    start = len(prefix)
    rests = [prompt[start:] for prompt in prompts]
    ids, mask, positions = pad_left(rests, model.device)
    cache = None
    if prefix:
        cache = prefill_shared_prefix(model, prefix, n_rows)
    prefix_mask = mask.new_ones(n_rows, start)
    mask = torch.cat([prefix_mask, mask], 1)
    output = model(
        ids,
        attention_mask=mask,
        position_ids=positions + start,
        past_key_values=cache,
        use_cache=True,
        **keep_last_logits(model),
    )
    return PrefillOutput(output.logits, output.past_key_values, mask)


def prefill_shared_prefix(
    model: "PreTrainedModel", prefix: Tokens, rows: int
) -> "Cache":
    """Read a prefix once, and repeat its cache for each row."""
    ids = torch.tensor([prefix], device=model.device)
    # the logits are not used, so as few as possible are computed
    output = model(ids, use_cache=True, **keep_last_logits(model))
    cache = output.past_key_values
    first_row = torch.zeros(rows, dtype=torch.long, device=model.device)
    cache.batch_select_indices(first_row)
    return cache


def shared_prefix(rows: Sequence[Tokens], ends: Sequence[int]) -> Tokens:
    """The prefix that all rows share, if reading it once saves enough.

    Args:
        rows: Token ids of each row.
        ends: How many of each row's tokens may belong to the prefix.

    Returns:
        The prefix; empty where a second forward pass would not pay.
    """
    first, *others = rows
    candidate = first[: min(ends)]
    lengths = [_common_length(candidate, other) for other in others]
    # a single row shares nothing
    length = min(lengths, default=0)
    n_tokens = sum(len(row) for row in rows)
    # it is read for the first row only
    n_saved = len(others) * length
    n_read = n_tokens - n_saved
    if is_second_pass_worthwhile(n_read, n_tokens):
        return first[:length]
    return ()


def group_by_prefix(prompts: Sequence[Tokens]) -> list[list[int]]:
    """Group prompts that should be read together.

    The prompts of a group share at least half of its longest one. Groups of fewer than four are
    joined into one.

    Args:
        prompts: Token ids.

    Returns:
        Indices of each group's prompts. The longest prompt comes first in each group, and the group
        with the longest first, so that memory runs out at once or never.
    """
    # in sorted order, prompts with a common prefix are neighbours
    indices = range(len(prompts))
    order = sorted(indices, key=prompts.__getitem__)
    groups: list[list[int]] = []
    prefix: Tokens = ()
    longest = 0
    for i in order:
        prompt = prompts[i]
        common = _common_length(prefix, prompt)
        longest_with_prompt = max(longest, len(prompt))
        if groups and 2 * common >= longest_with_prompt:
            groups[-1].append(i)
            prefix = prefix[:common]
            longest = longest_with_prompt
        else:
            groups.append([i])
            prefix = prompt
            longest = len(prompt)

    return _longest_first(_join_small(groups), prompts)


def join_groups(
    groups: Sequence[Sequence[int]],
    prompts: Sequence[Tokens],
    max_rows: int,
    batch_cost: int,
) -> list[list[int]]:
    """Join groups whose prompts share less than their batches cost.

    Answers are written a token at a time, and a step of few rows costs almost as much as one of
    many. So a group of a few prompts is better read with its neighbours.

    Args:
        groups: Indices of each group's prompts, as `group_by_prefix` returns them.
        prompts: Token ids.
        max_rows: The most rows of a batch.
        batch_cost: What one more batch costs, in tokens that are read.

    Returns:
        Fewer groups; in each, the longest prompt comes first.
    """
    # In sorted order, the groups with the longest common prefix are neighbours.
    joined = sorted(
        (_PromptGroup.of(group, prompts) for group in groups),
        key=lambda group: group.first,
    )

    def gain(i: int) -> int:
        """Tokens that are saved where a group is joined with the next one."""
        left, right = joined[i], joined[i + 1]
        both = left.join(right)
        batches = left.n_batches(max_rows) + right.n_batches(max_rows)
        batches_saved = batches - both.n_batches(max_rows)
        more_read = both.n_read - left.n_read - right.n_read
        return batches_saved * batch_cost - more_read

    gains = [gain(i) for i in range(len(joined) - 1)]
    while gains and max(gains) > 0:
        best = gains.index(max(gains))
        joined[best : best + 2] = [joined[best].join(joined[best + 1])]
        del gains[best]
        # Only the gains beside the new group have changed.
        for i in (best - 1, best):
            if 0 <= i < len(gains):
                gains[i] = gain(i)
    return _longest_first([group.indices for group in joined], prompts)


@dataclass(frozen=True)
class _PromptGroup:
    """Prompts that are read behind the prefix that all of them share.

    Attributes:
        indices: Of its prompts.
        n_tokens: Of all its prompts.
        first: The first prompt in sorted order.
        last: The last one. What the two have in common, all between them have.
    """

    indices: list[int]
    n_tokens: int
    first: Tokens
    last: Tokens

    @classmethod
    def of(cls, indices: Sequence[int], prompts: Sequence[Tokens]) -> "_PromptGroup":
        members = [prompts[i] for i in indices]
        n_tokens = sum(len(prompt) for prompt in members)
        return cls(list(indices), n_tokens, min(members), max(members))

    def join(self, other: "_PromptGroup") -> "_PromptGroup":
        return _PromptGroup(
            self.indices + other.indices,
            self.n_tokens + other.n_tokens,
            min(self.first, other.first),
            max(self.last, other.last),
        )

    def n_batches(self, max_rows: int) -> int:
        return math.ceil(len(self.indices) / max_rows)

    @property
    def n_read(self) -> int:
        """Tokens that are read, the shared prefix once."""
        n_repeats = len(self.indices) - 1
        return self.n_tokens - n_repeats * _common_length(self.first, self.last)


def _longest_first(
    groups: Sequence[Sequence[int]], prompts: Sequence[Tokens]
) -> list[list[int]]:
    """Groups and their prompts, the longest first."""

    def key(i: int) -> tuple[int, Tokens]:
        # and by tokens, so that the groups do not depend on the order of the requests
        return -len(prompts[i]), prompts[i]

    by_length = [sorted(group, key=key) for group in groups]
    return sorted(by_length, key=lambda group: key(group[0]))


def _join_small(groups: Sequence[list[int]]) -> list[list[int]]:
    """All small groups as one, then the others."""
    small: list[int] = []
    large = []
    for group in groups:
        if len(group) < _MIN_GROUP:
            small += group
        else:
            large.append(group)
    if small:
        return [small, *large]
    return large


def _common_length(one: Tokens, other: Tokens) -> int:
    """The number of tokens that both begin with."""
    # comparing whole slices is much faster than a loop, and most prefixes match whole
    length = len(one)
    if one == other[:length]:
        return length
    length = 0
    for token, other_token in zip(one, other, strict=False):
        if token != other_token:
            break
        length += 1
    return length


def _forward_parameters(model: "PreTrainedModel") -> set[str]:
    signature = inspect.signature(model.forward)
    return set(signature.parameters)


def _attention_window(model: "PreTrainedModel") -> int | None:
    """Positions that the shortest attention window covers; None without windows."""
    config = model.config.get_text_config()
    windows = []
    for name in _WINDOW_SETTINGS:
        size = getattr(config, name, None)
        # a setting that is None or not positive means that there is no window
        if isinstance(size, int) and size > 0:
            windows.append(size)
    return min(windows, default=None)
