"""The step clock of a CUDA device: its arithmetic over given event times.

The device here does what no real one can be made to do on purpose (drift, queues of any length). The same
code meets a real one in tests/gpu.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.record import cuda_clock
from llmprobe.record.clock import Stamps
from llmprobe.record.cuda_clock import CudaClock

from .pretended_device import Device, Event, attach


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return attach(monkeypatch, Device())


def submit(clock: CudaClock, device: Device, payload: int, forward: int = 800, sample: int = 200) -> None:
    stamps = clock.begin(payload)
    assert stamps is not None
    clock.mark(stamps, 0)
    device.work(forward)
    clock.mark(stamps, 1)
    clock.mark(stamps, 2)
    device.work(sample)
    clock.mark(stamps, 3)
    clock.finish(stamps)


def test_device_times_come_once_the_step_is_done_and_not_before(device: Device) -> None:
    clock = CudaClock()
    submit(clock, device, 7)
    assert clock.harvest() == []
    device.host_ns += 1000
    (done,) = clock.harvest()
    start = 1_000_000_000
    assert done.times == (start, start + 800, start + 800, start + 1000)
    assert (done.payload, done.restarted) == (7, True)


def test_steps_that_queue_up_follow_each_other_without_a_gap(device: Device) -> None:
    clock = CudaClock()
    for payload in range(3):
        submit(clock, device, payload)
        device.host_ns += 10
    device.host_ns += 5000
    done = [(stamps.payload, stamps.times) for stamps in clock.harvest()]
    assert [payload for payload, _ in done] == [0, 1, 2]
    assert [times[0] - done[0][1][0] for _, times in done] == [0, 1000, 2000]
    assert all(times[3] - times[0] == 1000 for _, times in done)


def test_when_all_stamps_are_in_flight_steps_are_dropped_and_counted(device: Device) -> None:
    clock = CudaClock(pool_size=2)
    submit(clock, device, 0)
    submit(clock, device, 1)
    assert clock.begin(2) is None
    assert clock.dropped == 1
    device.host_ns += 10_000
    assert [stamps.payload for stamps in clock.harvest()] == [0, 1]
    assert clock.harvest() == []  # gives the stamps back
    submit(clock, device, 3)
    device.host_ns += 10_000
    (done,) = clock.harvest()
    assert (done.payload, done.restarted) == (3, True)


def test_nothing_is_recorded_or_asked_while_a_graph_is_captured(device: Device) -> None:
    clock = CudaClock()
    submit(clock, device, 0)
    device.host_ns += 10_000
    device.capturing = True
    assert clock.harvest() == []
    stamps = clock.begin(1)
    assert stamps is not None
    for index in range(4):
        clock.mark(stamps, index)
    assert all(event.at is None for event in stamps.events)
    clock.finish(stamps)
    device.capturing = False
    submit(clock, device, 2)
    device.host_ns += 10_000
    assert [(stamps.payload, stamps.restarted) for stamps in clock.harvest()] == [(0, True), (2, True)]
    assert clock.dropped == 1


def test_all_marks_of_a_step_go_where_its_first_one_went(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps overlap, as of two threads that generate, each on a stream of its own."""
    recorded: list[tuple[Any, Any]] = []
    monkeypatch.setattr(Event, "record", lambda self, stream: recorded.append((self, stream)))
    streams = iter("ab")
    monkeypatch.setattr(device, "current_stream", lambda _: next(streams))
    clock = CudaClock()
    first, second = clock.begin(1), clock.begin(2)
    assert first is not None
    assert second is not None
    clock.mark(first, 0)
    clock.mark(second, 0)
    clock.mark(first, 3)
    clock.mark(second, 3)
    assert [stream for _, stream in recorded] == ["a", "b", "a", "b"]
    assert [event for event, _ in recorded] == [
        first.events[0], second.events[0], first.events[3], second.events[3]
    ]  # fmt: skip


