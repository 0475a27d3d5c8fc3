"""Jobs run on time and survive whatever happens in them."""

from __future__ import annotations

import logging

import pytest

from llmprobe.agent.jobs import Jobs


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_job_runs_at_its_own_period(clock: Clock) -> None:
    jobs, ran = Jobs(clock), []
    jobs.add("fast", 0.1, lambda: ran.append("fast"))
    jobs.add("slow", 1.0, lambda: ran.append("slow"))
    while clock.now < 101.95:
        clock.now += jobs.run_due()
    assert ran.count("fast") == 20
    assert ran.count("slow") == 2
    assert ran[:2] == ["fast", "slow"]


def test_a_job_slower_than_its_period_still_leaves_pauses(clock: Clock) -> None:
    jobs, ran = Jobs(clock), []

    def slow() -> None:
        ran.append(clock.now)
        clock.now += 10

    jobs.add("slow", 1.0, slow)
    jobs.run_due()
    clock.now += 0.001
    assert jobs.run_due() > 0.1


def test_errors_are_counted_said_once_a_kind_and_end_nothing(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    jobs, ran = Jobs(clock), []
    failures = iter([OSError("a"), OSError("b"), ValueError("c"), None])

    def failing() -> None:
        if (error := next(failures)) is not None:
            raise error

    jobs.add("bad", 1.0, failing)
    jobs.add("good", 1.0, lambda: ran.append(1))
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            jobs.run_due()
            clock.now += 1
    assert jobs.errors == {"bad": 3}
    assert len(ran) == 4
    assert [record.message.split()[0] for record in caplog.records] == ["bad", "bad"]
    assert jobs.since_success("bad") == 1
    assert jobs.since_success("good") == 1
    assert jobs.since_success("other") is None
