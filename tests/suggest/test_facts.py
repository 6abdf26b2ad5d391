"""Facts about deltas against brute force, and what they make us say."""

import numpy as np
import pytest
import torch

from paretomerge.suggest.facts import FactSums
from paretomerge.suggest.reasons import findings_of, reasons_for
from paretomerge.suggest.sample import SampledMatrix, leading_directions


def facts_of(base, deltas):
    sums = FactSums(tuple(deltas))
    matrix = SampledMatrix(base, deltas)
    sums.add(matrix, {n: leading_directions(d) for n, d in deltas.items()})
    return sums.facts()


def test_facts_are_those_of_the_definitions():
    torch.manual_seed(0)
    base = torch.randn(20, 15)
    one, other = torch.randn(20, 15), torch.randn(20, 15)
    one[torch.rand(20, 15) < 0.3] = 0
    facts = facts_of(base, {"one": one, "other": other})
    x, y = one.double().numpy(), other.double().numpy()
    norm = np.linalg.norm
    assert facts.relative_norms[0] == pytest.approx(norm(x) / norm(base.numpy()))
    assert facts.unchanged[0] == pytest.approx((x == 0).mean())
    assert facts.cosine[0, 1] == pytest.approx((x * y).sum() / norm(x) / norm(y))
    product = x * y
    negative = -product[product < 0].sum()
    assert facts.sign_conflict[0, 1] == pytest.approx(negative / abs(product).sum())
    energies = np.linalg.svd(x)[1] ** 2
    enough = np.searchsorted(energies.cumsum(), 0.9 * energies.sum()) + 1
    assert facts.directions[0] == enough
    assert facts.share_of_rank[0] == pytest.approx(enough / 15)


def test_equal_opposite_and_separate_deltas():
    delta = torch.randn(8, 8)
    half = torch.zeros(8, 8)
    half[:4] = delta[:4]
    rest = delta - half
    base = torch.ones(8, 8)
    facts = facts_of(base, {"a": delta, "b": delta, "c": -delta})
    assert facts.sign_conflict[0, 1] == pytest.approx(0)
    assert facts.sign_conflict[0, 2] == pytest.approx(1)
    separate = facts_of(base, {"a": half, "b": rest})
    assert separate.sign_conflict[0, 1] == 0
    assert separate.cosine[0, 1] == pytest.approx(0)


def test_findings_name_what_a_user_should_know():
    torch.manual_seed(0)
    base = torch.randn(64, 64)
    low_rank = torch.randn(64, 2) @ torch.randn(2, 64) * 0.01
    facts = facts_of(base, {"small": low_rank, "copy": low_rank, "large": 5 * low_rank})
    text = " ".join(findings_of(facts))
    assert "large moved 5.0 times as far as small" in text
    assert "small and copy are nearly one model" in text
    assert "low rank: 2 directions" in text
    assert "base in the measured layers" not in text


def test_a_source_that_is_the_base_is_said():
    facts = facts_of(torch.ones(4, 4), {"a": torch.ones(4, 4), "b": torch.zeros(4, 4)})
    assert "b is the base in the measured layers" in " ".join(findings_of(facts))


def test_reasons_depend_on_the_facts():
    torch.manual_seed(0)
    base = torch.randn(64, 64)
    unrelated = facts_of(base, {"a": torch.randn(64, 64), "b": torch.randn(64, 64)})
    delta = torch.randn(64, 64)
    alike = facts_of(base, {"a": delta, "b": delta + 0.3 * torch.randn(64, 64)})
    assert "leaves 1/2 of each" in " ".join(reasons_for("linear", unrelated))
    assert "keeps what they share" in " ".join(reasons_for("linear", alike))
    assert "twice" in " ".join(reasons_for("task_arithmetic", alike))
    assert "A vote" in " ".join(reasons_for("ties", unrelated))
    assert not reasons_for("tsv", unrelated)
