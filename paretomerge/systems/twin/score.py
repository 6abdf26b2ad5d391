"""Score a Twin-Merging folder with a study's tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import (
    Candidate,
    Evaluator,
    MergeFact,
    Score,
    Split,
    evaluators_in,
)
from paretomerge.evaluate.inference.language_model import ResidentLM
from paretomerge.merging.live.model_class import load_tokenizer
from paretomerge.systems.twin.manifest import SHARED_FOLDER
from paretomerge.systems.twin.model import TwinModel

_FACTS = ("layers", "parameters")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from paretomerge.study.study import Study


def score_twin(
    study: "Study", folder: str | Path, split: Split = "held_out"
) -> Mapping[str, Score]:
    """Score a Twin-Merging folder with a study's evaluators.

    The router reads the context of each request and never its answer. A text without a prompt, as
    perplexity has, is routed by its first token alone.

    Args:
        study: The study.
        folder: A folder that `paretomerge twin` wrote.
        split: `search` or `held_out`.

    Returns:
        Name -> score.

    Raises:
        CheckpointError: The folder cannot be read.
        EvaluationError: The study scores with an engine that loads checkpoints, or with a fact of
            a merge that a Twin-Merging folder does not have.
    """
    if study.settings.evaluation.backend is not None:
        raise EvaluationError(
            f"{folder}: a Twin-Merging folder is no checkpoint that another engine could load; "
            "remove `evaluate.backend` from the study, or export a corner and score that"
        )
    search = study.search()
    for evaluator in (search.goals.evaluator, search.goals.watched):
        if evaluator is not None:
            _check_facts(evaluator, folder)
    model = TwinModel.from_pretrained(folder, device=search.placement.device)
    n_layers = model.config.get_text_config().num_hidden_layers
    measured = (float(n_layers), float(model.num_parameters()))
    facts = dict(zip(_FACTS, measured, strict=True))
    candidate = Candidate(model, _tokenizer(folder), facts)
    return search.score(candidate, split)


def _check_facts(evaluator: Evaluator, folder: str | Path) -> None:
    for part in evaluators_in(evaluator):
        if isinstance(part, MergeFact) and part.fact not in _FACTS:
            raise EvaluationError(
                f"{folder}: a Twin-Merging folder has no {part.fact}, which the study scores; "
                "export a corner and score that"
            )


def language_model(
    folder: str | Path, *, batch_size: int = 16, device: str = "cpu"
) -> ResidentLM:
    """Load a Twin-Merging folder as a model of lm-evaluation-harness.

    The router reads the context of each request and never its answer. The harness's own `HFLM`
    around a `TwinModel` would show it both.

    Args:
        folder: A folder that `paretomerge twin` wrote.
        batch_size: Rows of a forward pass; halved where memory runs out.
        device: `cpu`, `cuda` or `cuda:N`.

    Returns:
        What `lm_eval.simple_evaluate(model=...)` takes.

    Example:
        >>> import lm_eval
        >>> model = language_model("twin")  # doctest: +SKIP
        >>> lm_eval.simple_evaluate(model=model, tasks=["gsm8k"])  # doctest: +SKIP
    """
    model = TwinModel.from_pretrained(folder, device=device)
    return ResidentLM(model, _tokenizer(folder), batch_size)


def _tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    tokenizer = load_tokenizer(Path(folder).expanduser() / SHARED_FOLDER)
    if tokenizer is None:
        raise EvaluationError(
            f"{folder}: the files of the tokenizer are missing; make the folder again"
        )
    return tokenizer
