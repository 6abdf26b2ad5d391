"""Greedy generation for a batch of prompts.

Finished rows leave the batch, so that one long answer does not hold up the others.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.inference._transformers import GENERATION_CONFIG_METADATA
from paretomerge.evaluate.inference.batching import AdaptiveBatcher, Tokens
from paretomerge.evaluate.inference.prefill import (
    group_by_prefix,
    join_groups,
    prefill,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NumberedPrompt = tuple[int, Tokens]
"""A number that identifies the prompt, and its tokens."""

Generated = dict[int, list[int]]
"""Number of the prompt -> the tokens written."""

_STEP_COST = 16
"""What a step costs beside its rows, in tokens that are read: weights have to be fetched."""

# what a generation_config may contain without changing what greedy decoding writes
_HARMLESS_DEFAULTS = {
    *GENERATION_CONFIG_METADATA,
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "use_cache",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
}


def is_plain_greedy(model: "PreTrainedModel", settings: Mapping[str, object]) -> bool:
    """Whether generation takes the most likely token each time and does nothing else.

    Args:
        model: Its `generation_config` has the default settings.
        settings: The request's generation settings, as lm-evaluation-harness normalises them.

    Returns:
        False where there are beams, sampling, penalties and the like: `transformers` does those.
    """
    ignored = ("until", "max_gen_toks", "do_sample", "temperature")
    others = settings.keys() - set(ignored)
    # a temperature asks for sampling, whatever do_sample says
    samples = settings.get("do_sample", False)
    if samples or settings.get("temperature", 0.0):
        return False
    defaults = model.generation_config.to_diff_dict()
    return not others and defaults.keys() <= _HARMLESS_DEFAULTS


class GreedyGenerator:
    """Writes until a stop string, an end-of-sequence token or a number of tokens.

    Args:
        model: A model that `supports_cache`.
        tokenizer: Decodes tokens to find stop strings; unused without them.
        stop: Stop strings.
        max_new_tokens: The most tokens of an answer.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None",
        stop: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._stop = [text for text in stop if text]
        # a token has at least one byte, so that as many tokens as bytes cover a stop string
        lengths = [len(text.encode()) for text in self._stop]
        self._tail = max(lengths, default=0) + 1
        # transformers allows no end token, one, or a list of them
        end_tokens = model.generation_config.eos_token_id
        if end_tokens is None:
            end_tokens = []
        elif isinstance(end_tokens, int):
            end_tokens = [end_tokens]
        self._end_tokens = set(end_tokens)

    def generate_in_batches(
        self, prompts: Sequence[NumberedPrompt], batcher: AdaptiveBatcher
    ) -> Generated:
        """Answer any number of prompts, batch by batch.

        Args:
            prompts: Numbered prompts. Those with a common prefix are read together.
            batcher: Cuts them into batches.

        Returns:
            Number of the prompt -> the tokens written.

        Raises:
            EvaluationError: The model's logits are NaN.
        """
        generated: Generated = {}

        def process(batch: Sequence[NumberedPrompt]) -> None:
            generated.update(self.generate(batch))

        token_ids = [tokens for _, tokens in prompts]
        batch_cost = _STEP_COST * self._max_new_tokens // 2
        groups = group_by_prefix(token_ids)
        for group in join_groups(groups, token_ids, batcher.max_rows, batch_cost):
            members = [prompts[i] for i in group]
            batcher.run(process, members)
        return generated

    @torch.no_grad()
    def generate(self, prompts: Sequence[NumberedPrompt]) -> Generated:
        """Answer prompts in one batch; see `generate_in_batches`."""
        token_ids = [tokens for _, tokens in prompts]
        output = prefill(self._model, token_ids, self._max_new_tokens)
        logits = output.logits
        cache = output.cache
        mask = output.mask
        rows = [number for number, _ in prompts]  # the prompt in each row of the batch
        generated: Generated = {number: [] for number in rows}
        unfinished = set(rows)
        for _ in range(self._max_new_tokens):
            last_logits = logits[:, -1]
            best, next_tokens = last_logits.max(-1)
            if best.isnan().any():
                raise EvaluationError("logits are NaN: the merged weights overflow")
            for number, token in zip(rows, next_tokens.tolist(), strict=True):
                if number in unfinished:
                    generated[number].append(token)
            answers = {number: generated[number] for number in unfinished}
            unfinished -= self._finished(answers)
            if not unfinished:
                break
            # selecting rows copies the cache, which pays once a quarter of them are finished
            if 4 * len(unfinished) <= 3 * len(rows):
                kept = []
                for row, number in enumerate(rows):
                    if number in unfinished:
                        kept.append(row)
                index = torch.tensor(kept, device=mask.device)
                cache.batch_select_indices(index)
                next_tokens = next_tokens[index]
                mask = mask[index]
                rows = [rows[row] for row in kept]
            next_mask = mask.new_ones(len(rows), 1)
            mask = torch.cat([mask, next_mask], 1)
            # the position of a token is the number of tokens before it, without padding
            positions = mask.sum(1, keepdim=True) - 1
            step = self._model(
                next_tokens[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = step.logits
            cache = step.past_key_values
        return generated

    def _finished(self, generated: Generated) -> set[int]:
        """Numbers of the answers that end with an end token or contain a stop string."""
        finished = set()
        for number, tokens in generated.items():
            last = tokens[-1]
            if last in self._end_tokens:
                finished.add(number)
        if not self._stop:
            return finished
        assert self._tokenizer is not None, "stop strings need a tokenizer"
        # only the last tokens, since earlier ones were searched in earlier steps
        tails = [tokens[-self._tail :] for tokens in generated.values()]
        texts = self._tokenizer.batch_decode(tails)
        for number, text in zip(generated, texts, strict=True):
            if any(stop in text for stop in self._stop):
                finished.add(number)
        return finished
