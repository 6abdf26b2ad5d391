"""Multi-objective search over model merges: several fine-tunes in, a Pareto front of checkpoints out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretomerge.errors import ParetoMergeError
    from paretomerge.evaluate.evaluator import Score
    from paretomerge.merging.engine import merge
    from paretomerge.recipe import Recipe
    from paretomerge.search.mmmo.sampler import MMMOSampler
    from paretomerge.study.study import Study

__version__ = "0.1.0"

_HOMES = {
    "MMMOSampler": "paretomerge.search.mmmo.sampler",
    "ParetoMergeError": "paretomerge.errors",
    "Recipe": "paretomerge.recipe",
    "Score": "paretomerge.evaluate.evaluator",
    "Study": "paretomerge.study.study",
    "merge": "paretomerge.merging.engine",
}

__all__ = ["MMMOSampler", "ParetoMergeError", "Recipe", "Score", "Study", "__version__", "merge"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for: torch and botorch take seconds to import."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'paretomerge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
