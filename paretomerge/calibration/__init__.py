"""Statistics of models on text, and weights learned from it, for merges that need data.

`calibrate` writes a folder with statistics of each source, which the methods `regmean`,
`regmean_pp` and `fisher` of a recipe read (`calibration: FOLDER`). `learn_weights` learns the
weights of a task arithmetic; its result is a recipe.
"""

from paretomerge.calibration.learn import LearnedWeights, learn_weights
from paretomerge.calibration.make import calibrate
from paretomerge.calibration.text import Example, read_examples

__all__ = [
    "Example",
    "LearnedWeights",
    "calibrate",
    "learn_weights",
    "read_examples",
]
