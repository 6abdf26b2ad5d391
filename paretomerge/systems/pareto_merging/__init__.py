"""Pareto Merging: one folder that answers any preference over its sources without a search.

Chen & Kwok 2024 (arXiv 2408.12105): W(gamma) = W + A (sum_k gamma_k G_k) B^T, with gamma on the
simplex over the K sources. `pareto_merge` makes the folder in closed form, or trains it on
unlabelled texts; `ParetoFamily` reads it; `LiveFamily` looks at many preferences in one model.
"""

from paretomerge.systems.pareto_merging.build import pareto_merge
from paretomerge.systems.pareto_merging.family import ParetoFamily
from paretomerge.systems.pareto_merging.live import LiveFamily
from paretomerge.systems.pareto_merging.manifest import Manifest, is_family
from paretomerge.systems.pareto_merging.training import TrainingSettings

__all__ = [
    "LiveFamily",
    "Manifest",
    "ParetoFamily",
    "TrainingSettings",
    "is_family",
    "pareto_merge",
]
