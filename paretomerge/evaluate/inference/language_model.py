"""The live model as lm-evaluation-harness sees it.

Prompts are tokenized once per study, shared contexts are read once, and finished answers leave the
batch. The responses are those of the harness's own `hf` model, request for request, with one
exception: after a stop string that is a special token, `hf` continues to write while other rows of
the batch do.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from paretomerge.evaluate.backend import DEFAULT_OPTIONS, ModelOptions
from paretomerge.evaluate.inference._hflm import ReplaceableHFLM
from paretomerge.evaluate.inference.batching import AdaptiveBatcher
from paretomerge.evaluate.inference.bos_setting import with_bos_setting
from paretomerge.evaluate.inference.generate import GreedyGenerator, is_plain_greedy
from paretomerge.evaluate.inference.likelihood import (
    LogLikelihood,
    LogLikelihoods,
    Request,
)
from paretomerge.evaluate.inference.prefill import supports_cache

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GenerationSettings = Mapping[str, object]

EncodingKey = tuple[str, bool | None]
"""A text, and whether special tokens are added; None for the tokenizer's default."""


class ResidentLM(ReplaceableHFLM):
    """A causal language model whose weights change while its requests stay the same.

    A batch that runs out of memory is halved and tried again, and later batches are as small.

    Args:
        model: The model; `set_model` replaces it.
        tokenizer: Its tokenizer.
        batch_size: Rows of a forward pass.
        options: How text goes into the model and comes out of it.

    Attributes:
        given_tokenizer: The tokenizer that was given. The options may need another one.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int,
        options: ModelOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.given_tokenizer = tokenizer
        if options.add_bos_token is not None:
            tokenizer = with_bos_setting(tokenizer, options.add_bos_token)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            **options.arguments,
        )
        self._batcher = AdaptiveBatcher(batch_size)
        self._encoded: dict[EncodingKey, list[int]] = {}

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: object,
    ) -> list[int]:
        """Tokenize as `HFLM` does, and remember the result: all merges get the same requests."""
        if left_truncate_len or options:
            uncached: list[int] = super().tok_encode(
                string, add_special_tokens, left_truncate_len, **options
            )
            return uncached
        key = string, add_special_tokens
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens)
        return self._encoded[key]

    def token_log_likelihoods(self, requests: Sequence[Request]) -> list[LogLikelihood]:
        """Log-likelihood of each (context, continuation), in the order of the requests."""
        dtype = self.softmax_dtype
        work = LogLikelihoods(self.model, requests, self.max_length, dtype)
        return work.run(self._batcher)

    def generate_until(
        self, requests: Sequence["Instance"], disable_tqdm: bool = False
    ) -> list[str]:
        """The generated texts, each up to the first of its stop strings.

        Args:
            requests: Their arguments are a prompt and generation settings.
            disable_tqdm: Ignored; there is never a progress bar.

        Returns:
            A text for each request.
        """
        prompts = [str(request.args[0]) for request in requests]
        settings = []
        for request in requests:
            setting = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            settings.append(setting)
        if not self._generates_itself(settings):
            texts: list[str] = super().generate_until(requests, disable_tqdm=True)
            return texts
        groups: dict[str, list[int]] = {}
        for i, setting in enumerate(settings):
            # settings hold lists of stop strings, which cannot be keys themselves
            key = repr(sorted(setting.items()))
            members = groups.setdefault(key, [])
            members.append(i)
        generated = [""] * len(requests)
        for members in groups.values():
            group = [prompts[i] for i in members]
            common_settings = settings[members[0]]
            texts = self._generate(group, common_settings)
            for i, text in zip(members, texts, strict=True):
                generated[i] = text
        return generated

    def _generates_itself(self, settings: Sequence[GenerationSettings]) -> bool:
        """Whether `GreedyGenerator` can do it; transformers does sampling, beams and penalties."""
        if self.think_end_token is not None or self.backend == "seq2seq":
            return False
        if not all(is_plain_greedy(self.model, setting) for setting in settings):
            return False
        return supports_cache(self.model)

    def _generate(
        self, prompts: Sequence[str], settings: GenerationSettings
    ) -> list[str]:
        """Greedy answers to prompts with the same settings."""
        max_new_tokens = settings["max_gen_toks"]
        assert isinstance(max_new_tokens, int)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(settings.get("until"), eos=end)
        max_prompt = self.max_length - max_new_tokens
        assert max_prompt > 0, (
            f"max_gen_toks must be below the model's {self.max_length} tokens, got {max_new_tokens}"
        )
        encoded = []
        for i, prompt in enumerate(prompts):
            tokens = self.tok_encode(prompt)
            # the end of a prompt that is too long, as the harness does
            truncated = tuple(tokens[-max_prompt:])
            encoded.append((i, truncated))
        generator = GreedyGenerator(self.model, self.tokenizer, stop, max_new_tokens)
        generated = generator.generate_in_batches(encoded, self._batcher)
        texts = []
        for i in range(len(prompts)):
            text = self.tok_decode(generated[i])
            texts.append(postprocess_generated_text(text, stop, None))
        return texts
