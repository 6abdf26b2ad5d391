"""What to merge: frozen data (`recipe`), how it is read from mergekit's YAML (`grammar`), how settings resolve (`settings`)."""

from paretomerge.recipe.recipe import Module, Recipe, Slice, Source, Tokenizer, under
from paretomerge.recipe.settings import Setting, resolve, settings

__all__ = [
    "Module",
    "Recipe",
    "Setting",
    "Slice",
    "Source",
    "Tokenizer",
    "resolve",
    "settings",
    "under",
]
