import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretomerge.evaluate.inference.batching import AdaptiveBatcher


def work_with(limit, done, cost=lambda job: 1):
    def work(batch):
        if sum(map(cost, batch)) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        done.append(list(batch))

    return work


@given(st.lists(st.integers(1, 4), max_size=40), st.integers(1, 20), st.integers(4, 20))
def test_every_job_is_done_once_in_order_within_the_room(jobs, rows, limit):
    done, batcher = [], AdaptiveBatcher(rows)
    batcher.run(work_with(limit, done, lambda job: job), jobs, lambda job: job)
    assert [job for batch in done for job in batch] == jobs
    assert all(
        sum(batch) <= max(rows, batch[0]) and sum(batch) <= limit for batch in done
    )


def test_what_follows_a_batch_without_memory_is_smaller_at_once():
    done, batcher = [], AdaptiveBatcher(16)
    batcher.run(work_with(5, done), list(range(40)))
    assert [len(batch) for batch in done] == [4] * 10 and batcher.max_rows == 4
    batcher.run(work_with(5, done), [1] * 4)
    assert len(done) == 11
    wide = AdaptiveBatcher(16)
    wide.run(work_with(12, [], lambda job: job), [4] * 8, lambda job: job)
    assert wide.max_rows == 8


def test_one_that_finds_no_memory_alone_and_other_errors_are_raised():
    with pytest.raises(RuntimeError, match="allocate memory"):
        AdaptiveBatcher(8).run(work_with(0, []), [1, 2, 3])

    def broken(batch):
        raise RuntimeError("shapes do not fit")

    batcher = AdaptiveBatcher(8)
    with pytest.raises(RuntimeError, match="shapes"):
        batcher.run(broken, [1, 2, 3])
    assert batcher.max_rows == 8
