"""Score a checkpoint on disk, loaded the way that its users load it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.reference import Reference
from paretomerge.errors import CheckpointError
from paretomerge.evaluate.evaluator import Candidate, Score, Split
from paretomerge.merging.engine import merge
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.live.model_class import load_model, load_tokenizer
from paretomerge.study.search import Search


def score_checkpoint(search: Search, model: str, split: Split) -> Mapping[str, Score]:
    """Score a checkpoint with a study's evaluators.

    It is loaded with transformers, in its own dtype.

    Args:
        search: The study.
        model: A folder, or a name on the Hub; `model+adapter` is written to a temporary folder.
        split: `search` or `held_out`.

    Returns:
        Name -> score.

    Raises:
        CheckpointError: It cannot be read.
        EvaluationError: It cannot be scored.
    """
    if Reference.parse(model).adapter is None:
        return _score(search, model, split)
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    with TemporaryDirectory(prefix="paretomerge-") as folder:
        whole = merge(recipe, Path(folder) / "model")
        return _score(search, str(whole), split)


def _score(search: Search, model: str, split: Split) -> Mapping[str, Score]:
    # With transformers and not into a live model: this shows that the written files score what the
    # study recorded.
    checkpoint = Checkpoint(model)
    loaded = load_model(checkpoint.folder, dtype=None)
    loaded = loaded.to(search.placement.device).eval()
    tokenizer = load_tokenizer(checkpoint.folder)
    facts = _Facts(search, checkpoint)
    return search.score(Candidate(loaded, tokenizer, facts), split)


class _Facts(Mapping[str, float]):
    """The facts of a merge (layers, parameters, sparsity), measured on a checkpoint.

    Each is measured when an evaluator asks for it, since sparsity reads every tensor.
    """

    def __init__(self, search: Search, checkpoint: Checkpoint) -> None:
        self._measures: dict[str, Callable[[], float]] = {
            "layers": lambda: checkpoint.architecture.depth,
            "parameters": partial(_parameter_count, checkpoint),
        }
        # A route may have another depth than the base, so its distance to the base is undefined.
        if not search.space.routed:
            self._measures["sparsity"] = partial(_sparsity, search, checkpoint)

    def __getitem__(self, name: str) -> float:
        return self._measures[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._measures)

    def __len__(self) -> int:
        return len(self._measures)


def _parameter_count(checkpoint: Checkpoint) -> int:
    return sum(prod(header.shape) for header in checkpoint.headers.values())


def _sparsity(search: Search, checkpoint: Checkpoint) -> float:
    """Minus the L1 distance to the base, in units of the farthest source."""
    resident = search.first_level.model
    assert isinstance(resident, ResidentModel)
    base = resident.checkpoints[resident.base]
    if set(checkpoint.headers) != set(base.headers):
        raise CheckpointError(
            f"{checkpoint.name}: its tensors are not those of the base, so its sparsity cannot "
            "be measured"
        )
    # `sum`, as the search adds the same distances: a loop rounds differently from Python 3.12 on.
    distance = sum(
        resident.distance(checkpoint.tensor(name), name) for name in checkpoint.headers
    )
    return -distance / resident.max_distance
