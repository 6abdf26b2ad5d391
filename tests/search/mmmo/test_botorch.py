"""The adapter to BoTorch's private names: the test fails when BoTorch changes one."""

import numpy as np
import torch
from scipy.stats import norm

from paretomerge.search.mmmo._botorch import log_standard_normal_ei


def test_log_ei_of_a_standard_normal_is_exact_and_has_gradients_far_below():
    u = np.array([-5.0, -1.0, 0.0, 2.0, 30.0])
    expected = np.log(norm.pdf(u) + u * norm.cdf(u))
    np.testing.assert_allclose(
        log_standard_normal_ei(torch.from_numpy(u)), expected, rtol=1e-9
    )
    far = torch.tensor([-1e4], dtype=torch.float64, requires_grad=True)
    value = log_standard_normal_ei(far)
    value.backward()
    # For u -> -infinity the value is near -u^2 / 2, so its derivative is near -u.
    assert torch.isfinite(value).all() and abs(far.grad.item() / 1e4 - 1) < 1e-3
