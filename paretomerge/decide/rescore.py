"""A checkpoint on disk, scored as a stranger would load it."""

from collections.abc import Mapping

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError
from paretomerge.evaluate.evaluator import Live, Score, Split
from paretomerge.study.study import Study


def score_checkpoint(study: Study, model: str, split: Split) -> Mapping[str, Score]:
    """Load `model` with transformers, in its own dtype, and score it with the study's evaluators."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = Checkpoint(model)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder).to(study.device).eval()
    live = Live(loaded, AutoTokenizer.from_pretrained(checkpoint.folder), {"sparsity": -_l1(study, checkpoint)})
    return study.score(live, split)


def _l1(study: Study, checkpoint: Checkpoint) -> float:
    """L1 distance to the base in units of the farthest source, as the search measured it; 0 if nobody asks for it."""
    if "sparsity" not in study.goals.scores:
        return 0.0
    resident = study.resident
    if set(checkpoint.headers) != set(resident.checkpoints[resident.base].headers):
        raise CheckpointError(f"{checkpoint.name}: expected the base's tensors, got others; sparsity cannot be measured")
    return sum(resident.distance(checkpoint.tensor(name), name) for name in checkpoint.headers) / resident.farthest
