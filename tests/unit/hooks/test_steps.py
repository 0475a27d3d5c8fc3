"""A worker's steps without an engine: what is kept on the step path comes out right once it is written."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm.seams import Running, Seam
from llmprobe.hooks.vllm.steps import WorkerSteps
from llmprobe.hooks.vllm.worker import _KEPT, _WRAPPERS
from llmprobe.record.clock import HOST_STEPS_KEPT, HostClock, Stamps
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.layout import UNKNOWN_PHASE, Clock, Flag, Phase
from llmprobe.settings import Settings

from .scheduled import Scheduled, cached, new
from .stepping import Rig, Runner


class Encoders:
    """Both ways in which vLLM's runners hand inputs to their encoder."""

    failing = False

    def v1(self, scheduler_output: Any) -> list[Any]:
        if self.failing:
            raise RuntimeError("out of memory")
        return [1]

    def v2(self, mm_kwargs: list[Any]) -> list[Any]:
        return mm_kwargs


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_an_encoder_is_timed_when_it_has_something_to_encode(rig: Rig, name: str) -> None:
    rig.steps.use(HostClock(), rig.recorder, Seam(Runner, "forward", "v2"), Seam(Encoders, name, name))
    nothing, something = (
        SimpleNamespace(scheduled_encoder_inputs={}),
        SimpleNamespace(scheduled_encoder_inputs={"a": [0]}),
    )
    for inputs in ([], ["picture"]) if name == "v2" else (nothing, something):
        rig.begin(new("a", 10, scheduled=10))
        assert getattr(Encoders(), name)(inputs) is not None
        Runner().forward()
        rig.end()
    getattr(Encoders(), name)(something if name == "v1" else ["profiling run"])  # in no step
    took = rig.written()["encode_ns"].tolist()
    assert took[0] == 0
    assert took[1] > 0


