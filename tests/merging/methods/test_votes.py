"""The vote of a source in the election of signs, and the chat vector."""

from pathlib import Path

import pytest
import torch

from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import make_plan
from paretomerge.testing import merge_tensors
from tests.merging.methods.cases import close, deltas

ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties", "sce")


def with_votes(method, base, sources, votes, weights=(1.0, 1.0), **options):
    parameters = []
    for vote, weight in zip(votes, weights, strict=True):
        parameters.append({"vote": vote, "weight": weight})
    return merge_tensors(METHODS[method], base, sources, parameters, options)


def test_by_hand():
    base = torch.zeros(4)
    sources = [
        torch.tensor([4.0, 4.0, -1.0, 2.0]),
        torch.tensor([-3.0, 3.0, 3.0, -1.0]),
    ]
    options = {"normalize": False}
    plain = with_votes("ties", base, sources, (1.0, 1.0), **options)
    close(plain, [4.0, 7.0, 3.0, 2.0])
    # 4 - 2 * 3 < 0, -1 + 2 * 3 > 0, 2 - 2 > 0 is a sum of 0, which counts as +
    louder = with_votes("ties", base, sources, (1.0, 2.0), **options)
    close(louder, [-3.0, 7.0, 3.0, 2.0])
    silent = with_votes("ties", base, sources, (1.0, 0.0), **options)
    close(silent, [4.0, 7.0, -1.0, 2.0])
    # A weight changes what is added as well as the vote.
    weighted = with_votes("ties", base, sources, (1.0, 2.0), (1.0, 0.5), **options)
    close(weighted, [4.0, 5.5, 1.5, 2.0])


@pytest.mark.parametrize("method", ELECTING)
def test_equal_votes_change_nothing_and_others_do(method):
    base, sources = deltas(3, 20, 30, k=2)
    plain = with_votes(method, base, sources, (1.0, 1.0))
    torch.testing.assert_close(with_votes(method, base, sources, (3.0, 3.0)), plain)
    assert not torch.allclose(with_votes(method, base, sources, (1.0, 9.0)), plain)


def test_a_source_alone_in_the_vote_decides_all_signs():
    base, sources = deltas(4, 20, 30, k=2)
    merged = with_votes("ties", base, sources, (1.0, 0.0))
    tau = sources[0] - base
    assert torch.equal((merged - base).sign(), tau.sign())


def test_the_chat_vector_is_task_arithmetic(pico: Path):
    """theta_instruct + lambda (theta_language - theta_base); Huang et al. 2024."""
    scale = 0.5
    data = {
        "merge_method": "task_arithmetic",
        "base_model": str(pico / "base"),
        "models": [
            {"model": str(pico / "ada"), "parameters": {"weight": 1}},
            {"model": str(pico / "bob"), "parameters": {"weight": scale}},
        ],
        "dtype": "float32",
    }
    plan = make_plan(data)
    for name, tensor in merged_tensors(plan):
        base, instruct, language = (
            plan.weights[str(pico / model)].operand(name).rows(0, n_rows(tensor))
            for model in ("base", "ada", "bob")
        )
        expected = instruct + scale * (language - base)
        torch.testing.assert_close(
            tensor, expected.view(tensor.shape), rtol=1e-5, atol=1e-6
        )


def n_rows(tensor: torch.Tensor) -> int:
    return len(tensor) if tensor.dim() > 1 else 1
