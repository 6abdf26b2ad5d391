"""The k largest of a tensor that is seen in blocks, against sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paretomerge.merging.block as block_module
import paretomerge.merging.methods.top_k as top_k
from paretomerge.checkpoint.operand import InMemoryTensor
from paretomerge.merging.block import Inputs
from paretomerge.merging.methods.top_k import Query, top_k_thresholds


def expected(values: np.ndarray, k: int) -> np.ndarray:
    """Whether each is among the k largest by magnitude, the first of equals being the larger.

    Zeros aside.
    """
    kept = np.zeros(values.size, bool)
    kept[np.argsort(-np.abs(values), kind="stable")[:k]] = True
    return kept & (values != 0)


def check(tensor: torch.Tensor, counts: list[int]) -> int:
    """Compares the kept entries for every count, in blocks of other sizes than the search's.

    Gives the number of passes.
    """
    passes = [0]
    inputs = Inputs(
        "tensor", tuple(tensor.shape), None, [InMemoryTensor(tensor)], [{}], {}
    )

    def score(block):
        passes[0] += block.first == 0
        return block.source(0).abs_()

    cuts = top_k_thresholds(inputs, [Query(score, k) for k in counts])
    flat = tensor.flatten().numpy()
    assert len(cuts) == len(counts)
    for cut, k in zip(cuts, counts, strict=True):
        for block in (None, 3 * tensor.shape[-1], 1 << 40):
            kept = torch.cat(
                [
                    cut.keep_(piece.source(0), piece.start).flatten()
                    for piece in inputs.blocks(block)
                ]
            ).numpy()
            wanted = np.where(expected(flat, k), flat, 0)
            assert np.array_equal(kept, wanted), (
                f"k = {k}: kept {np.count_nonzero(kept)}, not {np.count_nonzero(wanted)} or others"
            )
    return passes[0]


@pytest.fixture
def small(monkeypatch):
    """Blocks, samples and the limit of what is sorted directly so small that tensors of a few
    thousand are streamed.
    """
    monkeypatch.setattr(block_module, "CPU_BLOCK", 64)
    monkeypatch.setattr(top_k, "_DIRECT_LIMIT", 256)
    monkeypatch.setattr(top_k, "_SAMPLE_SIZE", 128)
    monkeypatch.setattr(top_k, "_MIN_SAMPLE", 16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def few(*shape: int, kinds: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-kinds, kinds + 1, shape, generator=generator).float()


def sparse(rows: int, columns: int, every: int) -> torch.Tensor:
    tensor = torch.zeros(rows * columns)
    tensor[::every] = torch.arange(1.0, len(tensor[::every]) + 1)
    return tensor.view(rows, columns)


def scales(rows: int, columns: int, sign: int) -> torch.Tensor:
    """Rows sorted by scale over sixty orders of magnitude: a sample of some rows knows nothing
    of the others.
    """
    exponents = torch.linspace(-30 * sign, 30 * sign, rows)
    return normal(rows, columns) * (10.0 ** exponents.double()).float()[:, None]


def unseen(rows: int, columns: int) -> torch.Tensor:
    """Large where the sample does not look: it takes whole blocks at equal distances, and
    steps inside them.
    """
    tensor = normal(rows, columns).abs() + 1
    tensor[torch.arange(rows) % 25 != 0] *= 1e6
    return tensor


TENSORS = {
    "normal": normal(97, 53),
    "a vector": normal(5003),
    "a stack": normal(5, 31, 40),
    "bfloat16": normal(97, 53).bfloat16().float(),
    "seven values": few(97, 53),
    "one value": torch.full((97, 53), -2.5),
    "all zero": torch.zeros(97, 53),
    "zero but for few": sparse(97, 53, 400),
    "zero but for one": sparse(97, 53, 10**6),
    "half zero": sparse(97, 53, 2),
    "scales, rising": scales(120, 53, 1),
    "scales, falling": scales(120, 53, -1),
    "unseen rows": unseen(200, 53),
    "sorted": torch.arange(97 * 53.0).view(97, 53),
    "sorted, falling": -torch.arange(97 * 53.0).flip(0).view(97, 53),
    "subnormal": normal(97, 53) * 1e-41,
    "huge": normal(97, 53) * 1e37,
    "one peak": torch.cat([normal(96, 53) * 1e-3, torch.full((1, 53), 1e3)]),
    "one row": normal(1, 4000),
    "one column": normal(4000, 1),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("direct", [True, False])
def test_against_sorting(name, direct, request):
    if not direct:
        request.getfixturevalue("small")
    tensor = TENSORS[name]
    n = tensor.numel()
    check(tensor, [1, 2, n // 10, n // 3, n // 2, n - n // 50, n - 1, n])


@pytest.mark.parametrize("k", [1, 700, 2500, 5000])
def test_one_count_at_a_time(k, small):
    for name in (
        "normal",
        "seven values",
        "scales, rising",
        "zero but for few",
        "unseen rows",
    ):
        check(TENSORS[name], [k])


@pytest.mark.parametrize(
    "name", ["normal", "bfloat16", "seven values", "one value", "all zero", "half zero"]
)
def test_streaming_takes_two_passes_where_the_sample_tells_the_truth(name, small):
    """One for the sample and one that counts, but for the tie that is looked for in its block."""
    assert check(TENSORS[name], [TENSORS[name].numel() // 2]) <= 3


def test_a_sample_that_misses_the_large_rows(small):
    """Both are among the large entries, of which the sample has seen nothing: its bracket is
    moved.
    """
    assert [check(TENSORS["unseen rows"], [k]) for k in (2000, 5250)] == [3, 5]


@pytest.mark.parametrize("name", TENSORS)
def test_a_misleading_sample_is_asked_again_about_the_side_where_the_value_is(
    name, small, monkeypatch
):
    """Samples of few blocks, and brackets without slack: most are wrong at first."""
    first = top_k._bracket

    def tight(sample, n, k):
        low, high = first(sample, n, k)
        ends = [end for end in (low, high) if 0 < end < np.inf]
        return (ends[k % len(ends)],) * 2 if ends else (low, high)

    monkeypatch.setattr(top_k, "_bracket", tight)
    n = TENSORS[name].numel()
    check(TENSORS[name], [1, 2, n // 10, n // 3, n // 2, n - n // 50, n - 1])


def test_a_wrong_bracket_is_found_out(small, monkeypatch):
    """Whatever the bracket, the result is exact: it is replaced by wrong ones."""
    tensor = TENSORS["normal"]
    for low, high in (
        (5.0, 6.0),
        (0.0, 1e-9),
        (1e-6, 1e-6),
        (0.7, 0.7),
        (7.0, 7.0),
        (2.0, np.inf),
        (0.0, 0.0),
        (0.0, 0.01),
    ):
        wrong = np.float32(low), np.float32(high)
        monkeypatch.setattr(top_k, "_bracket", lambda sample, n, k, wrong=wrong: wrong)
        passes = check(tensor, [1, 500, 2570, 5140])
        assert passes < 40


@pytest.mark.parametrize("value", [0.0, 1.0, 3.0])
def test_a_wrong_bracket_on_tied_values(value, small, monkeypatch):
    monkeypatch.setattr(
        top_k, "_bracket", lambda sample, n, k: (np.float32(value), np.float32(value))
    )
    check(TENSORS["seven values"], [1, 500, 2570, 5140, 5141])


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    kinds=st.integers(1, 50),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_any_tensor_any_counts(seed, rows, columns, kinds, shares):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator).round(decimals=1)
    tensor = (
        torch.randint(-kinds, kinds + 1, (rows, columns), generator=generator) * scale
    )
    n = tensor.numel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_module, "CPU_BLOCK", 100)
        patch.setattr(top_k, "_DIRECT_LIMIT", 64)
        patch.setattr(top_k, "_SAMPLE_SIZE", 50)
        check(tensor, [min(max(int(share * n), 1), n) for share in shares])


def test_several_scores_in_the_same_passes(small):
    sources = [TENSORS["normal"], TENSORS["seven values"]]
    inputs = Inputs(
        "tensor",
        (97, 53),
        None,
        [InMemoryTensor(source) for source in sources],
        [{}] * 2,
        {},
    )
    scores = [lambda block, i=i: block.source(i).abs_() for i in range(2)]
    queries = [Query(scores[i], k) for i, k in ((1, 100), (0, 2000), (1, 4000), (0, 1))]
    cuts = top_k_thresholds(inputs, queries)
    for cut, (score, k) in zip(cuts, queries, strict=True):
        flat = sources[scores.index(score)].flatten().numpy()
        kept = cut.keep_(torch.from_numpy(flat.copy()), 0).numpy()
        assert np.array_equal(kept, np.where(expected(flat, k), flat, 0))


def test_more_than_a_million_entries_with_ties():
    """At the sizes in use: bfloat16 deltas, a few thousand different magnitudes among 1.3
    million entries.
    """
    tensor = (normal(1024, 1280) * 0.01 + 1).bfloat16().float() - 1
    assert tensor.numel() > top_k._DIRECT_LIMIT
    n = tensor.numel()
    passes = check(tensor, [n // 5, n // 2])
    assert passes <= 4
    kinds = few(1024, 1280)
    check(kinds, [n // 5])
