import numpy as np
import pytest
import torch

from paretomerge.search.mmmo.surrogate import KernelSpec, Surrogate

BOTH = (KernelSpec(quadratic_trend=True), KernelSpec(quadratic_trend=False))


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
def test_where_noise_is_not_told_a_trial_leaves_no_doubt_and_the_mean_is_the_same(m):
    rng = np.random.default_rng(0)
    x, elsewhere = rng.random((12, 2)), rng.random((5, 2))
    y = np.stack([np.sin(5 * x[:, 0]), x[:, 1] ** 2], 1)[
        :, :m
    ] + 0.2 * rng.standard_normal((12, m))
    untold, told = Surrogate.fit(x, y, None), Surrogate.fit(x, y, np.full(y.shape, 0.2))
    assert (untold.predict(x)[1] < 0.01).all() and (told.predict(x)[1] > 0.02).all()
    assert (untold.predict(elsewhere)[1] > untold.predict(x)[1].max()).all()
    with torch.no_grad():
        fitted = (
            untold.batches[0].model.posterior(torch.from_numpy(elsewhere)).mean.numpy()
        )
    np.testing.assert_allclose(
        untold.predict(elsewhere)[0], fitted * untold.y_std + untold.y_mean, atol=1e-3
    )


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("told", [True, False])
def test_the_loo_log_density_is_what_the_others_say_of_each_trial(m, told):
    rng = np.random.default_rng(0)
    x = rng.random((9, 2))
    y = np.stack([np.sin(3 * x[:, 0]), x[:, 1] ** 2], 1)[
        :, :m
    ] + 0.1 * rng.standard_normal((9, m))
    whole = Surrogate.fit(x, y, np.full(y.shape, 0.1) if told else None)
    model = whole.batches[0].model
    noise = (
        model.likelihood.noise.detach()
        .expand(model.train_targets.shape)
        .numpy()
        .reshape(m, 9)
    )
    kernel = (
        model.covar_module(model.train_inputs[0])
        .to_dense()
        .detach()
        .numpy()
        .reshape(m, 9, 9)
    )
    mean = model.mean_module(model.train_inputs[0]).detach().numpy().reshape(m, 9)
    target = model.train_targets.numpy().reshape(m, 9)
    total = np.zeros(m)
    for k in range(m):
        for i in range(9):
            rest = np.arange(9) != i
            weights = np.linalg.solve(
                kernel[k][np.ix_(rest, rest)] + np.diag(noise[k][rest]),
                kernel[k][rest, i],
            )
            centre = mean[k, i] + weights @ (target[k] - mean[k])[rest]
            variance = kernel[k, i, i] - weights @ kernel[k][rest, i] + noise[k, i]
            total[k] += (
                -(
                    (target[k, i] - centre) ** 2 / variance
                    + np.log(2 * np.pi * variance)
                )
                / 2
            )
    assert whole.batches[0].loo_log_density() == pytest.approx(total, rel=1e-6)


def sobol(n, d):
    return (
        torch.quasirandom.SobolEngine(d, scramble=True, seed=0)
        .draw(n, dtype=torch.float64)
        .numpy()
    )


def test_each_outcome_is_believed_of_the_shape_that_foresees_it():
    x = sobol(40, 8)
    waves = np.sin(6 * x[:, :1]) * np.cos(4 * x[:, 1:2])
    bowl = -((x - 0.4) ** 2).sum(1, keepdims=True)
    y = np.concatenate([waves, bowl, 2 * waves], 1)
    both = Surrogate.fit_mixture(x, y, None, BOTH)
    assert {p.kernel.quadratic_trend: p.outcomes for p in both.batches} == {
        True: (1,),
        False: (0, 2),
    }
    assert all((p.weight == 1).all() for p in both.batches)
    alone = [
        Surrogate.fit_mixture(x, y[:, [k]], None, BOTH).predict(x)[0][:, 0]
        for k in range(3)
    ]
    np.testing.assert_allclose(both.predict(x)[0], np.stack(alone, 1), atol=1e-3)
    (only,) = Surrogate.fit_mixture(x, waves, None, BOTH[:1]).batches
    assert only.kernel.quadratic_trend


def test_where_the_trials_cannot_tell_both_shapes_have_a_say():
    """The mixture's mean and spread are those of drawing a shape first, then a value."""
    x, new = sobol(12, 6), sobol(30, 6)[20:]
    y = np.stack(
        [
            x[:, 0] + 0.3 * np.sin(3 * x[:, 1]),
            x[:, 2] * x[:, 3],
            np.cos(2 * x[:, 4]) - x[:, 0],
        ],
        1,
    )
    mixed = Surrogate.fit_mixture(x, y, None, BOTH)
    shares = np.zeros((2, 3))
    for i, kernel in enumerate(BOTH):
        for p in mixed.batches:
            if p.kernel == kernel:
                shares[i, list(p.outcomes)] = p.weight
    np.testing.assert_allclose(shares.sum(0), 1)
    assert ((shares > 0.02) & (shares < 0.98)).any()
    parts = [Surrogate.fit(x, y, None, kernel).predict(new) for kernel in BOTH]
    mean = sum(w * m for w, (m, _) in zip(shares, parts, strict=True))
    variance = sum(
        w * (s**2 + (m - mean) ** 2) for w, (m, s) in zip(shares, parts, strict=True)
    )
    found = mixed.predict(new)
    np.testing.assert_allclose(found[0], mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found[1], np.sqrt(variance), rtol=1e-5)


def test_other_trials_with_the_same_hyperparameters():
    x = np.random.default_rng(0).random((20, 3))
    y = np.stack([np.sin(5 * x[:, 0]), -((x - 0.4) ** 2).sum(1)], 1)
    first = Surrogate.fit_mixture(x[:15], y[:15], None, BOTH)
    again = first.with_trials(x, y, None)
    for one, other in zip(first.batches, again.batches, strict=True):
        assert one.kernel == other.kernel and (one.weight == other.weight).all()
        assert all(
            (value == other.hyperparameters[name]).all()
            for name, value in one.hyperparameters.items()
        )
    np.testing.assert_array_equal(
        first.with_trials(x[:15], y[:15], None).predict(x)[0], first.predict(x)[0]
    )


def test_each_outcome_has_its_noise_told_or_inferred():
    rng = np.random.default_rng(0)
    x = rng.random((12, 2))
    y = np.stack(
        [np.sin(5 * x[:, 0]), x[:, 1], np.cos(3 * x[:, 1])], 1
    ) + 0.2 * rng.standard_normal((12, 3))
    stderr = np.full(y.shape, 0.2)
    stderr[:, 1] = np.nan
    mixed, told, inferred = (
        Surrogate.fit_mixture(x, y, noise, BOTH)
        for noise in (stderr, np.full(y.shape, 0.2), None)
    )
    for k, alone in enumerate((told, inferred, told)):
        for ours, theirs in zip(mixed.predict(x), alone.predict(x), strict=True):
            np.testing.assert_allclose(ours[:, k], theirs[:, k], rtol=0.05, atol=0.02)
    again = mixed.with_trials(x, y, stderr)
    np.testing.assert_allclose(again.predict(x)[1], mixed.predict(x)[1], atol=1e-9)
