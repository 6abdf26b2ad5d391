"""Which merge to try first: recipes ranked from the models' deltas, and by a few evaluations.

The deltas of a sample of matrices are measured (`sample`, `facts`), every merge method is tried on
that sample (`interference`), and the recipes are ranked with the reasons (`suggestion`). A few
evaluations can order the first ones (`scores`).
"""

from paretomerge.suggest.suggestion import SuggestedRecipe, Suggestion, suggest

__all__ = ["SuggestedRecipe", "Suggestion", "suggest"]
