"""Crossover, against the paper's formula in numpy, with the mask recomputed from its address."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretomerge.merging.methods import METHODS
from paretomerge.testing import make_inputs, merge_tensors
from tests.merging.methods.cases import merged

CHUNK = 1 << 17


def mask_of(seed: int, tensor: str, n: int, rate: float) -> np.ndarray:
    """The entries that cross over, written anew from the documented address.

    SFC64 is seeded by the first 16 bytes of sha256(seed, tensor, place 1 of the other model,
    chunk), and its words are read as little-endian 16-bit integers.
    """
    parts = []
    for chunk in range(-(-n // CHUNK)):
        address = f"{seed}\0{tensor}\0{1}\0{chunk}".encode()
        digest = hashlib.sha256(address).digest()
        bits = np.random.SFC64(int.from_bytes(digest[:16], "little"))
        words = bits.random_raw(CHUNK // 4).astype("<u8")
        parts.append(words.view("<u2"))
    integers = np.concatenate(parts)[:n]
    return integers < round(rate * 65536)


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
    )


@pytest.mark.parametrize("shape", [(7,), (30, 41), (420, 317)])
@pytest.mark.parametrize(("t", "rate"), [(0.5, 0.5), (0.3, 0.1), (1.0, 0.75)])
def test_the_formula_on_the_addressed_mask(shape, t, rate):
    parent, other = pair(shape)
    x, y = parent.numpy(), other.numpy()
    mutant = np.float32(1 - t) * x + np.float32(t) * y
    mask = mask_of(11, "tensor", x.size, rate).reshape(shape)
    expected = np.where(mask, mutant, x)
    child = merged("crossover", parent, [other], t=t, crossover_rate=rate, seed=11)
    np.testing.assert_allclose(child.numpy(), expected, rtol=0, atol=1e-6)
    # Entries that do not cross over are the parent's, bit for bit.
    assert (child.numpy()[~mask] == x[~mask]).all()
    if t == 1:
        assert (child.numpy()[mask] == y[mask]).all()


@given(t=st.floats(0, 1), rate=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_ends_are_the_two_models(t, rate, seed):
    parent, other = pair((13, 9))

    def child(t, rate):
        return merged("crossover", parent, [other], t=t, crossover_rate=rate, seed=seed)

    assert torch.equal(child(t, 0.0), parent)
    assert torch.equal(child(0.0, rate), parent)
    assert torch.equal(child(1.0, 1.0), other)
    between = child(t, rate)
    lower = torch.minimum(parent, other) - 1e-5
    upper = torch.maximum(parent, other) + 1e-5
    assert ((between >= lower) & (between <= upper)).all()


def test_the_share_that_crosses_over():
    parent, other = torch.zeros(200, 500), torch.ones(200, 500)
    child = merged("crossover", parent, [other], t=1.0, crossover_rate=0.3, seed=4)
    deviation = (0.3 * 0.7 / child.numel()) ** 0.5
    assert abs(child.mean().item() - 0.3) < 4 * deviation


def test_the_mask_depends_on_the_seed_and_the_tensor():
    parent, other = torch.zeros(40, 50), torch.ones(40, 50)
    masks = [
        merged("crossover", parent, [other], t=1.0, crossover_rate=0.5, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    inputs = make_inputs(
        METHODS["crossover"], parent, [other], options={"t": 1.0}, seed=0
    )
    object.__setattr__(inputs, "name", "another tensor")
    (block,) = inputs.blocks()
    assert not torch.equal(METHODS["crossover"].function(inputs)(block), masks[0])


def test_any_blocks_give_the_same_bits():
    parent, other = pair((420, 317))
    whole = merge_tensors(METHODS["crossover"], parent, [other], seed=3)
    for block in (317, 5000, 131_072):
        parts = merge_tensors(
            METHODS["crossover"], parent, [other], seed=3, block=block
        )
        assert torch.equal(whole, parts)
