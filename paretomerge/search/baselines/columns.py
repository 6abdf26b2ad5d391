"""Which columns of an encoded point belong to which parameter, and which of them are numbers."""

import numpy as np
from optuna.distributions import CategoricalDistribution

from paretomerge.search.encoding import Encoding, Indices, Mask


def parameter_widths(encoding: Encoding) -> Indices:
    """The number of columns of each parameter, in their order, `(parameters,)`."""
    slices = encoding.columns.values()
    widths = [columns.stop - columns.start for columns in slices]
    return np.array(widths)


def numeric_columns(encoding: Encoding) -> Mask:
    """The mask `(d,)` of the columns of floats and integers; the others are one-hot choices."""
    distributions = encoding.space.values()
    is_number = [not isinstance(d, CategoricalDistribution) for d in distributions]
    # The dtype matters in a space without parameters, where NumPy would choose floats.
    mask = np.array(is_number, dtype=bool)
    return np.repeat(mask, parameter_widths(encoding))
