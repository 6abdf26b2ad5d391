"""Volumes and reference points of the test problems, against dense fronts and the stored file."""

import json

import numpy as np
import pytest

from benchmarks.references import compute_reference, dtlz2_front, dtlz7_front, zdt_front
from paretomerge.pareto.front import hypervolume
from paretomerge.problems.catalogue import REFERENCES
from paretomerge.problems.synthetic import dtlz2, dtlz7, zdt


def filled(points, front, reference):
    assert (points >= front.ideal - 1e-9).all()
    return hypervolume(-points, -reference) / front.volume(reference)


def test_volumes_are_those_of_dense_fronts():
    """A sampled front lies inside the true one, and nearly fills it."""
    grid = np.linspace(0, 1, 3001)
    for kind in (1, 2, 3):
        points = zdt(kind, np.column_stack([grid, np.zeros((3001, 4))]))
        share = filled(points, zdt_front(kind), np.array([1.3, 1.2]))
        assert share == pytest.approx(1, abs=2e-3)
    angles = np.stack(np.meshgrid(grid[::50], grid[::50]), -1).reshape(-1, 2)
    sphere = dtlz2(3, np.column_stack([angles, np.full((len(angles), 3), 0.5)]))
    assert 0.97 < filled(sphere, dtlz2_front(3), np.full(3, 1.1)) <= 1
    pieces = dtlz7(3, np.column_stack([angles, np.zeros((len(angles), 3))]))
    assert 0.97 < filled(pieces, dtlz7_front(3), np.array([0.95, 0.95, 8.0])) <= 1
    assert zdt_front(1).volume(np.array([2.0, 2.0])) == pytest.approx(
        4 - 1 / 3, rel=1e-6
    )


@pytest.mark.parametrize(
    "name", ["zdt1-d5", "zdt3-d30", "dtlz2-m4-d10", "dtlz7-m3-d10"]
)
def test_the_stored_reference_is_the_computed_one(name):
    assert compute_reference(name) == json.loads(REFERENCES.read_text())[name]
