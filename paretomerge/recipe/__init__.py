"""What to merge: recipes in mergekit's YAML grammar, read, checked, written and frozen.

`Recipe` is one merge; `Source`, `Slice`, `Module` and `Tokenizer` are its parts. `evaluate_setting`
and `find_value` give the value of a merge parameter for one tensor. `resolve_model_path` resolves a
model's name against a folder. Nothing here knows merge methods, files of weights or tensors.
"""

from paretomerge.recipe.parts import Module, Slice, Source, Tokenizer
from paretomerge.recipe.recipe import Recipe, resolve_model_path
from paretomerge.recipe.settings import ParameterSetting, evaluate_setting, find_value

__all__ = [
    "Module",
    "ParameterSetting",
    "Recipe",
    "Slice",
    "Source",
    "Tokenizer",
    "evaluate_setting",
    "find_value",
    "resolve_model_path",
]
