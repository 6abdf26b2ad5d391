"""Score with other engines than the model in memory.

`Backend` is any model type of lm-evaluation-harness (`sglang`, `hf`, ...): each merge is written as
a checkpoint into memory-backed storage, and the backend loads it. `vllm` has a backend of its own,
whose engine stays: `evaluate/vllm`.
"""

import gc
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.checkpoint_folder import checkpoint_parent, write_checkpoint
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.model_kind import ModelKind

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@dataclass(frozen=True)
class ModelOptions:
    """How text goes into a model and comes out of it, as in `lm_eval --model_args`.

    Attributes:
        think_end_token: Where a model's thoughts end. Only what it writes behind the last one is
            its answer. A text, or the number of a token.
        add_bos_token: Whether texts begin with the token that begins a sequence; None for the
            tokenizer's own setting.
    """

    think_end_token: str | int | None = None
    add_bos_token: bool | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The options that are set, as arguments of the harness's models."""
        arguments = {}
        for name, value in vars(self).items():
            if value is not None:
                arguments[name] = value
        return arguments


DEFAULT_OPTIONS = ModelOptions()
"""Text as the tokenizer and the model have it."""


class EvaluationBackend(Protocol):
    """Answers the requests of tasks in place of the model in memory."""

    @property
    def key(self) -> str:
        """Distinguishes its scores from those of others, for caches."""

    def check(self, kind: ModelKind, scores: str) -> None:
        """Check, before the first trial, what can be checked without a candidate.

        Args:
            kind: What the models are.
            scores: The scores that the backend is needed for, for messages.

        Raises:
            EvaluationError: It cannot be used.
        """

    def load(
        self, candidate: Candidate, batch_size: int, options: ModelOptions
    ) -> "AbstractContextManager[LM]":
        """Load a candidate.

        Args:
            candidate: The merge.
            batch_size: The most requests that are answered at a time.
            options: How text goes into the model and comes out of it.

        Returns:
            A context with a model of lm-evaluation-harness.

        Raises:
            EvaluationError: It cannot be loaded.
        """


@dataclass(frozen=True)
class Backend:
    """A model type of lm-evaluation-harness.

    Attributes:
        name: Its name there, as in `lm_eval --model`.
        arguments: What it takes beside `pretrained`, as in `lm_eval --model_args`.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Distinguishes its scores from those of others, for caches."""
        arguments = json.dumps(dict(self.arguments), sort_keys=True, default=str)
        return f"{self.name} {arguments}"

    def check(self, kind: ModelKind, scores: str) -> None:
        """Check that the harness has such a model type; it knows itself what it can load.

        Args:
            kind: Not used.
            scores: Not used.

        Raises:
            EvaluationError: It has none, or cannot import it.
        """
        self._model_class()

    @contextmanager
    def load(
        self,
        candidate: Candidate,
        batch_size: int,
        options: ModelOptions = DEFAULT_OPTIONS,
    ) -> "Iterator[LM]":
        """Write the candidate to a temporary checkpoint and load it into the backend.

        Args:
            candidate: The merge.
            batch_size: Passed to the backend.
            options: Passed to the backend, before its own `arguments` of the same name.

        Yields:
            The backend's model. Its memory is freed and the checkpoint deleted at the end.

        Raises:
            EvaluationError: The harness has no such model type, or cannot import it.
        """
        build = self._model_class()
        parent = checkpoint_parent(candidate)
        with tempfile.TemporaryDirectory(prefix="paretomerge-", dir=parent) as folder:
            write_checkpoint(candidate, Path(folder))
            arguments = {**self.arguments, **options.arguments}
            model = build(pretrained=folder, batch_size=batch_size, **arguments)
            try:
                yield model
            finally:
                # The next candidate needs the backend's memory.
                del model
                gc.collect()

    def _model_class(self) -> "type[LM]":
        from lm_eval.api.registry import get_model

        try:
            model_class: type[LM] = get_model(self.name)
        except (ValueError, KeyError, ImportError) as error:
            raise EvaluationError(f"evaluate.backend: {error}") from error
        return model_class
