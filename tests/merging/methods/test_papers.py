"""Methods that the reference does not have.

Worked by hand, or against the paper's formula written out in numpy.
"""

import numpy as np
import pytest
import torch

from paretomerge.merging.methods import METHODS
from paretomerge.testing import merge_tensors
from tests.merging.methods.cases import close, deltas, merged

ZERO4 = [0.0] * 4


def arrays(
    base: torch.Tensor, sources: list[torch.Tensor]
) -> tuple[np.ndarray, list[np.ndarray]]:
    start = base.double().numpy()
    return start, [source.double().numpy() - start for source in sources]


def near(actual: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_ram_keeps_own_changes_and_averages_shared_ones():
    sources = [[1.0, 2, 0, 0], [0.0, 4, -3, 0], [0.0, 6, 0, 1e-6]]
    close(merged("ram", ZERO4, sources), [1, 4, -3, 0])
    close(merged("ram", ZERO4, sources[:2]), [1, 3, -3, 0])
    close(merged("ram", ZERO4, sources, epsilon=1.5), [0, 4, -3, 0])
    close(
        merged("ram", [1.0, 1, 1, 1], [[2.0, 3, 1, 1], [1.0, 5, -2, 1]]), [2, 4, -2, 1]
    )


def test_ramplus_tl_scales_a_models_own_changes():
    # the first model has 1 shared and 2 own entries: 1 + r min(1/2, alpha); the second 1 and 1;
    # the third none of its own
    sources = [[1.0, 2, 3, 0, 0], [0.0, 0, 5, -3, 0], [0.0, 0, 1, 0, 0]]
    base = [0.0] * 5
    close(
        merged("ramplus_tl", base, sources, r=0.5, alpha=10.0), [1.25, 2.5, 3, -4.5, 0]
    )
    close(
        merged("ramplus_tl", base, sources), [1.02, 2.04, 3, -3.06, 0]
    )  # r 0.1, alpha 0.2
    close(merged("ramplus_tl", base, sources, r=0.0), merged("ram", base, sources))


def test_consensus_by_hand():
    # sum 3, 3, 0, 2; own where |tau| >= mask_lambda |sum - tau|
    # first: 3 >= 0; 1 >= 0.8; 2 >= 0.8; 0 < 0.8. second: 0 < 1.2; 2 >= 0.4; 2 >= 0.8; 2 >= 0
    sources = [[3.0, 1, 2, 0], [0.0, 2, -2, 2]]
    close(merged("consensus_ta", ZERO4, sources), [0, 3, 0, 0])
    close(merged("consensus_ta", ZERO4, sources, k=1), [3, 3, 0, 2])
    close(
        merged("consensus_ta", ZERO4, sources, k=0, **{"lambda": 0.5}), [1.5, 1.5, 0, 1]
    )
    close(
        merged("consensus_ta", ZERO4, sources, [1, 0.2], k=1, mask_lambda=3.0),
        [3, 0, 1.6, 0.4],
    )


@pytest.mark.parametrize(("k", "own"), [(1, 0.4), (2, 0.4), (3, 0.1), (2, 1.0)])
def test_consensus_against_the_formula(k, own):
    base, sources = deltas(0, 23, 17)
    start, taus = arrays(base, sources)
    total = sum(0.7 * tau for tau in taus)
    agree = sum(
        (np.abs(0.7 * tau) >= own * np.abs(total - 0.7 * tau)).astype(int)
        for tau in taus
    )
    near(
        merged("consensus_ta", base, sources, [0.7] * 3, k=k, mask_lambda=own),
        start + total * (agree >= k),
    )


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.abs(x).max()


@pytest.mark.parametrize(
    ("density", "scale", "weights"), [(1.0, 1.0, [1, 1, 1]), (0.25, 1.5, [1, 0.5, 2])]
)
def test_pcb_against_the_formula(density, scale, weights):
    base, sources = deltas(1, 12, 15)
    start, taus = arrays(base, sources)
    n, top, bottom = start.size, 0.0, 0.0
    for tau, weight in zip(taus, weights, strict=True):
        # Du et al. 2024, eq. 2 to 6: intra-balancing times inter-balancing, the top d kept
        score = softmax(len(taus) * norm(tau**2)) * sum(
            softmax(norm(tau * other)) for other in taus
        )
        least = np.sort(score.ravel())[n - int(density * n)]
        score = np.where(score >= least, score, 0) / score.max()
        top, bottom = top + weight * score * tau, bottom + score
    expected = start + scale * top / np.maximum(bottom, 1e-12)
    near(
        merged("pcb", base, sources, weights, density=density, **{"lambda": scale}),
        expected,
    )


def test_pcb_keeps_the_share_of_each_task():
    base, sources = deltas(2, 10, 10)
    only = merge_tensors(
        METHODS["pcb"],
        base,
        sources,
        [{"density": 0.13}, {"density": 0.0}, {"density": 0.0}],
    )
    assert ((only - base).abs() > 1e-6).sum() == 13
    kept = (only - base).abs() > 1e-6
    torch.testing.assert_close(only[kept], sources[0][kept])


def polar(matrix: np.ndarray) -> np.ndarray:
    """The orthonormal factor, by another way than an SVD.

    M (M^T M)^(-1/2), for a tall matrix of full rank.
    """
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_tsv_against_the_formula(shape):
    base, sources = deltas(3, *shape)
    start, taus = arrays(base, sources)
    left, values, right = [], [], []
    for tau in taus:
        u, s, v = np.linalg.svd(tau, full_matrices=False)
        left.append(u[:, :4])  # a third of 12
        values.append(s[:4])
        right.append(v[:4].T)
    u, v = polar(np.concatenate(left, 1)), polar(np.concatenate(right, 1))
    np.testing.assert_allclose(u.T @ u, np.eye(12), atol=1e-9)
    expected = u @ np.diag(np.concatenate(values)) @ v.T
    near(merged("tsv", base, sources, **{"lambda": 0.7}), start + 0.7 * expected)
    found = np.linalg.svd(
        (merged("tsv", base, sources) - base).numpy(), compute_uv=False
    )
    np.testing.assert_allclose(
        found, np.sort(np.concatenate(values))[::-1], rtol=1e-3
    )  # orthogonal: the values are its spectrum


def test_tsv_of_tasks_that_do_not_meet_is_their_sum():
    base = torch.zeros(6, 6)
    blocks = [torch.zeros(6, 6) for _ in range(3)]
    for i, block in enumerate(blocks):
        block[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor(
            [[2.0, 0.0], [0.0, 1.0]]
        ) * (i + 1)
    torch.testing.assert_close(
        merged("tsv", base, blocks), sum(blocks), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_iso_c_has_a_flat_spectrum_in_the_directions_of_the_sum(shape):
    base, sources = deltas(4, *shape)
    _, taus = arrays(base, sources)
    u, s, v = np.linalg.svd(sum(taus), full_matrices=False)
    found = (merged("iso_c", base, sources, **{"lambda": 2.0}) - base).numpy()
    near(torch.from_numpy(found), 2 * s.mean() * u @ v)
    np.testing.assert_allclose(
        np.linalg.svd(found, compute_uv=False), 2 * s.mean(), rtol=1e-4
    )


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_flat_and_contains_the_common_directions(fraction):
    base, sources = deltas(5, 15, 20)
    _, taus = arrays(base, sources)
    found = (
        (merged("iso_cts", base, sources, common_fraction=fraction) - base)
        .double()
        .numpy()
    )
    spectrum = np.linalg.svd(found, compute_uv=False)
    np.testing.assert_allclose(spectrum, spectrum.mean(), rtol=1e-4)
    own = round((15 - int(fraction * 15)) / 3)
    u, s, v = np.linalg.svd(sum(taus), full_matrices=False)
    common = u[:, : 15 - 3 * own]
    values, left, right = [s[: 15 - 3 * own]], [common], [v[: 15 - 3 * own].T]
    for tau in taus:
        a, b, c = np.linalg.svd(tau - common @ common.T @ tau, full_matrices=False)
        left.append(a[:, :own])
        values.append(b[:own])
        right.append(c[:own].T)
    flat = np.concatenate(values).mean()
    expected = flat * polar(np.concatenate(left, 1)) @ polar(np.concatenate(right, 1)).T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * flat)
    if fraction == 1.0:
        torch.testing.assert_close(
            merged("iso_cts", base, sources, common_fraction=1.0),
            merged("iso_c", base, sources),
        )


def interference(tau: np.ndarray, taus: list[np.ndarray]) -> float:
    """Cheng et al. 2025, eq. 9."""
    return sum(np.square((tau - t) @ t.T).sum() / np.square(t).sum() for t in taus)


def test_wudi_goes_down_from_the_sum():
    base, sources = deltas(6, 10, 14)
    _, taus = arrays(base, sources)
    losses = []
    for steps in (0, 30, 100, 300):
        found = (
            (merged("wudi", base, sources, steps=steps, lr=1e-3) - base)
            .double()
            .numpy()
        )
        losses.append(interference(found, taus))
    near(merged("wudi", base, sources, steps=0), sum(taus) + base.double().numpy())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_wudi_steps_against_the_gradient():
    """Adam's first step goes lr along the sign of the gradient.

    Checked against finite differences of the objective.
    """
    base, sources = deltas(7, 4, 5)
    _, taus = arrays(base, sources)
    start, lr = sum(taus), 1e-3
    gradient = np.zeros_like(start)
    for place in np.ndindex(*start.shape):
        shift = np.zeros_like(start)
        shift[place] = 1e-6
        gradient[place] = (
            interference(start + shift, taus) - interference(start - shift, taus)
        ) / 2e-6
    found = (merged("wudi", base, sources, steps=1, lr=lr) - base).double().numpy()
    np.testing.assert_allclose(found, start - lr * np.sign(gradient), atol=1e-6)


def test_wudi_of_tasks_that_do_not_meet_is_their_sum():
    """Orthogonal row spaces.

    The sum has no interference, the gradient is 0 (but for rounding, which Adam would enlarge).
    """
    one, two = torch.zeros(4, 6), torch.zeros(4, 6)
    one[:, :3], two[:, 3:] = 1.0, 2.0
    torch.testing.assert_close(
        merged("wudi", torch.zeros(4, 6), [one, two], steps=3, lr=1e-4),
        one + two,
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi"])
def test_what_is_no_matrix_takes_the_mean(method):
    base, sources = deltas(8, 30)
    expected = base + 0.5 * sum(source - base for source in sources) / 3
    torch.testing.assert_close(
        merged(method, base, sources, **{"lambda": 0.5}), expected
    )


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi"])
def test_each_expert_of_a_stack_is_a_matrix(method):
    base, sources = deltas(9, 3, 8, 10)
    settings = {"steps": 5} if method == "wudi" else {}
    whole = merged(method, base, sources, **settings)
    for i in range(3):
        alone = merged(method, base[i], [source[i] for source in sources], **settings)
        torch.testing.assert_close(whole[i], alone)


@pytest.mark.parametrize(
    "method",
    ["tsv", "iso_c", "iso_cts", "wudi", "pcb", "consensus_ta", "ram", "ramplus_tl"],
)
def test_models_equal_to_the_base_give_the_base(method):
    base, _ = deltas(10, 6, 8)
    settings = {"steps": 5, "lr": 1e-9} if method == "wudi" else {}
    torch.testing.assert_close(merged(method, base, [base] * 3, **settings), base)
