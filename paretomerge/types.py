"""Type aliases that the whole package shares."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""An array of float64; its shape is in the docstring of the function that takes it."""

ParamValue = str | int | float | bool | None
"""One value of a trial's parameter, as Optuna stores it."""

Params = Mapping[str, ParamValue]
"""A trial's parameters: name -> value."""

Conditions = Mapping[str, Sequence[tuple[str, Sequence[ParamValue]]]]
"""Parameter -> pairs (parent, values).

The parameter is active where each parent has one of its values.
"""