def test_a_host_that_never_steps_in_a_capture_need_not_be_asked_whether_it_does(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = CudaClock(in_captures=False)
    monkeypatch.setattr(clock, "_capturing", lambda: pytest.fail("the driver was asked"))
    submit(clock, device, 0)
    monkeypatch.setattr(clock, "_capturing", lambda: False)
    device.host_ns += 10_000
    assert [stamps.payload for stamps in clock.harvest()] == [0]


def test_a_step_recorded_in_a_capture_all_the_same_is_dropped_and_the_next_one_comes(
    device: Device,
) -> None:
    clock = CudaClock(in_captures=False)
    submit(clock, device, 0)
    clock._flying[0].events[3].captured = True
    submit(clock, device, 1)
    device.host_ns += 10_000
    assert [(stamps.payload, stamps.restarted) for stamps in clock.harvest()] == [(1, True)]
    assert clock.dropped == 1


def test_a_part_of_a_step_recorded_in_a_capture_drops_the_step(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = CudaClock(in_captures=False)
    submit(clock, device, 0)

    clock._flying[0].events[0].captured = True
    submit(clock, device, 1)
    device.host_ns += 10_000
    assert [(stamps.payload, stamps.restarted) for stamps in clock.harvest()] == [(1, True)]
    assert clock.dropped == 1


@pytest.mark.parametrize("asked", ["query", "elapsed_time"])
def test_an_error_of_the_device_is_heard_of_and_no_step_is_lost_uncounted(
    device: Device, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    clock = CudaClock(pool_size=3, in_captures=False)
    for payload in range(3):
        submit(clock, device, payload)

    broken = [stamps.events[3 if asked == "query" else 0] for stamps in list(clock._flying)[1:]]

    def fails(event: Event, *other: Event) -> Any:
        if event in broken or set(broken) & set(other):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return good(event, *other)

    # Of the class: the clock calls what lies below an event's own methods.
    with monkeypatch.context() as patched:
        good = getattr(Event, asked)
        patched.setattr(clock, "_done" if asked == "query" else "_elapsed_ms", fails)
        device.host_ns += 10_000
        assert [stamps.payload for stamps in clock.harvest()] == [0]
        with pytest.raises(RuntimeError, match="illegal memory access"):
            clock.harvest()
    assert clock.dropped == 1
    assert [(stamps.payload, stamps.restarted) for stamps in clock.harvest()] == [(2, True)]
    assert clock.harvest() == []
    assert len(clock._free) == 3


def test_of_steps_that_are_done_few_are_asked(device: Device) -> None:
    """Engines run a step or two ahead of their device."""
    clock = CudaClock()
    for payload in range(25):
        submit(clock, device, payload)
    device.host_ns += 10 * 25 * 1000
    for payload in range(25, 27):
        submit(clock, device, payload)
    assert [stamps.payload for stamps in clock.harvest()] == list(range(25))
    assert device.queries == 4  # the two that run, the one before, and the first of those two in its turn
    assert device.refused == 0


def test_however_far_behind_a_device_is_no_more_than_a_few_are_asked_in_vain(device: Device) -> None:
    clock = CudaClock()
    for payload in range(100):
        submit(clock, device, payload)
    assert clock.harvest() == []
    assert device.queries <= 5


def test_of_the_first_steps_only_so_many_are_asked_as_are_wanted(device: Device) -> None:
    clock = CudaClock()
    for payload in range(40):
        submit(clock, device, payload)
    device.host_ns += 20_000
    assert [stamps.payload for stamps in clock.harvest(4)] == [0, 1, 2, 3]
    assert device.queries == 1
    assert [stamps.payload for stamps in clock.harvest(1)] == [4]
    assert [stamps.payload for stamps in clock.harvest()] == list(range(5, 20))


def test_a_step_of_another_stream_is_asked_for_itself(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = CudaClock()
    for stream in "aba":
        monkeypatch.setattr(device, "current_stream", lambda _, stream=stream: stream)
        submit(clock, device, 0)
    device.host_ns += 10_000
    clock._flying[1].events[3].at = 1_000_050_000
    assert len(clock.harvest()) == 1
    assert device.refused == 0
    device.host_ns += 100_000
    assert len(clock.harvest()) == 2


def test_an_end_that_was_recorded_behind_a_later_step_s_costs_nothing(device: Device) -> None:
    """Of two threads on one stream the one that finishes first need not have recorded first."""
    clock = CudaClock()
    for payload in range(3):
        submit(clock, device, payload)
    clock._flying[1].events[3].at = 1_000_050_000
    device.host_ns += 10_000
    assert [stamps.payload for stamps in clock.harvest()] == [0]
    assert clock.harvest() == []
    device.host_ns += 100_000
    assert [(stamps.payload, stamps.restarted) for stamps in clock.harvest()] == [(1, False), (2, False)]
    assert clock.dropped == 0


def test_the_newest_may_be_recorded_in_a_capture(device: Device) -> None:
    clock = CudaClock(in_captures=False)
    for payload in range(3):
        submit(clock, device, payload)
    clock._flying[2].events[3].captured = True
    device.host_ns += 10_000
    assert [stamps.payload for stamps in clock.harvest()] == [0, 1]
    assert (clock.harvest(), clock.dropped) == ([], 1)


class Asking(CudaClock):
    """Asks every step for itself."""

    def _newest_done(self, most: int) -> Stamps | None:
        return None


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.integers(1, 3000),
            st.sampled_from(["good"] * 8 + ["captured", "no end"]),
            st.none() | st.integers(0, 4000),
            st.integers(1, 20),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_whoever_is_not_asked_comes_as_if_asked(
    steps: list[tuple[str, int, str, int | None, int]],
) -> None:
    """On two streams, of which neither waits for the other."""
    seen = []
    for kind in (Asking, CudaClock):
        with pytest.MonkeyPatch.context() as monkeypatch:
            device = attach(monkeypatch, Device())
            streams = {"a": 0.0, "b": 0.0}

            def record(self: Event, stream: str, streams: dict[str, float] = streams) -> None:
                self.at = max(streams[stream], self.device.host_ns)

            monkeypatch.setattr(Event, "record", record)
            clock, found = kind(pool_size=16, in_captures=False), []
            for number, (stream, work, fate, pause, most) in enumerate(steps):
                monkeypatch.setattr(device, "current_stream", lambda _, stream=stream: stream)
                stamps = clock.begin(number)
                if stamps is not None:
                    clock.mark(stamps, 0)
                    streams[stream] = max(streams[stream], device.host_ns) + work
                    if fate != "no end":
                        clock.mark(stamps, 3)
                    stamps.events[3].captured = fate == "captured"
                    clock.finish(stamps)
                if pause is not None:
                    device.host_ns += pause
                    found += [
                        (number, done.payload, done.times, done.restarted) for done in clock.harvest(most)
                    ]
            seen.append((found, clock.dropped))
    assert seen[0] == seen[1]


def test_stamps_of_dropped_steps_are_used_again(device: Device) -> None:
    clock = CudaClock(pool_size=2)
    for _ in range(5):
        stamps = clock.begin(0)
        assert stamps is not None
        clock.finish(stamps)
        assert clock.harvest() == []
    assert clock.dropped == 5


def test_marks_of_an_earlier_use_do_not_show_in_a_later_one(device: Device) -> None:
    clock = CudaClock(pool_size=1)
    submit(clock, device, 0)
    device.host_ns += 10_000
    clock.harvest()
    clock.harvest()
    stamps = clock.begin(1)
    assert stamps is not None
    clock.mark(stamps, 0)
    device.work(500)
    clock.mark(stamps, 3)
    clock.finish(stamps)
    device.host_ns += 10_000
    (done,) = clock.harvest()
    e0, e1, e2, e3 = done.times
    assert e1 == e2 == e3 == e0 + 500


def encode(clock: CudaClock, device: Device, times: int) -> Stamps:
    stamps = clock.begin(None)
    assert stamps is not None
    for _ in range(times):
        clock.encode_begin(stamps)
        device.work(300)
        clock.encode_end(stamps)
    device.work(50)  # what is enqueued between the encoder and the forward
    clock.mark(stamps, 0)
    device.work(700)
    clock.mark(stamps, 3)
    clock.finish(stamps)
    device.host_ns += 10_000
    (done,) = clock.harvest()
    return done


def test_an_encoder_is_timed_by_a_pair_of_its_own(device: Device) -> None:
    clock = CudaClock(pool_size=1)
    done = encode(clock, device, 2)
    assert (done.encode_ns, done.times[3] - done.times[0]) == (600, 700)
    clock.harvest()  # gives the stamps back
    assert encode(clock, device, 0).encode_ns == 0
    clock.harvest()
    assert encode(clock, device, 20).encode_ns == 8 * 300, "bounded"


def test_events_of_encoders_are_used_again(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CudaClock(pool_size=1)
    made: list[Event] = []
    monkeypatch.setattr(clock, "_new_event", lambda: made.append(Event(device)) or made[-1])
    for _ in range(5):
        encode(clock, device, 1)
        clock.harvest()
    assert len(made) == 2 + 1, "one pair, and the end of the step before"


def test_an_encoder_that_is_not_done_with_the_step_has_no_time(device: Device) -> None:
    """On a stream of its own, say: asking CUDA for the time of an event that has not happened raises."""
    clock = CudaClock()
    stamps = clock.begin(None)
    assert stamps is not None
    clock.encode_begin(stamps)
    clock.encode_end(stamps)
    stamps.encodes[1].at = 1e15
    clock.mark(stamps, 0)
    clock.mark(stamps, 3)
    clock.finish(stamps)
    device.host_ns += 10_000
    (done,) = clock.harvest()
    assert done.encode_ns == 0


def test_an_encoder_that_begins_in_a_capture_or_never_ends_has_no_time(device: Device) -> None:
    clock = CudaClock()
    stamps = clock.begin(None)
    assert stamps is not None
    clock.encode_end(stamps)
    device.capturing = True
    clock.encode_begin(stamps)
    device.capturing = False
    clock.encode_begin(stamps)
    for index in (0, 3):
        clock.mark(stamps, index)
    clock.finish(stamps)
    device.host_ns += 10_000
    (done,) = clock.harvest()
    assert done.encode_ns == 0


@given(
    speed=st.floats(1 - 2e-4, 1 + 2e-4),
    steps=st.lists(
        st.tuples(st.integers(1, 2_000_000), st.integers(0, 3_000_000), st.booleans()),
        min_size=1,
        max_size=80,
    ),
)
@settings(deadline=None, max_examples=60)
def test_times_stay_between_recording_and_seeing_whatever_the_drift(
    speed: float, steps: list[tuple[int, int, bool]]
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        device = attach(monkeypatch, Device(speed))
        clock = CudaClock(pool_size=4)
        recorded: list[int] = []
        for number, (forward, pause, wait) in enumerate(steps):
            stamps = clock.begin(number)
            recorded.append(device.host_ns)
            if stamps is not None:
                clock.mark(stamps, 0)
                device.work(forward)
                clock.mark(stamps, 3)
                clock.finish(stamps)
            if wait:
                device.host_ns = int(max(device.busy_until, device.host_ns)) + 1
            device.host_ns += pause
            for done in clock.harvest():
                e0, _, _, e3 = done.times
                assert recorded[done.payload] <= e0 <= e3
                # A device clock that runs fast may make a single span end a shade late.
                assert e3 <= device.host_ns + (e3 - e0) * 3e-4 + 1
                assert abs((e3 - e0) - steps[done.payload][0] * speed) <= 1


def test_another_thread_makes_the_clocks_device_its_own_meanwhile(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a rank other than 0 it would otherwise open a context on device 0. It may be a thread of the
    program, which goes on with a device and a mode of its own."""
    modes: list[int] = []
    mode = ctypes.c_int(0)

    def exchange(found: Any) -> None:
        given = found._obj
        mode.value, given.value = given.value, mode.value
        modes.append(mode.value)

    monkeypatch.setattr(cuda_clock, "_capture_mode_switch", lambda: exchange)
    clock = CudaClock("cuda:1")
    for payload in range(2):
        submit(clock, device, payload)
        device.host_ns += 10_000
        thread = threading.Thread(target=clock.harvest)
        thread.start()
        thread.join()
    clock.harvest()
    assert device.visited == [(True, "cuda:1")] * 2  # never in the engine's
    assert device.current == "cuda:0"
    assert {on for elsewhere, on in device.asked_on if elsewhere} == {"cuda:1"}
    assert modes == [1, 0] * 2  # thread-local, and global again


def test_spare_stamps_are_all_of_the_pool_and_come_back_to_it(device: Device) -> None:
    clock = CudaClock(pool_size=20, in_captures=False)
    spare: Stamps | None = None

    def step(number: int) -> bool:
        nonlocal spare
        stamps = spare or clock.spare()
        if stamps is None:
            clock.restart()
            return False
        stamps.payload, spare = number, stamps.next
        clock.mark(stamps, 0)
        device.work(100)
        assert clock.record is not None  # what stands for mark 3 in a step of vLLM's
        clock.record(stamps.events[3], stamps.stream)
        stamps.marked |= 8
        clock.finish(stamps)
        return True

    assert [step(number) for number in range(21)] == [True] * 20 + [False]
    device.host_ns += 10_000
    assert [stamps.payload for stamps in clock.harvest()] == list(range(20))
    assert not step(21)  # they are the reader's until the next harvest
    assert clock.harvest() == []
    assert step(22) and step(23)
    device.host_ns += 10_000
    assert [(stamps.payload, stamps.restarted) for stamps in clock.harvest()] == [(22, True), (23, False)]


def test_a_hole_is_left_once_and_only_the_step_behind_it_says_so(device: Device) -> None:
    clock = CudaClock()
    submit(clock, device, 0)
    for _ in range(5):
        clock.restart()
    assert len(clock._flying) == 2
    submit(clock, device, 1)
    submit(clock, device, 2)
    device.host_ns += 10_000
    restarted = [(stamps.payload, stamps.restarted) for stamps in clock.harvest()]
    assert restarted == [(0, True), (1, True), (2, False)]
    assert clock.dropped == 0
