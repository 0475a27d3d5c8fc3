"""The step clock of a host, as it runs."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from llmprobe.record.clock import HOST_STEPS_KEPT, HostClock
from llmprobe.record.clocks import no_clock, step_clock
from llmprobe.record.layout import Clock


def run_step(clock: HostClock, payload: Any, marks: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    stamps = clock.begin(payload)
    assert stamps is not None
    for index in marks:
        clock.mark(stamps, index)
    clock.finish(stamps)


def test_host_times_lie_between_the_calls_around_them() -> None:
    clock = HostClock()
    before = time.monotonic_ns()
    run_step(clock, "payload")
    after = time.monotonic_ns()
    (done,) = clock.harvest()
    assert done.payload == "payload"
    assert (before, *done.times, after) == tuple(sorted((before, *done.times, after)))
    assert clock.harvest() == []
    assert (clock.name, clock.kind) == ("host", Clock.HOST)


def test_marks_left_out_fall_on_their_neighbours() -> None:
    clock = HostClock()
    run_step(clock, 0, (0, 1, 3))
    run_step(clock, 1, (0, 3))
    first, second = clock.harvest()
    assert first.times[2] == first.times[1] < first.times[3]
    assert second.times[1] == second.times[2] == second.times[3]


def test_a_step_without_start_or_end_is_dropped_and_the_next_restarts() -> None:
    clock = HostClock()
    run_step(clock, 0)
    run_step(clock, 1)
    run_step(clock, 2, (1, 3))
    run_step(clock, 3)
    run_step(clock, 4)
    done = clock.harvest()
    assert [stamps.payload for stamps in done] == [0, 1, 3, 4]
    assert [stamps.restarted for stamps in done] == [True, False, True, False]
    assert clock.dropped == 1


@pytest.mark.parametrize("break_chain", ["discard", "restart"])
def test_a_discarded_step_and_a_pause_make_the_next_one_restart(break_chain: str) -> None:
    clock = HostClock()
    run_step(clock, 0)
    if break_chain == "discard":
        stamps = clock.begin(1)
        assert stamps is not None
        clock.discard(stamps)
    else:
        clock.restart()
    run_step(clock, 2)
    assert [(stamps.payload, stamps.restarted) for stamps in clock.harvest()] == [(0, True), (2, True)]


def test_steps_that_nobody_harvests_take_no_more_memory_than_the_pool() -> None:
    clock = HostClock()
    for number in range(3 * HOST_STEPS_KEPT):
        run_step(clock, number)
    assert [stamps.payload for stamps in clock.harvest()] == list(
        range(2 * HOST_STEPS_KEPT, 3 * HOST_STEPS_KEPT)
    )


def test_threads_harvest_every_step_once() -> None:
    clock = HostClock()
    seen: list[int] = []

    def work(first: int) -> None:
        for number in range(first, first + 200):
            run_step(clock, number)
            seen.extend(stamps.payload for stamps in clock.harvest())

    threads = [threading.Thread(target=work, args=(1000 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [1000 * index + number for index in range(4) for number in range(200)]


def test_a_cpu_device_gets_the_host_clock() -> None:
    assert isinstance(step_clock("cpu"), HostClock)


@pytest.mark.parametrize("device", ["xpu:0", "mps", "npu:1", "hpu"])
def test_a_device_that_works_on_its_own_has_no_host_clock(device: str) -> None:
    assert step_clock(device) is None
    assert device in no_clock(device)
