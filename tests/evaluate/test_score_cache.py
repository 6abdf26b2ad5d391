import sqlite3
from pathlib import Path

import numpy as np
import pytest

from paretomerge.errors import EvaluationError
from paretomerge.evaluate import score_cache
from paretomerge.evaluate.score_cache import ScoreCache
from tests.evaluate.test_evaluate import harness, live


def test_what_is_kept_comes_back_and_more_extends_it(tmp_path):
    kept = ScoreCache(tmp_path / "deep" / "kept.db")
    assert kept.get("m", "t") == {}
    kept.add("m", "t", {"a": 1.0, "b": np.float64(0.5)})
    ScoreCache(tmp_path / "deep" / "kept.db").add("m", "t", {"c": [1.5, 2]})
    assert kept.get("m", "t") == {"a": 1.0, "b": 0.5, "c": [1.5, 2]}
    assert kept.get("m", "u") == kept.get("n", "t") == {}
    kept.add("m", "t", {"d": object()})
    assert set(kept.get("m", "t")) == {"a", "b", "c"}


def test_a_file_that_is_no_cache_is_told(tmp_path: Path):
    (tmp_path / "kept.db").write_text(
        "no database, but long enough to be looked at " * 20
    )
    with pytest.raises(EvaluationError, match="cannot be used as a file of scores"):
        ScoreCache(tmp_path / "kept.db")


class Asked:
    """How many requests a harness sends to its model."""

    def __init__(self, evaluator, monkeypatch):
        self.numbers = []
        respond = evaluator._respond
        monkeypatch.setattr(
            evaluator,
            "_respond",
            lambda live, instances, options: (
                self.numbers.append(len(instances)) or respond(live, instances, options)
            ),
        )


def test_no_item_is_asked_twice_of_a_merge_and_more_items_extend(
    specialists, tmp_path, monkeypatch
):
    model = live(specialists / "models" / "scribe")
    known = type(model)(model.model, model.tokenizer, {}, "scribe")
    fresh = harness(specialists, "reverse", "sort").evaluate(known, "search")
    small = harness(
        specialists,
        "reverse",
        "sort",
        search_items=30,
        cache=ScoreCache(tmp_path / "kept.db"),
    )
    larger = harness(
        specialists, "reverse", "sort", cache=ScoreCache(tmp_path / "kept.db")
    )  # another study: 40 items each
    asked, more = Asked(small, monkeypatch), Asked(larger, monkeypatch)
    small.evaluate(known, "search")
    assert small.evaluate(known, "search")["sort"].example_scores == fresh[
        "sort"
    ].example_scores[:30] and asked.numbers == [60, 0]
    assert larger.evaluate(known, "search") == fresh and more.numbers == [20]
    larger.evaluate(type(model)(model.model, model.tokenizer, {}, "another"), "search")
    larger.evaluate(model, "search")  # a model that nobody has named
    assert more.numbers == [20, 80, 80]


def test_another_metric_or_task_has_outcomes_of_its_own(specialists, tmp_path):
    kept = ScoreCache(tmp_path / "kept.db")
    sort = harness(specialists, "sort", cache=kept).examples("search")["sort"]
    reverse = harness(specialists, "reverse", cache=kept).examples("search")["reverse"]
    again = harness(specialists, "sort", seed=3).examples("search")["sort"]
    assert (
        sort.scoring_digest != reverse.scoring_digest
        and sort.scoring_digest == again.scoring_digest
        and sort.request_digests == again.request_digests
    )
    assert not set(sort.request_digests) & set(
        harness(specialists, "sort").examples("held_out")["sort"].request_digests
    )


def test_a_cache_that_is_locked_for_long_fails_no_merge(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(score_cache, "_LOCK_TIMEOUT", 0.01)
    file = tmp_path / "kept.db"
    cache = ScoreCache(file)
    cache.add("m", "t", {"a": 1.0})
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert cache.get("m", "t") == {}
    cache.add("m", "t", {"b": 0.0})
    (message,) = caplog.messages
    assert str(file) in message and "database is locked" in message
    holder.close()
    assert cache.get("m", "t") == {"a": 1.0}
    cache.add("m", "t", {"c": 0.5})
    assert cache.get("m", "t") == {"a": 1.0, "c": 0.5}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_cache_that_cannot_be_written_fails_no_merge(tmp_path, caplog):
    # A folder cannot be made below a device, as none can on a disk that is read-only.
    cache = ScoreCache(Path("/dev/full/deep/kept.db"))
    cache.add("m", "t", {"a": 1.0})
    cache.add("m", "t", {"b": 1.0})
    assert cache.get("m", "t") == {}
    (message,) = caplog.messages
    assert "Scores are computed without it" in message
