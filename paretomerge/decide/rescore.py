"""A checkpoint on disk, scored as a stranger would load it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError
from paretomerge.evaluate.evaluator import Candidate, Score, Split
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.study.study import Study


def score_checkpoint(study: Study, model: str, split: Split) -> Mapping[str, Score]:
    """Load `model` with transformers, in its own dtype, and score it with the study's evaluators."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = Checkpoint(model)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder).to(study.device).eval()
    live = Candidate(
        loaded, AutoTokenizer.from_pretrained(checkpoint.folder), _Facts(study, checkpoint)
    )
    return study.score(live, split)


class _Facts(Mapping[str, float]):
    """What came with a merge, measured on a checkpoint when an evaluator asks for it: that reads every tensor."""

    def __init__(self, study: Study, checkpoint: Checkpoint) -> None:
        self._measures: dict[str, Callable[[], float]] = {
            "layers": lambda: checkpoint.architecture.depth,
            "parameters": lambda: sum(prod(header.shape) for header in checkpoint.headers.values()),
        }
        if isinstance(study.resident, ResidentModel):
            self._measures["sparsity"] = partial(_sparsity, study.resident, checkpoint)

    def __getitem__(self, name: str) -> float:
        return self._measures[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._measures)

    def __len__(self) -> int:
        return len(self._measures)


def _sparsity(resident: ResidentModel, checkpoint: Checkpoint) -> float:
    """Minus the L1 distance to the base in units of the farthest source, as the search measured it."""
    if set(checkpoint.headers) != set(resident.checkpoints[resident.base].headers):
        raise CheckpointError(
            f"{checkpoint.name}: expected the base's tensors, got others; sparsity cannot be measured"
        )
    return (
        -sum(resident.distance(checkpoint.tensor(name), name) for name in checkpoint.headers)
        / resident.max_distance
    )
