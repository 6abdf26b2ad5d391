"""Private names of `lm_eval.models.huggingface.HFLM`.

`tests/evaluate/test_adapters.py` fails when one of them changes.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm_eval.models.huggingface import HFLM

from paretomerge.evaluate.inference.likelihood import LogLikelihood, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReplaceableHFLM(HFLM):  # type: ignore[misc]
    """The harness's model type `hf`, around a model in memory that can be replaced.

    Subclasses compute the log-likelihoods of tokens; tokenization stays with the harness.
    """

    def set_model(self, model: "PreTrainedModel") -> None:
        """Replace the model by another one with the same tokenizer."""
        self._model = model
        self._config = model.config

    @abstractmethod
    def token_log_likelihoods(self, requests: Sequence[Request]) -> list[LogLikelihood]:
        """Log-likelihood of each (context, continuation), in the order of the requests."""

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[object, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[LogLikelihood]:
        if self.backend == "seq2seq":
            # The encoder reads the context, so there is no prefix to share.
            computed: list[LogLikelihood] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return computed
        # the harness's `loglikelihood` and `loglikelihood_rolling` both end here
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self.token_log_likelihoods(pairs)
