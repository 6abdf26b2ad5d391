"""The engine as lm-evaluation-harness sees it.

Prompts are tokenised here, with the candidate's tokenizer, and sent as token ids. Prompts that are
too long are cut, and answers end, as in the harness's own model type `vllm`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.backend import ModelOptions
from paretomerge.evaluate.inference.bos_setting import with_bos_setting

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

LogLikelihood: TypeAlias = tuple[float, bool]
"""Of an answer, and whether it is the most likely one."""

Request: TypeAlias = tuple[object, list[int], list[int]]
"""A key of the harness's, and the tokens of a context and of its continuation."""

_DEFAULT_MAX_NEW_TOKENS = 256  # as in the harness

# vLLM holds two log-probabilities for each token of a call, as Python objects.
_MAX_TOKENS_OF_CALL = 2**18


class EngineLM(TemplateLM):  # type: ignore[misc]
    """A causal language model in another process.

    Args:
        tokenizer: The candidate's tokenizer.
        options: How text goes into the model and comes out of it.
        call: Calls a method of `worker.Engine`.

    Attributes:
        given_tokenizer: The tokenizer that was given. The options may need another one.
        max_length: The most tokens of a sequence in the engine; to be set before requests.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        options: ModelOptions,
        call: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.given_tokenizer = tokenizer
        self.max_length = 0
        self._add_bos_token = options.add_bos_token
        if options.add_bos_token is not None:
            tokenizer = with_bos_setting(tokenizer, options.add_bos_token)
        self.tokenizer = tokenizer
        self._think_end = _think_end(tokenizer, options.think_end_token)
        self._call = call
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int | None:
        """The token that an empty context is replaced by."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Tokenize as the harness does, and remember the result: all merges get the same requests.

        Args:
            string: The text.
            add_special_tokens: Whether special tokens are added; by default as the options say,
                but never before a text that begins with the token that begins a sequence.
            **kwargs: Not used.

        Returns:
            Token ids.
        """
        key = string, add_special_tokens
        if key not in self._encoded:
            self._encoded[key] = self._encode(string, add_special_tokens)
        return self._encoded[key]

    def _encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        if not text:
            return []
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            prefix = self.prefix_token_id
            if prefix is not None:
                begin = self.tokenizer.decode(prefix)
                if has_bos_prefix(text, begin):
                    add_special_tokens = False
        tokens: list[int]
        if add_special_tokens is None:
            tokens = self.tokenizer.encode(text)
        else:
            tokens = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return tokens

    def loglikelihood_rolling(
        self, requests: "Sequence[Instance]", disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows where they are long.

        Args:
            requests: Their argument is a text.
            disable_tqdm: Ignored; there is never a progress bar.

        Returns:
            A log-likelihood for each request.
        """
        windows: list[Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                # the most that likelihoods read, and a token of context
                max_seq_len=self.max_length - 2,
                context_len=1,
            )
            of_text = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += of_text
            counts.append(len(of_text))
        values = iter(self._loglikelihood_tokens(windows))
        totals = []
        for count in counts:
            total = sum(next(values)[0] for _ in range(count))
            totals.append(total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: object
    ) -> list[LogLikelihood]:
        # vLLM writes at least one token, which needs a place
        max_tokens = self.max_length - 1
        prompts = []
        starts = []
        for _, context, continuation in requests:
            tokens = context + continuation
            n_cut = max(len(tokens) - max_tokens, 0)
            prompts.append(tokens[n_cut:])
            # the first token has no log-probability
            starts.append(max(len(context) - n_cut, 1))
        answers: list[LogLikelihood] = [(0.0, False)] * len(requests)
        for indices in _calls(prompts):
            computed = self._call(
                "log_likelihoods",
                prompts=[prompts[i] for i in indices],
                starts=[starts[i] for i in indices],
            )
            for i, (log_probabilities, is_greedy) in zip(
                indices, computed, strict=True
            ):
                total = math.fsum(log_probabilities)
                if math.isnan(total):
                    raise EvaluationError("logits are NaN: the merged weights overflow")
                answers[i] = total, is_greedy
        return answers

    def generate_until(
        self, requests: "Sequence[Instance]", disable_tqdm: bool = False
    ) -> list[str]:
        """The generated texts, each up to the first of its stop strings.

        Args:
            requests: Their arguments are a prompt and generation settings.
            disable_tqdm: Ignored; there is never a progress bar.

        Returns:
            A text for each request.

        Raises:
            EvaluationError: vLLM does not know one of the settings, or an answer may be longer
                than a sequence.
        """
        end = self._end_text()
        prompts = []
        settings = []
        stops = []
        for request in requests:
            text, given = request.args
            setting, stop = _sampling(given, end)
            max_prompt = self.max_length - setting["max_tokens"]
            if max_prompt <= 0:
                raise EvaluationError(
                    f"max_gen_toks must be below the {self.max_length} tokens that the engine "
                    f"reads and writes, got {setting['max_tokens']}"
                )
            # Stop strings may be among a model's thoughts, and count behind them only.
            while_writing = [end] if self._think_end else stop
            setting["stop"] = [string for string in while_writing if string]
            # the end of a prompt that is too long
            prompts.append(self.tok_encode(text)[-max_prompt:])
            settings.append(setting)
            stops.append(stop)
        generated = [""] * len(requests)
        for indices in _calls(prompts):
            texts = self._call(
                "generate",
                prompts=[prompts[i] for i in indices],
                settings=[settings[i] for i in indices],
            )
            for i, text in zip(indices, texts, strict=True):
                generated[i] = postprocess_generated_text(
                    text, stops[i], self._think_end
                )
        return generated

    def _end_text(self) -> str:
        if self.eot_token_id is None:
            return ""
        text: str = self.tokenizer.decode(self.eot_token_id)
        return text or self.tokenizer.eos_token or ""


def _sampling(given: Mapping[str, Any], end: str) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `vllm.SamplingParams`, and the stop strings, from a task's settings."""
    settings: dict[str, Any] = dict(
        normalize_gen_kwargs(dict(given), _DEFAULT_MAX_NEW_TOKENS)
    )
    stop = handle_stop_sequences(settings.pop("until"), eos=end)
    max_tokens = int(settings.pop("max_gen_toks"))
    if not settings.pop("do_sample"):
        # vLLM samples by default.
        settings["temperature"] = 0.0
    # transformers' defaults, where they are not vLLM's
    written = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    return {**written, **settings, "max_tokens": max_tokens}, stop


def _think_end(
    tokenizer: "PreTrainedTokenizerBase", token: str | int | None
) -> str | None:
    """The text behind which a model's answer begins."""
    if isinstance(token, int):
        text: str = tokenizer.decode([token])
        return text
    return token


def _calls(prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    """Indices of the prompts of each call, the longest prompts first."""
    # so that memory runs out at once or never
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    indices: list[int] = []
    n_tokens = 0
    for i in order:
        if indices and n_tokens + len(prompts[i]) > _MAX_TOKENS_OF_CALL:
            yield indices
            indices = []
            n_tokens = 0
        indices.append(i)
        n_tokens += len(prompts[i])
    if indices:
        yield indices
