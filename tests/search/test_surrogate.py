import numpy as np
import pytest
import torch

from paretomerge.search.surrogate import Shape, Surrogate, best_fit

BOTH = (Shape(parabola=True), Shape(parabola=False))


def test_the_surrogate_knows_what_it_was_told_and_that_it_knows_less_elsewhere():
    rng = np.random.default_rng(0)
    x = rng.random((15, 2)) * 0.5
    y = np.stack([100 * x[:, 0], -x[:, 1]], 1)
    surrogate = Surrogate.fit(x, y, np.full(y.shape, 1e-3))
    mean, near = surrogate.predict(x)
    np.testing.assert_allclose(mean[:, 0], y[:, 0], atol=3)
    far = surrogate.predict(np.array([[1.0, 1.0]]))[1]
    assert (far > near.max(0)).all()
    np.testing.assert_allclose(surrogate.standardise(y).mean(0), 0, atol=1e-9)


def test_a_constant_objective_does_not_break_the_fit():
    x = np.random.default_rng(0).random((8, 2))
    mean, _ = Surrogate.fit(x, np.stack([x[:, 0], np.ones(8)], 1), None).predict(x)
    np.testing.assert_allclose(mean[:, 1], 1, atol=1e-3)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("told", [True, False])
def test_foresight_is_what_the_others_say_of_each_trial(m, told):
    rng = np.random.default_rng(0)
    x = rng.random((9, 2))
    y = np.stack([np.sin(3 * x[:, 0]), x[:, 1] ** 2], 1)[:, :m] + 0.1 * rng.standard_normal((9, m))
    whole = Surrogate.fit(x, y, np.full(y.shape, 0.1) if told else None)
    noise = whole.model.likelihood.noise.detach().expand(whole.model.train_targets.shape).numpy().reshape(m, 9)
    kernel = whole.model.covar_module(whole.model.train_inputs[0]).to_dense().detach().numpy().reshape(m, 9, 9)
    mean = whole.model.mean_module(whole.model.train_inputs[0]).detach().numpy().reshape(m, 9)
    target = whole.model.train_targets.numpy().reshape(m, 9)
    total = 0.0
    for k in range(m):
        for i in range(9):
            rest = np.arange(9) != i
            weights = np.linalg.solve(kernel[k][np.ix_(rest, rest)] + np.diag(noise[k][rest]), kernel[k][rest, i])
            centre = mean[k, i] + weights @ (target[k] - mean[k])[rest]
            variance = kernel[k, i, i] - weights @ kernel[k][rest, i] + noise[k, i]
            total += -((target[k, i] - centre) ** 2 / variance + np.log(2 * np.pi * variance)) / 2
    assert whole.foresight() == pytest.approx(total / m, rel=1e-6)


def test_a_smooth_process_is_believed_only_beyond_doubt():
    x = torch.quasirandom.SobolEngine(8, scramble=True, seed=0).draw(40, dtype=torch.float64).numpy()
    waves = np.sin(6 * x[:, :1]) * np.cos(4 * x[:, 1:2])
    bowl = -((x - 0.4) ** 2).sum(1, keepdims=True)
    noise = 0.05 * np.random.default_rng(0).standard_normal((40, 1))
    assert best_fit(x, bowl + noise, np.full((40, 1), 0.05), BOTH).shape.parabola
    assert not best_fit(x, waves, None, BOTH).shape.parabola
    assert best_fit(x, waves, None, BOTH[:1]).shape.parabola
