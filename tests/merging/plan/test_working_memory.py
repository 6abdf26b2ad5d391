"""What a merge holds beside its inputs and its result, counted tensor by tensor."""

import pytest
import torch

from paretomerge.checkpoint.operand import InMemoryTensor
from paretomerge.merging.block import Inputs
from paretomerge.merging.methods import METHODS
from paretomerge.merging.methods.method import Method
from paretomerge.merging.plan import cost
from paretomerge.testing.methods import example_statistics
from tests.live_bytes import LiveBytes

ROWS, COLUMNS = 64, 32
BLOCK_ROWS = 4
FLOAT32_BYTES = 4


def values(method: Method, per_source: bool) -> dict[str, float]:
    """A value for each parameter that makes the method do all of its work."""
    chosen: dict[str, float] = {}
    for parameter in method.parameters:
        if parameter.per_source == per_source:
            default = parameter.default
            chosen[parameter.name] = 0.5 if default is None else default
    chosen |= {"density": 0.4} if "density" in chosen else {}
    # Each step of the optimiser has the same memory.
    chosen |= {"steps": 2} if "steps" in chosen else {}
    return chosen


def peak_bytes(method: Method, n_sources: int, shape: tuple[int, int]) -> int:
    """The most bytes beside the models and the result while one tensor is merged."""
    generator = torch.Generator().manual_seed(0)
    models = []
    for _ in range(n_sources + 1):
        tensor = torch.randn(shape, generator=generator).to(torch.bfloat16)
        models.append(InMemoryTensor(tensor))
    has_base = method.base in ("required", "reference")
    sources = [model.tensor for model in models[1:]]
    statistics = example_statistics(method, sources)
    inputs = Inputs(
        name="w",
        shape=shape,
        base=models[0] if has_base else None,
        sources=models[1:],
        parameters=[values(method, per_source=True)] * n_sources,
        options=values(method, per_source=False),
        is_matrix=True,
        statistics=statistics,
    )
    result = torch.empty(shape, dtype=torch.bfloat16).view(-1)
    existing = [result, *(model.tensor for model in models)]
    existing += [one.operand.tensor for one in statistics]
    with torch.inference_mode(), LiveBytes(existing) as live:
        merge_block = method.function(inputs)
        for block in inputs.blocks(BLOCK_ROWS * COLUMNS):
            merged = merge_block(block).reshape(-1)
            end = block.start + merged.numel()
            result[block.start : end].copy_(merged)
    return live.peak


@pytest.mark.parametrize("name", METHODS)
def test_working_memory_is_bounded_by_the_plan(name, monkeypatch):
    monkeypatch.setattr("paretomerge.merging.block.CPU_BLOCK", BLOCK_ROWS * COLUMNS)
    method = METHODS[name]
    fewest, most = method.models
    for n_sources in {max(fewest, 2), most or 8, fewest}:
        if most is not None and n_sources > most:
            continue
        if method.family == "calibrated" and method.whole_tensors:
            copies = 8 * (n_sources + cost._LEAST_SQUARES_COPIES) + 4 * n_sources
            # Few rows, as many as columns, and a piece with many.
            for rows in (COLUMNS // 4, COLUMNS, 64 * COLUMNS):
                in_work = 5 * FLOAT32_BYTES * rows * COLUMNS
                allowed = COLUMNS**2 * copies + in_work + 100 * COLUMNS
                assert peak_bytes(method, n_sources, (rows, COLUMNS)) <= allowed
            continue
        if method.whole_tensors:
            copies = max(cost._SVD_COPIES - 4 + 2 * n_sources, 7 + 4 * n_sources)
            # Vectors of singular values, and the like.
            allowed = FLOAT32_BYTES * COLUMNS * (COLUMNS * copies + 100)
            assert peak_bytes(method, n_sources, (COLUMNS, COLUMNS)) <= allowed
            continue
        blocks = n_sources + cost._BLOCKS_BESIDE_SOURCES
        allowed = FLOAT32_BYTES * BLOCK_ROWS * COLUMNS * blocks
        assert peak_bytes(method, n_sources, (ROWS, COLUMNS)) <= allowed
