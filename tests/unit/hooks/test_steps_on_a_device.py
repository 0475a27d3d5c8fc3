"""A vLLM worker's steps by the clock of a CUDA device; see test_steps.py for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from record.pretended_device import Device, attach

from llmprobe.hooks.vllm import step_path
from llmprobe.record.cuda_clock import CudaClock
from llmprobe.record.layout import Flag

from .scheduled import cached, new
from .stepping import Rig, Runner


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = attach(monkeypatch, Device())
    monkeypatch.setattr(step_path, "_now", device.monotonic_ns)
    return device


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def on_cuda(rig: Rig, pool_size: int = 64) -> CudaClock:
    clock = CudaClock(pool_size=pool_size, in_captures=False)
    clock.elsewhere = True  # as with the driver's library, which this machine may not have
    rig.use(clock)
    return clock


def run(rig: Rig, device: Device, context: int) -> None:
    """A step that the device works 1 ms on."""
    rig.begin(cached(a=(context, 1)))
    Runner().forward()
    device.work(1_000_000)
    rig.end()


def test_steps_have_the_times_of_the_device(rig: Rig, device: Device) -> None:
    clock = on_cuda(rig)
    rig.run(new("a", 10))
    for context in range(10, 20):
        run(rig, device, context)
    assert len(rig.written()) < 11  # the device is behind
    device.host_ns += 20_000_000
    run(rig, device, 20)  # after a gap
    device.host_ns += 20_000_000
    steps = rig.written()[-10:]
    span, gap = steps["e3"] - steps["e0"], steps["e0"][1:] - steps["e3"][:-1]
    assert (span == 1_000_000).all()
    assert (gap[:-1] == 0).all() and gap[-1] > 9_000_000
    assert (steps["step"] == range(steps["step"][0], steps["step"][0] + 10)).all()
    assert not (steps["flags"] & int(Flag.RESTARTED)).any()
    assert clock.dropped == 0


def test_steps_that_wait_for_the_device_are_given_up_only_where_all_stamps_do(
    rig: Rig, device: Device
) -> None:
    clock = on_cuda(rig, pool_size=4)
    for context in range(6):
        run(rig, device, context)
    assert clock.dropped == 2
    device.host_ns += 20_000_000
    assert list(rig.written()["step"]) == [1, 2, 3, 4]
    rig.written()  # gives them back
    run(rig, device, 7)
    device.host_ns += 20_000_000
    (step,) = rig.written()
    assert step["step"] == 7 and step["flags"] & int(Flag.RESTARTED)
    assert rig.recorder.begun == 7


def test_marks_follow_the_current_stream_within_five_steps(rig: Rig, device: Device) -> None:
    clock = on_cuda(rig)
    rig.run(new("a", 10))
    for context in range(10, 20):
        run(rig, device, context)
    device.stream = "other"
    for context in range(20, 30):
        run(rig, device, context)
    device.host_ns += 30_000_000
    done = clock.harvest()
    assert [stamps.stream for stamps in done[:11]] == ["main"] * 11
    assert [stamps.stream for stamps in done[-6:]] == ["other"] * 6
    assert all(stamps.events[0].stream == stamps.stream for stamps in done)


def test_a_worker_that_warms_up_again_asks_which_stream_is_current(rig: Rig, device: Device) -> None:
    on_cuda(rig)
    rig.run(new("a", 10))
    run(rig, device, 10)
    device.stream = "other"
    clock = on_cuda(rig)
    run(rig, device, 11)
    device.host_ns += 20_000_000
    assert [stamps.stream for stamps in clock.harvest()] == ["other"]


def test_marks_follow_a_program_that_changes_the_stream_with_each_call(rig: Rig, device: Device) -> None:
    clock = on_cuda(rig)
    expected = []
    for number in range(10):
        device.stream = "main" if number % 2 else "other"
        for scheduled in (new(f"r{number}", 10), cached(**{f"r{number}": (10, 1)})):
            rig.run(scheduled)
            expected.append(device.stream)
    device.host_ns += 20_000_000
    assert [stamps.stream for stamps in clock.harvest()] == expected


def test_after_a_pause_marks_are_on_the_current_stream(rig: Rig, device: Device) -> None:
    clock = on_cuda(rig)
    rig.run(new("a", 10))
    run(rig, device, 10)
    for call in rig.probe.on_paused:
        call()
    device.stream = "other"
    for call in rig.probe.on_resumed:
        call()
    run(rig, device, 11)
    device.host_ns += 20_000_000
    assert [stamps.stream for stamps in clock.harvest()] == ["main", "main", "other"]


def test_which_stream_is_current_is_asked_in_every_fifth_step_only(
    rig: Rig, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(device, "current_stream", lambda index: asked.append(index) or "main")
    on_cuda(rig)
    rig.run(new("a", 10))  # the first step
    for context in range(10, 29):
        run(rig, device, context)
    assert len(asked) == 1 + 20 // 5


def test_a_step_that_the_device_waited_for_begins_when_the_host_recorded_it(rig: Rig, device: Device) -> None:
    """Whether the clock was asked for it or the hook recorded the event itself."""
    on_cuda(rig)
    rig.run(new("a", 10))
    device.speed = 0.999  # its clock is slower than the host's
    begun = []
    for context in range(10, 20):
        device.host_ns += 500_000_000
        begun.append(device.host_ns)
        run(rig, device, context)
    device.host_ns += 20_000_000
    assert list(rig.written()["e0"][-10:]) == begun
