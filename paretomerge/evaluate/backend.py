"""Score with other models of lm-evaluation-harness (`vllm`, `sglang`, `hf`, ...).

Each merge is written as a checkpoint into memory-backed storage, and the backend loads it.
"""

import gc
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate

if TYPE_CHECKING:
    from lm_eval.api.model import LM

# Linux only; elsewhere the folder for temporary files is used.
_SHARED_MEMORY = Path("/dev/shm")


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


@dataclass(frozen=True)
class Backend:
    """A model type of lm-evaluation-harness.

    Attributes:
        name: Its name there, as in `lm_eval --model`.
        arguments: What it takes beside `pretrained`, as in `lm_eval --model_args`.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)

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
        from lm_eval.api.registry import get_model

        try:
            build = get_model(self.name)
        except (ValueError, KeyError, ImportError) as error:
            raise EvaluationError(f"evaluate.backend: {error}") from error
        # copies, since layers that a route repeats share tensors, which safetensors refuses to save
        state = {}
        for name, tensor in candidate.model.state_dict().items():
            state[name] = tensor.detach().clone()
        size = sum(tensor.nbytes for tensor in state.values())
        parent = _checkpoint_parent(size)
        with tempfile.TemporaryDirectory(prefix="paretomerge-", dir=parent) as folder:
            candidate.model.save_pretrained(folder, state_dict=state)
            candidate.text_tokenizer.save_pretrained(folder)
            del state
            arguments = {**self.arguments, **options.arguments}
            model = build(pretrained=folder, batch_size=batch_size, **arguments)
            try:
                yield model
            finally:
                # The next candidate needs the backend's memory.
                del model
                gc.collect()


def _checkpoint_parent(size: int) -> str | None:
    """Shared memory where it has room for two checkpoints of `size` bytes; None for the default."""
    if not _SHARED_MEMORY.is_dir():
        return None
    free = shutil.disk_usage(_SHARED_MEMORY).free
    # Shared memory is memory of the machine, so it must not be filled up.
    if free > 2 * size:
        return str(_SHARED_MEMORY)
    return None
