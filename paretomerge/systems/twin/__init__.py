"""Twin-Merging: a shared model, what is particular to each task, and a router on the prompt.

Lu et al. 2024, arXiv 2406.15479. `paretomerge twin` makes a folder; docs/twin.md is for users.

- `build_twin`: makes the folder. `read_prompts`, `study_prompts`: prompts for its router.
- `TwinModel`: the folder as a model of transformers.
- `score_twin`: its scores on a study's tasks. `language_model`: a model of lm-evaluation-harness.
- `export_corner`, `export_mixture`: an ordinary checkpoint of fixed weights.
- `Manifest`, `is_twin_folder`: what the folder holds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paretomerge.systems.twin.manifest import Manifest, is_twin_folder

if TYPE_CHECKING:
    from paretomerge.systems.twin.build import build_twin
    from paretomerge.systems.twin.export import export_corner, export_mixture
    from paretomerge.systems.twin.model import TwinModel
    from paretomerge.systems.twin.prompts import read_prompts, study_prompts
    from paretomerge.systems.twin.score import language_model, score_twin

__all__ = [
    "Manifest",
    "TwinModel",
    "build_twin",
    "export_corner",
    "export_mixture",
    "is_twin_folder",
    "language_model",
    "read_prompts",
    "score_twin",
    "study_prompts",
]

# torch and lm-evaluation-harness take seconds to import, and `is_twin_folder` needs neither.
_MODULES = {
    "TwinModel": "model",
    "build_twin": "build",
    "export_corner": "export",
    "export_mixture": "export",
    "language_model": "score",
    "read_prompts": "prompts",
    "score_twin": "score",
    "study_prompts": "prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)
