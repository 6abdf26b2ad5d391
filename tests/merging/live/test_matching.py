import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.merging.live.matching import (
    StreamStatistics,
    matching_scale,
    measure_streams,
)
from paretomerge.merging.live.routed import RoutedModel


def stream(seed: int, scale: float = 1.0, d: int = 6) -> StreamStatistics:
    states = (
        torch.randn(200, d, generator=torch.Generator().manual_seed(seed))
        + torch.arange(d) / d
    )
    return StreamStatistics.from_states(scale * states)


@given(st.floats(0.05, 20))
def test_a_stream_that_is_only_larger_is_brought_back(scale):
    assert matching_scale(stream(0, scale), stream(0)) == pytest.approx(
        1 / scale, rel=1e-6
    )


@given(st.integers(0, 20), st.floats(0.2, 5))
def test_no_other_scale_is_better(seed, scale):
    leaving, expected = stream(seed, scale), stream(seed + 1)

    def off(s: float) -> float:
        first = ((s * leaving.mean - expected.mean) ** 2).sum() / (
            expected.mean**2
        ).sum()
        return (
            first
            + ((s**2 * leaving.covariance - expected.covariance) ** 2).sum()
            / (expected.covariance**2).sum()
        )

    best = matching_scale(leaving, expected)
    assert off(best) <= min(off(s) for s in np.geomspace(0.01, 100, 400)) + 1e-9


def test_streams_that_point_away_from_each_other_are_left_alone():
    one = StreamStatistics(np.ones(2), np.zeros((2, 2)))
    assert matching_scale(one, StreamStatistics(-np.ones(2), np.eye(2))) == 1.0


class Words:
    """A tokenizer of numbers."""

    def __call__(self, line, **_):
        return {
            "input_ids": torch.tensor(
                [[int(word) for word in line.split()]], dtype=torch.long
            )
        }


def test_streams_are_those_into_each_layer(pico):
    path = str(pico / "ada")
    live = RoutedModel([path], "float32")
    live.tokenizer = Words()
    text = ["3 4 5 6", "7 8", ""]
    found = measure_streams(
        live, {"ada": path}, {"ada": Checkpoint(path).architecture.depth}, text
    )["ada"]
    model = live._loaded.model
    states = [
        model(
            torch.tensor([[int(w) for w in line.split()]]), output_hidden_states=True
        ).hidden_states
        for line in text[:2]
    ]
    assert len(found) == model.config.num_hidden_layers
    for layer, stream in enumerate(found):
        expected = torch.cat([s[layer][0] for s in states]).double().numpy()
        assert np.allclose(stream.mean, expected.mean(0), atol=1e-6) and np.allclose(
            stream.covariance, np.cov(expected.T, bias=True), atol=1e-6
        )
    assert not model.model.layers[0]._forward_pre_hooks
