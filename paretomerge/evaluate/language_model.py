"""The live model as lm-evaluation-harness sees it: prompts are tokenised once a study, shared contexts run once, answers that
are finished leave the batch. What comes back is what the harness's own `hf` model says, request for request; but for a stop
string that is a special token, behind which that one writes on for as long as others in the batch do.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from paretomerge.evaluate.likelihood import Job, Likelihoods
from paretomerge.evaluate.reading import goes_on, grouped
from paretomerge.evaluate.writing import Writer, greedy_alone

Batch = Sequence[Any]


class ResidentLM(HFLM):  # type: ignore[misc]
    """A causal model whose weights change while its requests do not.

    A batch that finds no memory is halved and tried again, and so are those after it.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._room = batch_size
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    def take(self, model: Any) -> None:
        """Another model in place of this one, with the same tokenizer."""
        self._model, self._config = model, model.config

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **more: Any) -> Any:
        """As the harness encodes, kept: requests are the same for every merge."""
        if left_truncate_len or more:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **more)
        key = string, add_special_tokens
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens)
        return self._encoded[key]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy answer) of each continuation, in the order of the requests."""
        work = Likelihoods(self.model, [(context, answer) for _, context, answer in requests], self.max_length, self.softmax_dtype)
        for run, jobs in work.runs:
            for batch in self._batches(jobs):
                self._within_memory(run, batch)
        return work.answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers' texts, up to the first of their stop strings."""
        asked = [(str(request.args[0]), normalize_gen_kwargs(request.args[1], self.max_gen_toks)) for request in requests]
        alone = [greedy_alone(self.model, settings) and self.think_end_token is None for _, settings in asked]
        if not all(alone) or not goes_on(self.model):  # sampling, beams, penalties, states: transformers knows them all
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

    def _write(self, prompts: Sequence[tuple[int, str]], settings: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """Greedy answers to prompts with the same settings."""
        stop = handle_stop_sequences(settings.get("until"), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        longest = self.max_length - settings["max_gen_toks"]
        assert longest > 0, f"expected max_gen_toks below the model's {self.max_length} tokens, got {settings['max_gen_toks']}"
        encoded = [(i, tuple(self.tok_encode(text)[-longest:])) for i, text in prompts]
        writer = Writer(self.model, self.tokenizer, stop, settings["max_gen_toks"])
        for group in grouped([tokens for _, tokens in encoded]):
            for batch in self._batches([encoded[n] for n in group]):
                done: dict[int, list[int]] = {}
                self._within_memory(lambda part, done=done: done.update(writer.answers(part)), batch)  # type: ignore[misc]
                for i, _ in batch:
                    yield i, postprocess_generated_text(self.tok_decode(done[i]), stop, None)

    def _batches(self, jobs: Sequence[Any]) -> Iterator[Batch]:
        """As many rows as fit: after a batch that found no memory, fewer."""
        begin = 0
        while begin < len(jobs):
            end, rows = begin, 0
            while end < len(jobs) and (end == begin or rows + _rows(jobs[end]) <= self._room):
                rows += _rows(jobs[end])
                end += 1
            yield jobs[begin:end]
            begin = end

    def _within_memory(self, run: Callable[[Batch], Any], batch: Batch) -> None:
        """Run a batch; where memory is short, half at a time."""
        try:
            run(batch)
            return
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if len(batch) == 1 or not _out_of_memory(error):
                raise
        half = (len(batch) + 1) // 2
        self._room = min(self._room, half)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._within_memory(run, batch[:half])
        self._within_memory(run, batch[half:])


def _out_of_memory(error: BaseException) -> bool:
    """Whether it tells of memory; on a CPU, torch has no class of error for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error) or "out of memory" in str(error)


def _rows(job: Any) -> int:
    return job.rows if isinstance(job, Job) else 1
