"""Statistics of models on text, for merges that need data.

`calibrate` writes a folder with statistics of each source, which the methods `regmean`,
`regmean_pp` and `fisher` of a recipe read (`calibration: FOLDER`).
"""

from paretomerge.calibration.make import calibrate
from paretomerge.calibration.text import Example, read_examples

__all__ = ["Example", "calibrate", "read_examples"]
