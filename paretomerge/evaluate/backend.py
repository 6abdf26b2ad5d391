"""Other models of lm-evaluation-harness (`vllm`, `sglang`, `hf`, ...): each merge as a checkpoint in memory-backed storage."""

import gc
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate

_MEMORY = Path("/dev/shm")  # Linux's; elsewhere the folder for temporary files


@dataclass(frozen=True)
class Backend:
    """A model of the harness by its name there. arguments: what it takes beside `pretrained`, as in `lm_eval --model_args`."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def model(self, live: Candidate, batch_size: int) -> Iterator[Any]:
        """The merge, as that model has loaded it; its memory is given back at the end."""
        from lm_eval.api.registry import get_model

        try:
            build = get_model(self.name)
        except (ValueError, KeyError, ImportError) as error:
            raise EvaluationError(f"evaluate.backend: {error}") from error
        state = {
            name: tensor.detach().clone() for name, tensor in live.model.state_dict().items()
        }  # routes share tensors
        with tempfile.TemporaryDirectory(
            prefix="paretomerge-", dir=_place(sum(t.nbytes for t in state.values()))
        ) as folder:
            live.model.save_pretrained(folder, state_dict=state)
            live.tokenizer.save_pretrained(folder)
            del state
            built = build(pretrained=folder, batch_size=batch_size, **self.arguments)
            try:
                yield built
            finally:
                del built
                gc.collect()


def _place(size: int) -> str | None:
    """Where so many bytes fit into memory twice; None for where temporary files are."""
    return str(_MEMORY) if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * size else None
