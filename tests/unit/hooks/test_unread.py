"""What waits to be read is bounded, whatever becomes of the steps."""

from __future__ import annotations

from llmprobe.hooks.vllm.unread import Row, Unread
from llmprobe.record.clock import HOST_STEPS_KEPT

from .scheduled import cached, noted


def fail(where: str, error: Exception) -> None:
    raise error


def row(number: int) -> Row:
    return (number, 0, *noted(cached(a=(number, 1))))


def test_batches_of_steps_that_are_never_recorded_are_not_kept_for_ever() -> None:
    unread = Unread(fail)
    for number in range(1, 20_000):
        unread.rows.append(row(number))
        if number % 100 == 0:
            assert unread.batch(row(number)) is not None
    assert len(unread._read) < 10_000


def test_batches_of_all_steps_that_may_wait_for_their_times_are_kept() -> None:
    unread = Unread(fail)
    count = HOST_STEPS_KEPT
    for number in range(1, count + 1):
        unread.rows.append(row(number))
    assert unread.batch(row(count)) is not None
    for number in range(1, count + 1):
        assert unread.take(row(number)) is not None
    assert not unread._read
