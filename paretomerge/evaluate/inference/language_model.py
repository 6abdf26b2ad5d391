"""The live model as lm-evaluation-harness sees it: prompts are tokenised once a study, shared contexts run once, answers that
are finished leave the batch. What comes back is what the harness's own `hf` model says, request for request; but for a stop
string that is a special token, behind which that one writes on for as long as others in the batch do.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from paretomerge.evaluate.inference.generate import Writer, greedy_alone
from paretomerge.evaluate.inference.likelihood import Likelihoods
from paretomerge.evaluate.inference.memory import Room
from paretomerge.evaluate.inference.prefill import goes_on


class ResidentLM(HFLM):  # type: ignore[misc]
    """A causal model whose weights change while its requests do not.

    A batch that finds no memory is halved and tried again, and so are those after it.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._room = Room(batch_size)
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    def take(self, model: Any) -> None:
        """Another model in place of this one, with the same tokenizer."""
        self._model, self._config = model, model.config

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **more: Any,
    ) -> Any:
        """As the harness encodes, kept: requests are the same for every merge."""
        if left_truncate_len or more:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **more)
        key = string, add_special_tokens
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens)
        return self._encoded[key]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy answer) of each continuation, in the order of the requests."""
        work = Likelihoods(
            self.model,
            [(context, answer) for _, context, answer in requests],
            self.max_length,
            self.softmax_dtype,
        )
        for run, jobs in work.runs:
            self._room.run(run, jobs, lambda job: job.rows)
        return work.answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers' texts, up to the first of their stop strings."""
        asked = [
            (str(request.args[0]), normalize_gen_kwargs(request.args[1], self.max_gen_toks))
            for request in requests
        ]
        alone = [
            greedy_alone(self.model, settings) and self.think_end_token is None
            for _, settings in asked
        ]
        if not all(alone) or not goes_on(
            self.model
        ):  # sampling, beams, penalties, states: transformers knows them all
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
            return answers
        groups: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(asked):
            groups.setdefault(repr(sorted(settings.items())), []).append(i)
        written = [""] * len(asked)
        for members in groups.values():
            for i, text in self._write([(i, asked[i][0]) for i in members], asked[members[0]][1]):
                written[i] = text
        return written

    def _write(
        self, prompts: Sequence[tuple[int, str]], settings: Mapping[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """Greedy answers to prompts with the same settings."""
        stop = handle_stop_sequences(
            settings.get("until"), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        longest = self.max_length - settings["max_gen_toks"]
        assert longest > 0, (
            f"expected max_gen_toks below the model's {self.max_length} tokens, got {settings['max_gen_toks']}"
        )
        encoded = [(i, tuple(self.tok_encode(text)[-longest:])) for i, text in prompts]
        writer = Writer(self.model, self.tokenizer, stop, settings["max_gen_toks"])
        for i, tokens in writer.all_answers(encoded, self._room).items():
            yield i, postprocess_generated_text(self.tok_decode(tokens), stop, None)
