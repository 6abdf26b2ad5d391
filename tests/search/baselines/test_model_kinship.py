import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from paretomerge.search.baselines.model_kinship import (
    KinshipProposer,
    active_numbers,
    coefficients,
    cosine_similarity,
    merge_points,
)
from paretomerge.search.encoding import Encoding
from paretomerge.search.observations import Observations
from paretomerge.search.point_sampler import Archive, PointSampler

SPACE = {
    "method": CategoricalDistribution(("plain", "sparse")),
    "weight/a": FloatDistribution(-0.5, 1.5),
    "weight/b": FloatDistribution(-0.5, 1.5),
    "density": FloatDistribution(0.1, 1.0),
}
CONDITIONS = {"density": [("method", ("sparse",))]}


def point(a, b, method="plain", density=0.5):
    return {"method": method, "weight/a": a, "weight/b": b, "density": density}


def archive_of(*rows, number=None):
    """Archive of (point, value) pairs."""
    study = optuna.create_study(directions=["maximize"])
    for params, value in rows:
        study.add_trial(
            optuna.trial.create_trial(value=value, params=params, distributions=SPACE)
        )
    return Archive.of(
        Observations.of(study),
        Encoding(SPACE, CONDITIONS),
        len(rows) if number is None else number,
    )


def proposed(archive, **settings):
    points = KinshipProposer(**settings).propose(archive, np.random.default_rng(0))
    return [archive.encoding.decode(x) for x in archive.encoding.project(points)]


def test_kinship_is_measured_from_the_base_not_from_the_lower_bound():
    archive = archive_of(
        (point(1.0, 0.0), 1.0),
        (point(0.0, 1.0), 0.9),
        (point(-0.5, 0.0), 0.8),
        (point(0.0, 0.0), 0.7),
    )
    kinship = cosine_similarity(coefficients(archive, active_numbers(archive)))
    assert kinship[0, 1] == pytest.approx(0) and kinship[0, 2] == pytest.approx(-1)
    assert kinship[3].tolist() == pytest.approx([0, 0, 0, 0])


def test_a_density_counts_only_where_the_method_reads_it():
    archive = archive_of(
        (point(1, 0, "sparse", 0.4), 1.0), (point(1, 0, "plain", 0.4), 0.5)
    )
    active = active_numbers(archive)
    assert active[:, archive.encoding.columns["density"].start].tolist() == [
        True,
        False,
    ]
    merge = archive.encoding.decode(merge_points(archive, active, 0, 1))
    assert merge["method"] == "sparse" and merge["density"] == pytest.approx(0.4)


def test_the_best_two_are_merged_first():
    archive = archive_of(
        (point(1, 0), 0.5), (point(0, 1), 1.0), (point(1.5, 1.5), 0.9), number=4
    )
    best = proposed(archive)[0]
    assert best["weight/a"] == pytest.approx(0.75) and best[
        "weight/b"
    ] == pytest.approx(1.25)


def test_every_so_often_the_best_meets_its_least_kin():
    rows = ((point(0, 1), 1.0), (point(0.1, 1.2), 0.9), (point(1, -0.2), 0.1))
    told = proposed(archive_of(*rows, number=6), explore=3)[0]
    assert told["weight/a"] == pytest.approx(0.5) and told["weight/b"] == pytest.approx(
        0.4
    )


def test_it_says_nothing_once_the_best_are_alike():
    rows = [(point(1 + i / 1000, 1), 1.0 + i) for i in range(6)] + [
        (point(-0.5, 1.5), 0.0)
    ]
    assert proposed(archive_of(*rows)) == []
    assert proposed(archive_of(*rows), max_kinship=1.0)


def test_merging_sources_pairwise_finds_their_soup():
    space = {name: SPACE[name] for name in ("weight/a", "weight/b")}
    study = optuna.create_study(
        directions=["maximize"] * 2,
        sampler=PointSampler(KinshipProposer(), space=space, n_startup=3),
    )
    for start in (
        {"weight/a": 1.0, "weight/b": 0.0},
        {"weight/a": 0.0, "weight/b": 1.0},
    ):
        study.enqueue_trial(start)
    for _ in range(8):
        trial = study.ask(space)
        a, b = trial.params["weight/a"], trial.params["weight/b"]
        study.tell(trial, [-((a - 0.5) ** 2), -((b - 0.5) ** 2)])
    assert max(sum(t.values) for t in study.trials) > -1e-9


def test_without_numbers_the_choices_are_compared():
    space = {"c": CategoricalDistribution(("a", "b", "c"))}
    study = optuna.create_study(
        directions=["maximize"],
        sampler=PointSampler(KinshipProposer(), space=space, n_startup=2),
    )
    for _ in range(5):
        study.tell(study.ask(space), 1.0)
    assert {t.params["c"] for t in study.trials} == {"a", "b", "c"}
