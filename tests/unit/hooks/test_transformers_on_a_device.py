"""Steps of ``generate`` by the clock of a CUDA device, where a mark is an event and takes the host time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record import pretended_device
from record.pretended_device import Device, attach

from llmprobe.hooks import transformers_model, transformers_program, transformers_tracker
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.transformers_generation import Generation
from llmprobe.hooks.transformers_tracker import Tracker
from llmprobe.record.cuda_clock import CudaClock
from llmprobe.record.journal_reader import JournalReader
from llmprobe.settings import Settings

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from .tiny_llama import tiny_llama_on as model  # noqa: E402

EVENT_NS = 10_000  # an event recorded
READ_NS = 100  # and the clock read


class Ticking(Device):
    def monotonic_ns(self) -> int:
        if threading.current_thread() is threading.main_thread():  # one hand on the clock
            self.host_ns += READ_NS
        return self.host_ns

    def Event(self, enable_timing: bool) -> Slow:
        assert enable_timing
        return Slow(self)


class Slow(pretended_device.Event):
    def record(self, stream: str) -> None:
        super().record(stream)
        self.device.host_ns += EVENT_NS


class Loop:
    """What the wrappers call around a decoding loop; the device works ``forward_ns`` on each forward."""

    def __init__(self, tracker: Tracker, device: Ticking, forward_ns: int) -> None:
        self.tracker, self.device, self.forward_ns = tracker, device, forward_ns
        self.ids = torch.ones(1, 4, dtype=torch.long)
        call = tracker.enter(model("cuda:0"), (self.ids,), {})
        assert call is not None
        self.call: Generation = call
        tracker.enter_loop(call, "_sample", (self.ids,), {})
        self.following = False

    def forward(self, *, overs: int = 1) -> None:
        ids = self.ids[:, :1] if self.following else self.ids
        self.following = True
        self.tracker.before_prepare(self.call)
        self.tracker.begin_step(self.call, {"input_ids": ids}, (self.ids,), {})
        self.device.work(self.forward_ns)
        for _ in range(overs):
            self.tracker.forward_end(self.call, None, 1)
            self.device.host_ns += 1000

    def step(self, *, overs: int = 1) -> None:
        self.forward(overs=overs)
        self.device.host_ns += self.forward_ns  # the loop waits for the token
        self.tracker.end_step(self.call)
        self.tracker.boundary(self.call, True)

    def leave(self, *, failed: bool = False) -> None:
        self.device.host_ns += 10 * self.forward_ns
        self.tracker.pop(self.call)
        self.tracker.leave(self.call, None, failed)


@pytest.fixture(params=[True, False], ids=["elsewhere", "here"])
def elsewhere(request: pytest.FixtureRequest) -> bool:
    """Whether the housekeeping thread may ask for events."""
    return bool(request.param)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> Ticking:
    device = Ticking()

    def clock(_: Any) -> CudaClock:
        made = CudaClock()
        made.elsewhere = elsewhere  # which the driver's library decides otherwise
        return made

    attach(monkeypatch, device)
    monkeypatch.setattr(transformers_tracker, "_now", device.monotonic_ns)
    monkeypatch.setattr(transformers_program, "step_clock", clock)
    for module in (transformers_program, transformers_model):
        monkeypatch.setattr(module, "device_facts", lambda device: {"type": device.type, "name": str(device)})
    return device


@pytest.fixture
def tracker(tmp_path: Path, device: Ticking) -> Iterator[Tracker]:
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    yield Tracker(probe)
    probe.disarm()


def steps_of(tracker: Tracker) -> np.ndarray:
    recorder = tracker._probe.recorder
    assert recorder is not None
    return JournalReader(recorder.writer.path, recorder.writer).read().steps


def test_a_step_books_what_its_events_and_all_else_of_ours_take(tracker: Tracker, device: Ticking) -> None:
    loop = Loop(tracker, device, 1_000_000)
    for _ in range(8):
        loop.step()
    loop.leave()
    own: Any = steps_of(tracker)["own_ns"]
    assert len(own) == 8
    # Begin and end of the forward, and the end of the step before.
    assert (own >= 2 * EVENT_NS).all() and (own[1:] >= 3 * EVENT_NS).all()
    assert (own < 4 * EVENT_NS).all()


@pytest.mark.parametrize("elsewhere", [False], ids=["here"], indirect=True)
def test_where_no_other_thread_may_long_steps_are_written_as_they_end(
    tracker: Tracker, device: Ticking
) -> None:
    """Sixteen steps of 200 ms would come after the seconds that a verdict looks at."""
    loop = Loop(tracker, device, 200_000_000)
    for number in range(5):
        loop.step()
        tracker.write()
        assert len(steps_of(tracker)) == number  # all but the last one


@pytest.mark.parametrize("elsewhere", [False], ids=["here"], indirect=True)
def test_and_short_ones_wait_for_each_other(tracker: Tracker, device: Ticking) -> None:
    loop = Loop(tracker, device, 1_000_000)
    loop.step()
    seen = []
    for _ in range(30):
        loop.step()
        seen.append(len(steps_of(tracker)))
    assert set(seen) == {0, 16}


@pytest.mark.parametrize("elsewhere", [True], ids=["elsewhere"], indirect=True)
@pytest.mark.parametrize("forward_ns", [1_000_000, 200_000_000])
def test_where_the_housekeeping_thread_may_it_writes_them(
    tracker: Tracker, device: Ticking, forward_ns: int
) -> None:
    loop = Loop(tracker, device, forward_ns)
    for _ in range(30):
        loop.step()
    assert len(steps_of(tracker)) == 0
    tracker.write()
    assert len(steps_of(tracker)) == 30


@pytest.mark.parametrize("elsewhere", [True], ids=["elsewhere"], indirect=True)
def test_what_it_writes_while_steps_go_on_is_whole_and_in_order(tracker: Tracker, device: Ticking) -> None:
    loop = Loop(tracker, device, 1_000_000)
    over = threading.Event()

    def keep_house() -> None:
        while not over.is_set():
            tracker.write()
            time.sleep(0.0005)

    thread = threading.Thread(target=keep_house)
    thread.start()
    try:
        for _ in range(400):
            loop.step()
    finally:
        over.set()
        thread.join()
    loop.leave()
    steps: Any = steps_of(tracker)
    assert list(steps["step"]) == list(range(1, 401))
    assert (steps["e0"][1:] >= steps["e3"][:-1]).all()


@pytest.mark.parametrize("elsewhere", [True], ids=["elsewhere"], indirect=True)
def test_a_draft_s_call_in_the_middle_of_another_writes_nothing(tracker: Tracker, device: Ticking) -> None:
    """It comes with each step of assisted decoding."""
    loop = Loop(tracker, device, 1_000_000)
    loop.step()
    draft = model("cuda:0")
    draft.generation_config.is_assistant = True
    ids = torch.ones(1, 4, dtype=torch.long)
    assisting = tracker.enter(draft, (ids,), {})
    assert assisting is not None
    assert assisting.kind == "draft"
    tracker.pop(assisting)
    tracker.leave(assisting, None, False)
    assert len(steps_of(tracker)) == 0
    loop.leave()
    assert len(steps_of(tracker)) == 1


@pytest.mark.parametrize("elsewhere", [True], ids=["elsewhere"], indirect=True)
def test_if_it_never_comes_no_step_is_lost(tracker: Tracker, device: Ticking) -> None:
    loop = Loop(tracker, device, 1_000_000)
    for _ in range(1200):
        loop.step()
    loop.leave()
    assert list(steps_of(tracker)["step"]) == list(range(1, 1201))


def test_a_forward_ends_once_though_a_class_and_its_base_class_say_so(
    tracker: Tracker, device: Ticking
) -> None:
    loop = Loop(tracker, device, 0)
    for _ in range(3):
        loop.step(overs=2)
    loop.leave()
    steps: Any = steps_of(tracker)
    # It would end 1 us later, after the second.
    assert (steps["e1"] - steps["e0"] < EVENT_NS + 1000).all()


@pytest.mark.parametrize("forwarded", [True, False])
def test_of_a_call_that_fails_the_step_whose_forward_was_over_is_kept(
    tracker: Tracker, device: Ticking, forwarded: bool
) -> None:
    loop = Loop(tracker, device, 1_000_000)
    loop.step()
    if forwarded:
        loop.forward()
    else:
        loop.forward(overs=0)
    loop.leave(failed=True)
    device.host_ns += 1_000_000_000
    tracker._write(tracker._program, [], wait=False)  # type: ignore[arg-type]
    assert len(steps_of(tracker)) == 1 + forwarded


@pytest.mark.swallows
def test_a_call_that_fails_with_the_device_is_a_request_all_the_same(
    tracker: Tracker, device: Ticking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an assertion on the device each call into the driver raises."""
    loop = Loop(tracker, device, 1_000_000)
    loop.step()
    loop.forward()

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    program = tracker._program
    assert program is not None
    monkeypatch.setattr(program.clock, "mark", refuse)
    loop.leave(failed=True)
    recorder = tracker._probe.recorder
    assert recorder is not None
    counters = JournalReader(recorder.writer.path, recorder.writer).counters()
    assert (counters["requests_aborted"], counters["errors"]) == (1, 1)
    assert len(steps_of(tracker)) == 1
