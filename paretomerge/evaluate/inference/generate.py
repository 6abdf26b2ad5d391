"""Greedy answers: rows that are finished leave the batch, so that one long answer does not keep the others waiting."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.inference.memory import Room
from paretomerge.evaluate.inference.prefill import Tokens, grouped, read

_PLAIN = {
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "transformers_version",
        "_from_model_config",
    ),
    *("use_cache", "do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens"),
    *(
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
    ),
}
"""What a generation_config may say without changing what greedy decoding writes."""


def greedy_alone(model: Any, settings: Mapping[str, Any]) -> bool:
    """Whether an answer is the most likely token each time and nothing else, by the request and by the model's own defaults."""
    asked = {key: value for key, value in settings.items() if key not in ("until", "max_gen_toks")}
    plain = not asked.pop("do_sample", False) and not asked.pop("temperature", 0.0)
    return plain and not asked and model.generation_config.to_diff_dict().keys() <= _PLAIN


class Writer:
    """Writes until a stop string (of `stop`), an end token or `most` tokens, for a batch of prompts at a time."""

    def __init__(self, model: Any, tokenizer: Any, stop: Sequence[str], most: int) -> None:
        self._model, self._tokenizer, self._most = model, tokenizer, most
        self._stop = [text for text in stop if text]
        self._tail = (
            max((len(text.encode()) for text in self._stop), default=0) + 1
        )  # tokens that surely cover a stop string
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def all_answers(
        self, prompts: Sequence[tuple[int, Tokens]], room: Room
    ) -> dict[int, list[int]]:
        """`answers`, batch by batch: what begins alike together, the longest first."""
        written: dict[int, list[int]] = {}
        for group in grouped([tokens for _, tokens in prompts]):
            room.run(lambda batch: written.update(self.answers(batch)), [prompts[i] for i in group])
        return written

    @torch.no_grad()
    def answers(self, prompts: Sequence[tuple[int, Tokens]]) -> dict[int, list[int]]:
        """Number of a prompt -> the tokens written."""
        reading = read(self._model, [tokens for _, tokens in prompts], self._most)
        logits, cache, mask = reading.logits, reading.cache, reading.mask
        written: dict[int, list[int]] = {number: [] for number, _ in prompts}
        live = [
            number for number, _ in prompts
        ]  # the rows of the batch; one that is finished may stay in it for a while
        open_rows = set(live)
        for _ in range(self._most):
            best, token = logits[:, -1].max(-1)
            if best.isnan().any():
                raise EvaluationError("expected logits, got NaN: the merged weights overflow")
            for number, found in zip(live, token.tolist(), strict=True):
                if number in open_rows:
                    written[number].append(found)
            open_rows -= self._finished({number: written[number] for number in open_rows})
            if not open_rows:
                break
            if 2 * len(open_rows) <= len(live):
                kept = torch.tensor(
                    [row for row, number in enumerate(live) if number in open_rows],
                    device=mask.device,
                )
                cache.batch_select_indices(kept)
                token, mask, live = (
                    token[kept],
                    mask[kept],
                    [number for number in live if number in open_rows],
                )
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
            position = mask.sum(1, keepdim=True) - 1
            state = self._model(
                token[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits, cache = state.logits, state.past_key_values
        return written

    def _finished(self, written: Mapping[int, Sequence[int]]) -> set[int]:
        """Numbers of the answers that end with an end token or hold a stop string."""
        ended = {number for number, tokens in written.items() if tokens[-1] in self._ends}
        if not self._stop:
            return ended
        tails = self._tokenizer.batch_decode([tokens[-self._tail :] for tokens in written.values()])
        return ended | {
            number
            for number, tail in zip(written, tails, strict=True)
            if any(text in tail for text in self._stop)
        }
