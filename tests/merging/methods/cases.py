"""A merge of small tensors in one line, for worked examples."""

from collections.abc import Sequence
from typing import Any

import torch

from paretomerge.merging.methods import METHODS
from paretomerge.testing import merge_tensors

A = [1.5, 1.0, 3.25, 5.0]
B = [1.0, 2.0, 3.0, 4.0]
C = [0.0, 2.5, 2.0, 4.5]
D = [2.0, 0.0, 1.0, -1.0]
A6 = [1.0, -2.0, 3.0, -0.5, 0.25, 0.0]
C6 = [-3.0, -1.0, 0.5, 2.0, 0.75, 0.0]
M1 = [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]
M2 = [[0.0, 1.0, 1.0], [2.0, 0.0, -1.0]]
HALF = [[0.5] * 3] * 2
ZERO6 = [0.0] * 6


def merged(
    name: str,
    base: Any,
    sources: Sequence[Any],
    weights: Sequence[float] = (),
    **settings: Any,
) -> torch.Tensor:
    """Merge lists or tensors by the method `name`. settings.

    For the whole merge, or the same for each source.
    """
    method = METHODS[name]
    own = {parameter.name for parameter in method.parameters if parameter.per_source}
    options = {key: value for key, value in settings.items() if key not in own}
    first = base is not None and method.base in ("source", "optional")
    each = [
        {key: value for key, value in settings.items() if key in own}
        for _ in range(len(sources) + first)
    ]
    for parameters, weight in zip(each, weights, strict=False):
        parameters["weight"] = weight
    seed = options.pop("seed", 0)
    return merge_tensors(
        method,
        as_tensor(base),
        [as_tensor(source) for source in sources],
        each,
        options,
        seed=seed,
    )


def as_tensor(values: Any) -> Any:
    return (
        values
        if values is None or isinstance(values, torch.Tensor)
        else torch.tensor(values)
    )


def close(actual: torch.Tensor, expected: Any, scale: float = 1.0) -> None:
    torch.testing.assert_close(
        actual, as_tensor(expected) * scale, rtol=1e-6, atol=1e-6 * min(scale, 1.0)
    )


def deltas(
    seed: int, *shape: int, k: int = 3, size: float = 0.1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A normal base, and k models that differ from it by normal deltas."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, [
        base + size * torch.randn(shape, generator=generator) for _ in range(k)
    ]
