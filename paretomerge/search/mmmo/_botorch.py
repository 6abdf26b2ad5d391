"""The private parts of BoTorch that the acquisition functions need, in one place.

Each function has a test that fails when BoTorch changes what it wraps.
"""

from botorch.acquisition.analytic import _log_ei_helper
from torch import Tensor


def log_standard_normal_ei(u: Tensor) -> Tensor:
    """Logarithm of E[(z + u)_+] for a standard normal z, elementwise, with usable gradients.

    This is log(phi(u) + u Phi(u)), the function log_h of Ament et al. 2023, sec. 4.1.
    """
    value: Tensor = _log_ei_helper(u)
    return value