def test_an_encoder_that_fails_fails_as_without_us(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.steps.use(HostClock(), rig.recorder, Seam(Runner, "forward", "v2"), Seam(Encoders, "v1", "v1"))
    monkeypatch.setattr(Encoders, "failing", True)
    rig.begin(new("a", 10, scheduled=10))
    with pytest.raises(RuntimeError, match="out of memory"):
        Encoders().v1(SimpleNamespace(scheduled_encoder_inputs={"a": [0]}))
    rig.steps.abandon()
    rig.run(new("b", 10, scheduled=10))
    assert len(rig.written()) == 1


def phases(steps: np.ndarray) -> list[int]:
    return [int(phase) for phase in steps["phase"]]


def test_steps_read_late_are_as_if_read_at_once(rig: Rig) -> None:
    rig.run(new("a", 10, scheduled=4))
    rig.run(cached(a=(4, 6)))
    rig.run(cached(a=(10, 1)))
    rig.run(new("b", 5))
    steps = rig.written()
    assert phases(steps) == [Phase.PREFILL, Phase.PREFILL, Phase.DECODE, Phase.PREFILL]
    assert list(steps["prompt_tokens"]) == [4, 6, 0, 5]
    assert list(steps["decode_tokens"]) == [0, 0, 1, 0]
    assert list(steps["sampled"]) == [0, 1, 1, 1]
    assert list(steps["step"]) == [1, 2, 3, 4]
    assert [bool(flags & int(Flag.RESTARTED)) for flags in steps["flags"]] == [True, False, False, False]


def test_what_vllm_changes_after_the_step_does_not_matter(rig: Rig) -> None:
    """The V2 runner hands out the request's own list of tokens, which grows as it generates."""
    step = new("a", 10, scheduled=10)
    drafts = cached(b=(20, 3))
    drafts.scheduled_spec_decode_tokens = {"b": [7, 8]}
    rig.run(step)
    rig.run(drafts)
    tokens = step.scheduled_new_reqs[0].prompt_token_ids
    assert tokens is not None
    tokens += [1] * 5
    drafts.scheduled_spec_decode_tokens["b"].clear()
    rig.run(cached(a=(10, 1)))
    steps = rig.written()
    assert phases(steps) == [Phase.PREFILL, Phase.DECODE, Phase.DECODE]
    assert list(steps["draft_tokens"]) == [0, 2, 0]


def test_outputs_that_make_no_step_are_followed(rig: Rig) -> None:
    """A flush ends "a"; another request of that name starts from its beginning."""
    rig.run(new("a", 10, scheduled=4))
    rig.begin(Scheduled({}, finished_req_ids={"a"}))
    rig.run(cached(a=(4, 1)))
    assert phases(rig.written()) == [Phase.PREFILL, Phase.DECODE]


def test_a_step_whose_model_never_ran_is_not_recorded_but_followed(rig: Rig) -> None:
    rig.run(new("a", 10, scheduled=4))
    rig.run(new("b", 10, scheduled=4), forward=False)
    rig.run(cached(b=(4, 1)))  # were "b" not known, one token would be a decode
    steps = rig.written()
    assert phases(steps) == [Phase.PREFILL, Phase.PREFILL]
    assert list(steps["prompt_tokens"]) == [4, 1]
    assert steps["flags"][1] & int(Flag.RESTARTED)


def test_a_failed_step_is_forgotten_and_its_requests_are_not(rig: Rig) -> None:
    rig.begin(new("a", 10, scheduled=4))
    rig.steps.abandon()
    rig.recorder.publish()
    progress = rig.reader.progress()
    assert progress is not None
    assert progress.begun == progress.ended == 1
    rig.run(cached(a=(4, 1)))
    steps = rig.written()
    assert phases(steps) == [Phase.PREFILL]
    assert list(steps["sampled"]) == [0]


def test_readers_learn_what_the_running_step_works_on(rig: Rig) -> None:
    rig.run(new("a", 10, scheduled=4))
    rig.begin(cached(a=(4, 6)))
    rig.recorder.publish()
    progress = rig.reader.progress()
    assert progress is not None
    assert (progress.begun, progress.phase, progress.tokens) == (2, UNKNOWN_PHASE, 6)
    rig.steps.write()
    rig.recorder.publish()
    progress = rig.reader.progress()
    assert progress is not None
    assert (progress.begun, progress.phase, progress.tokens) == (2, Phase.PREFILL, 6)
    Runner().forward()
    rig.end()
    assert phases(rig.written()) == [Phase.PREFILL, Phase.PREFILL]


def test_without_housekeeping_the_step_path_writes_before_too_many_are_kept(rig: Rig) -> None:
    rig.run(new("a", 1))
    count = HOST_STEPS_KEPT * 3 // 2
    for computed in range(1, count):
        rig.run(cached(a=(computed, 1)))
    steps = rig.written()
    assert len(steps) == count
    assert (np.diff(steps["step"].astype(np.int64)) == 1).all()


def test_off_and_on_starts_with_no_request_known(rig: Rig) -> None:
    rig.run(new("a", 10, scheduled=4))
    rig.probe.remove_patches()
    rig.probe.apply_patches()
    rig.run(cached(a=(4, 1)))  # whoever still knew "a" would take it for its prompt
    steps = rig.written()
    assert phases(steps) == [Phase.PREFILL, Phase.DECODE]
    assert steps["flags"][1] & int(Flag.RESTARTED)


@pytest.mark.parametrize("off", ["before the forward", "in the forward", "before sampling", "in sampling"])
@pytest.mark.parametrize("on", ["before the forward", "in the forward", "before sampling", "in sampling"])
def test_the_time_off_is_no_part_of_any_step(rig: Rig, off: str, on: str) -> None:
    """Off and on come in the middle of steps; calls that are wrapped already are told of their end."""

    def step(scheduled: Scheduled, switched: str, switch: Callable[[], None], hooks: bool) -> None:
        if hooks:
            rig.begin(scheduled)
        wrapped = hooks
        for place, call, inside in (
            ("before the forward", lambda: Runner().forward(), True),
            ("in the forward", lambda: rig.steps.forward_end(None), True),
            ("before sampling", lambda: rig.steps.sample_start(None), False),
            ("in sampling", lambda: rig.steps.sample_end(object()), True),
        ):
            if place == switched:
                switch()
                hooks = not hooks
            # The seam follows at once; a call of the worker's is wrapped to its end, or not at all.
            wrapped = wrapped if inside else hooks
            if wrapped or place == "before the forward":
                call()

    step(new("a", 10, scheduled=4), off, rig.probe.remove_patches, True)
    step(cached(a=(4, 1)), on, rig.probe.apply_patches, False)
    rig.run(cached(a=(5, 1)))
    steps = rig.written()
    assert list(steps["step"]) == [2]
    assert steps["flags"][0] & int(Flag.RESTARTED)


def steps_of(rig: Rig) -> tuple[int, int]:
    """How many steps began and ended, as readers see it."""
    progress = rig.reader.progress()
    return (progress.begun, progress.ended) if progress is not None else (0, 0)


@pytest.mark.parametrize("late", [False, True], ids=["open before", "opened meanwhile"])
def test_while_the_probe_is_off_no_step_is_running(rig: Rig, late: bool) -> None:
    if not late:
        rig.begin(new("a", 10, scheduled=4))
        Runner().forward()
    rig.probe.remove_patches()
    rig.recorder.status(armed=False, inert=False)
    rig.recorder.publish()
    if late:  # the engine's thread had looked whether the probe is on, and went on
        rig.begin(new("a", 10, scheduled=4))
        rig.recorder.publish()
    before = 0 if late else 1
    assert steps_of(rig) == (before, before)
    rig.probe.apply_patches()
    rig.recorder.status(armed=True, inert=False)
    rig.recorder.publish()
    assert steps_of(rig) == (before, before)
    rig.begin(new("b", 10, scheduled=4))
    rig.recorder.publish()
    assert steps_of(rig) == (before + 1, before)


@pytest.mark.swallows
def test_a_step_that_cannot_be_written_takes_no_other_along(rig: Rig) -> None:
    rig.run(new("a", 2))
    rig.run(cached(a=(2, 1)))
    broken = cached(a=(3, 1))
    del broken.scheduled_cached_reqs.num_computed_tokens
    rig.run(broken)
    rig.run(cached(a=(4, 1)))
    steps = rig.written()
    assert list(steps["step"]) == [1, 2, 4]
    assert steps["flags"][2] & int(Flag.RESTARTED)
    assert sum(rig.probe.guard.errors.values()) == 1
    assert rig.steps._clock.dropped == 1  # type: ignore[union-attr]


@pytest.mark.swallows
def test_when_nothing_can_be_written_the_probe_gives_up_at_ten_errors(rig: Rig) -> None:
    for computed in range(30):
        broken = cached(a=(computed, 1))
        del broken.scheduled_cached_reqs.num_computed_tokens
        rig.run(broken)
    assert len(rig.written()) == 0
    assert rig.probe.guard.inert
    assert sum(rig.probe.guard.errors.values()) == 10


@pytest.mark.swallows
def test_steps_whose_write_fails_are_lost_and_counted_and_the_next_are_written(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rig.run(new("a", 2))
    rig.run(cached(a=(2, 1)))
    with monkeypatch.context() as patched:
        patched.setattr("llmprobe.record.journal._pwrite", full)
        rig.steps._records.write()
    rig.run(cached(a=(3, 1)))
    steps = rig.written()
    assert list(steps["step"]) == [3]
    assert steps["flags"][0] & int(Flag.RESTARTED)
    assert rig.steps._clock.dropped == 2  # type: ignore[union-attr]
    assert rig.probe.guard.errors["vllm.harvest"] >= 1
    assert not rig.probe.guard.inert


def test_the_running_step_is_described_while_none_before_it_is_complete(rig: Rig) -> None:
    clock = HostClock()
    clock.harvest = lambda most=0: []  # type: ignore[method-assign]
    rig.use(clock)
    rig.run(new("a", 10, scheduled=4))
    rig.begin(cached(a=(4, 6)))
    rig.steps.write()
    rig.recorder.publish()
    progress = rig.reader.progress()
    assert progress is not None
    assert (progress.begun, progress.phase, progress.tokens) == (2, Phase.PREFILL, 6)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_clock_that_only_the_engine_may_ask_is_left_to_it(rig: Rig, elsewhere: bool) -> None:
    class Engines(HostClock):
        crowded = not elsewhere  # type: ignore[assignment]

    clock = Engines()
    clock.elsewhere = elsewhere
    rig.use(clock)
    rig.run(new("a", 10, scheduled=4))
    rig.begin(cached(a=(4, 6)))
    assert len(rig.written()) == elsewhere
    Runner().forward()
    rig.end()
    assert phases(rig.written()) == [Phase.PREFILL]


class Pooled(HostClock):
    """A clock of few stamps that only the engine's thread may ask, as on a device without a CUDA driver."""

    elsewhere = False
    crowded = True  # type: ignore[assignment]

    def __init__(self, pool: int) -> None:
        super().__init__()
        self._left = pool

    def spare(self) -> Stamps | None:
        if not self._left:
            return None
        self._left -= 1
        stamps = super().spare()
        assert stamps is not None
        stamps.next = None
        return stamps

    def harvest(self, most: int = sys.maxsize) -> list[Stamps]:
        done = super().harvest(most)
        self._left += len(done)
        return done


def dummy(rig: Rig) -> None:
    rig.steps.entered_dummy(None)
    rig.steps.dummy_end(None)


def test_dummy_batches_use_up_no_stamps_where_only_the_engine_harvests(rig: Rig) -> None:
    clock = Pooled(8)
    rig.use(clock)
    for _ in range(100):
        dummy(rig)
    assert list(rig.reader.read().steps["step"]) == list(range(1, 101))
    assert clock.dropped == 0


def test_where_only_the_engine_harvests_steps_without_stamps_make_room(rig: Rig) -> None:
    clock = Pooled(8)
    clock.harvest, harvest = lambda most=0: [], clock.harvest  # type: ignore[assignment, method-assign]
    rig.use(clock)
    rig.run(new("a", 1))
    for context in range(1, 10):  # nothing is complete on the device
        rig.run(cached(a=(context, 1)))
    assert clock.dropped == 2
    clock.harvest = harvest  # type: ignore[method-assign]
    rig.run(cached(a=(10, 1)))
    for context in range(11, 20):
        rig.run(cached(a=(context, 1)))
    assert clock.dropped == 3
    assert len(rig.reader.read().steps) >= 15


def test_a_seam_that_is_never_called_is_given_up_and_said_once(rig: Rig) -> None:
    """Steps are then recorded from their entry on."""
    clock = HostClock()
    rig.use(clock)
    rig.run(new("a", 1), forward=False)
    for context in range(1, 300):
        rig.run(cached(a=(context, 1)), forward=False)
        if context % 50 == 0:
            rig.steps.write()
    steps = rig.written()
    assert list(steps["step"]) == list(range(201, 301))
    assert [bool(flags & int(Flag.RESTARTED)) for flags in steps["flags"]] == [True] + [False] * 99
    assert clock.dropped == 200
    assert rig.reader.counters()["dropped"] == 200
    (note,) = rig.recorder.facts["notes"]
    assert "gaps are lower bounds" in note


def test_a_seam_that_is_called_now_and_then_is_kept(rig: Rig) -> None:
    rig.run(new("a", 1))
    for context in range(1, 600):
        rig.run(cached(a=(context, 1)), forward=context % 150 == 0)
    assert len(rig.written()) == 4
    assert "notes" not in rig.recorder.facts


def test_two_workers_of_one_process_share_the_seam(tmp_path: Path) -> None:
    """One engine after the other in a notebook: the runner's method is wrapped once."""
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    recorder = probe.arm("worker", dict, size=1 << 20)
    assert recorder is not None
    running = Running()
    workers = [WorkerSteps(probe, running) for _ in range(2)]
    for steps in workers:
        steps.use(HostClock(), recorder, Seam(Runner, "forward", "v2"))
        steps.armed = True
    reader = JournalReader(recorder.writer.path, recorder.writer)
    for steps in workers:
        steps.entered(new("a", 3))
        Runner().forward()
        steps.forward_end(None)
        steps.sample_start(None)
        steps.sample_end(object())
        Runner().forward()  # between steps it is nobody's
        steps.write()
    assert len(reader.read().steps) == 2
    probe.writers.append(workers[1].write)
    workers[1].forget()
    assert workers[1].write not in probe.writers
    assert len(probe.on_resumed) == 1
    assert running.steps is None
    probe.remove_patches()
    probe.disarm()


def test_the_last_steps_of_a_worker_that_is_gone_are_written(rig: Rig) -> None:
    rig.run(new("a", 3))
    assert len(rig.reader.read().steps) == 0
    rig.steps.forget()
    assert len(rig.reader.read().steps) == 1


class Visited(HostClock):
    """Notes which threads ask it: on a device each of them is made the device's own, and stays so."""

    def __init__(self) -> None:
        super().__init__()
        self.visitors: list[str] = []

    def harvest(self, most: int = sys.maxsize) -> list[Stamps]:
        self.visitors.append(threading.current_thread().name)
        return super().harvest(most)


@pytest.mark.parametrize("closed", [False, True])
def test_a_worker_that_goes_in_a_thread_of_the_host_is_written_elsewhere(rig: Rig, closed: bool) -> None:
    """Which drops the last reference, or calls `disable`, and goes on with the device that it chose."""
    clock = Visited()
    rig.use(clock)
    rig.probe.writers.append(rig.steps.write)
    rig.run(new("a", 3))
    if closed:
        rig.probe.disarm()
    thread = threading.Thread(target=rig.steps.forget, name="a thread of the host")
    thread.start()
    thread.join()
    assert clock.visitors == []
    for _ in range(2):
        for write in list(rig.probe.writers):  # as the housekeeping thread
            write()
    assert rig.probe.writers == []
    if not closed:
        assert len(rig.reader.read().steps) == 1


@pytest.mark.swallows
def test_an_error_of_ours_does_not_stop_the_engine_from_warming_up_again(rig: Rig) -> None:
    """Waking from sleep warms up once more, with steps that nobody has written yet."""

    class Worker:
        def compile_or_warm_up_model(self) -> str:
            return "warm"

    def broken() -> None:
        raise RuntimeError("the device is gone")

    worker = Worker()
    rig.steps.write = broken  # type: ignore[method-assign]
    setattr(worker, _KEPT, rig.steps)
    rig.probe.patch(Worker, "compile_or_warm_up_model", _WRAPPERS["compile_or_warm_up_model"](rig.probe))
    assert worker.compile_or_warm_up_model() == "warm"
    assert not rig.steps.armed
    assert rig.probe.guard.errors["vllm.disarm"] == 1


class DeviceClock(HostClock):
    """A clock that says it is a device's, whose stamps are dear; it notes which were taken."""

    kind = int(Clock.CUDA)
    immediate = False

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[int] = []

    def mark(self, stamps: Stamps, index: int) -> None:
        self.marks.append(index)
        super().mark(stamps, index)


def test_on_a_device_the_middle_of_every_fifth_step_is_stamped(rig: Rig) -> None:
    clock = DeviceClock()
    rig.use(clock)
    rig.run(new("a", 10))
    for context in range(10, 19):
        rig.run(cached(a=(context, 1)))
    steps = rig.written()
    assert len(steps) == 10
    assert clock.marks.count(0) == clock.marks.count(3) == 10
    assert clock.marks.count(1) == clock.marks.count(2) == 2
    stamped = [number for number, flags in zip(steps["step"], steps["flags"], strict=True) if not flags & 8]
    assert stamped == [5, 10]
    rest = steps[(steps["flags"] & int(Flag.NO_PARTS)) != 0]
    assert (rest["e1"] == rest["e3"]).all() and (rest["e2"] == rest["e3"]).all()


def test_a_worker_on_a_device_without_a_clock_arms_nothing(tmp_path: Path) -> None:
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    steps = WorkerSteps(probe)
    steps.arm(SimpleNamespace(model_runner=Runner(), device="xpu:0"))
    assert not steps.armed
    assert probe.recorder is None
    assert probe.patches == []
    steps.forget()


def test_two_workers_of_one_process_number_their_steps_together(rig: Rig) -> None:
    rig.run(new("a", 1))
    assert rig.recorder.begun == 1
    other = WorkerSteps(rig.probe)
    other.use(HostClock(), rig.recorder, None)
    other.armed = True
    for context in range(1, 4):
        rig.run(cached(a=(context, 1)))
        other.entered(new("b", 1) if context == 1 else cached(b=(context, 1)))
        assert rig.recorder.begun == 2 * context + 1
        other.forward_end(None)
        other.sample_end(object())
    rig.steps.write()
    other.write()
    steps = rig.reader.read().steps
    assert sorted(steps["step"]) == [1, 2, 3, 4, 5, 6, 7]
    apart = steps[steps["step"] > 2]  # between any two of one worker is one of the other's
    assert (apart["flags"] & int(Flag.RESTARTED)).all()
    other.forget()
    rig.run(cached(a=(4, 1)))
    assert rig.recorder.begun == 8


def test_a_worker_that_takes_over_a_recorder_goes_on_with_its_numbers(rig: Rig) -> None:
    for context in range(3):
        rig.run(cached(a=(context, 1)))
    rig.steps.forget()
    assert rig.recorder.begun == 3
    other = WorkerSteps(rig.probe)
    other.use(HostClock(), rig.recorder, None)
    assert other.alone
    other.entered(cached(b=(1, 1)))
    assert rig.recorder.begun == 4


def test_stamps_are_given_back_also_where_a_range_cannot_be_closed(rig: Rig) -> None:
    class Broken:
        open = True

        def end(self) -> None:
            raise RuntimeError("no range is open")

    given: list[Stamps] = []
    clock = HostClock()
    clock.discard = given.append  # type: ignore[method-assign]
    rig.use(clock)
    rig.begin(new("a", 1))
    rig.steps._nvtx = Broken()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="no range is open"):
        rig.steps.abandon()
    assert len(given) == 1
