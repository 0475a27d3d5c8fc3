"""However a vLLM step ends, its NVTX ranges are closed: hooks round a worker, and a profiler that listens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.hooks import probe as probes
from llmprobe.hooks.vllm.worker import _KEPT, _WRAPPERS

from .listening import Domain, listen
from .scheduled import cached, new
from .test_steps import Rig, Runner

PLACES = ("before the forward", "after the forward", "between", "in sampling")


class Worker:
    """Runs a model and samples, and does at a place what a test wants to happen there."""

    def __init__(self) -> None:
        self.acts: dict[str, Callable[[], None]] = {}
        self.forward = True

    def at(self, place: str) -> None:
        act = self.acts.pop(place, None)
        if act is not None:
            act()

    def execute_model(self, scheduler_output: Any) -> None:
        self.at("before the forward")
        if self.forward:
            Runner().forward()
        self.at("after the forward")

    def sample_tokens(self, grammar_output: Any) -> str:
        self.at("in sampling")
        return "tokens"

    def step(self, scheduled: Any) -> None:
        self.execute_model(scheduled)
        self.at("between")
        assert self.sample_tokens(None) == "tokens"


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Domain:
    return listen(monkeypatch)


@pytest.fixture
def rig(domain: Domain, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.probe.remove_patches()
    made.probe.disarm()


@pytest.fixture
def worker(rig: Rig, domain: Domain) -> Worker:
    """One that has done a step, as every worker of a server has."""
    made = Worker()
    setattr(made, _KEPT, rig.steps)
    for name in ("execute_model", "sample_tokens"):
        rig.probe.patch(Worker, name, _WRAPPERS[name](rig.probe))
    domain.seen.clear()
    made.step(new("a", 5))
    return made


def test_a_step_is_a_range_of_its_phase_and_tokens_with_its_parts_inside(
    worker: Worker, domain: Domain
) -> None:
    inside: list[list[str]] = []
    for place in PLACES:
        worker.acts[place] = lambda: inside.append(list(domain.open))
    worker.step(cached(a=(5, 1)))
    assert inside == [["decode"], ["decode", "forward"], ["decode"], ["decode", "sample"]]
    assert domain.seen == [
        ("prefill", 5), ("forward", 0), ("sample", 0), ("decode", 1), ("forward", 0), ("sample", 0),
    ]  # fmt: skip
    assert domain.open == []


@pytest.mark.parametrize("place", [place for place in PLACES if place != "between"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_whose_model_or_sampling_raises(
    worker: Worker, domain: Domain, place: str, error: type[BaseException]
) -> None:
    def fail() -> None:
        assert domain.open
        raise error

    worker.acts[place] = fail
    with pytest.raises(error):
        worker.step(cached(a=(5, 1)))
    assert domain.open == []


def test_a_step_that_never_comes_to_its_sampling(worker: Worker, domain: Domain) -> None:
    worker.execute_model(cached(a=(5, 1)))
    assert domain.open == ["decode"]
    worker.step(cached(a=(6, 1)))
    assert domain.open == []


def test_a_step_whose_model_does_not_run(worker: Worker, domain: Domain) -> None:
    worker.forward = False
    worker.step(cached(a=(5, 1)))
    assert domain.open == []


def test_a_worker_that_warms_up_again(rig: Rig, worker: Worker, domain: Domain) -> None:
    worker.execute_model(cached(a=(5, 1)))
    rig.steps.disarm()
    assert domain.open == []


@pytest.mark.parametrize("place", PLACES)
def test_the_guard_gives_up_in_the_middle(rig: Rig, worker: Worker, domain: Domain, place: str) -> None:
    def give_up() -> None:
        assert domain.open
        rig.probe.guard.inert = True

    worker.acts[place] = give_up
    worker.step(cached(a=(5, 1)))
    assert domain.open == []
    seen = len(domain.seen)
    worker.step(cached(a=(6, 1)))
    assert len(domain.seen) == seen


@pytest.mark.parametrize("place", [place for place in PLACES if place != "between"])
def test_the_guard_has_given_up_when_the_model_raises(
    rig: Rig, worker: Worker, domain: Domain, place: str
) -> None:
    def fail() -> None:
        rig.probe.guard.inert = True
        raise MemoryError

    worker.acts[place] = fail
    with pytest.raises(MemoryError):
        worker.step(cached(a=(5, 1)))
    assert domain.open == []


@pytest.mark.swallows
@pytest.mark.parametrize("name", ["begin", "mark"])
def test_a_hook_fails_in_the_middle(
    rig: Rig, worker: Worker, domain: Domain, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The device refuses an event, or the range itself cannot be opened: what was opened is closed."""
    clock, broken = rig.steps._clock, rig.steps._nvtx
    assert clock is not None
    discarded: list[Any] = []
    monkeypatch.setattr(rig.steps, "_immediate", False)
    monkeypatch.setattr(clock, "discard", discarded.append)

    def refuse(*arguments: Any) -> None:
        if name == "begin" or arguments[1] == 3:  # the end of the step
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(clock if name == "mark" else broken, name, refuse)
    worker.step(cached(a=(5, 1)))
    assert domain.open == []
    assert len(discarded) == 1
    assert sum(rig.probe.guard.errors.values()) == 1


@pytest.mark.parametrize("place", PLACES)
def test_switched_off_by_another_thread(
    rig: Rig, worker: Worker, domain: Domain, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the housekeeping thread does it: it waits for the engine's next hook, then takes out the patches."""
    monkeypatch.setattr(probes, "_RANGES_SECONDS", 60.0)
    left: list[list[str]] = []

    def switch_off() -> None:
        rig.probe.enabled = False
        rig.probe.remove_patches()
        left.append(list(domain.open))

    thread = threading.Thread(target=switch_off)

    def begin() -> None:
        assert domain.open
        thread.start()
        while not rig.steps._off:
            time.sleep(0.001)

    worker.acts[place] = begin
    worker.step(cached(a=(5, 1)))
    thread.join()
    assert (left, domain.open) == ([[]], [])
    assert not any(patch.active for patch in rig.probe.patches)


@pytest.mark.parametrize("place", PLACES)
def test_switched_off_by_the_engines_own_thread(
    rig: Rig, worker: Worker, domain: Domain, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook calls `disable`: nobody would come by while it waits."""
    monkeypatch.setattr(probes, "_RANGES_SECONDS", 60.0)

    def switch_off() -> None:
        assert domain.open
        rig.probe.remove_patches()
        assert domain.open == []

    worker.acts[place] = switch_off
    worker.step(cached(a=(5, 1)))
    assert domain.open == []


def test_a_step_without_stamps_is_followed_all_the_same(
    rig: Rig, worker: Worker, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stamps are in flight: the next step has its name, and nothing is kept of a request that ended."""
    clock = rig.steps._clock
    assert clock is not None
    with monkeypatch.context() as patch:
        patch.setattr(rig.steps, "_spare", None)
        patch.setattr(clock, "spare", lambda: None)
        begun = new("b", 9, scheduled=4)
        begun.finished_req_ids = {"a"}
        worker.step(begun)
    assert rig.steps._phases._prompt == {"b": 9}
    worker.step(cached(b=(4, 5)))
    worker.step(cached(b=(9, 1)))
    names = [seen for seen in domain.seen if seen[0] not in ("forward", "sample")]
    assert names == [("prefill", 5), ("prefill", 5), ("decode", 1)]


@pytest.mark.swallows
def test_a_step_that_cannot_be_named_is_recorded_and_told_of(
    rig: Rig, worker: Worker, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*row: Any) -> int:
        raise KeyError("what no vLLM known sends")

    monkeypatch.setattr(rig.steps._phases, "read", refuse)
    monkeypatch.setitem(rig.steps._phases.prefilling, "b", 3)  # so that it is asked
    worker.step(cached(a=(5, 1)))
    assert domain.seen[-3][0] == "dummy"
    assert rig.probe.guard.errors == {"vllm.phase": 1}
    assert list(rig.written()["step"]) == [1, 2]


def test_no_step_begins_while_the_probe_is_being_switched_off(
    rig: Rig, worker: Worker, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patches stay in for as long as the open step needs; a step that comes meanwhile is not followed."""
    monkeypatch.setattr(rig.probe, "open_ranges", [])
    worker.execute_model(cached(a=(5, 1)))
    rig.steps._off = rig.steps._stale = True
    seen = len(domain.seen)
    worker.step(cached(a=(6, 1)))
    worker.step(cached(a=(7, 1)))
    assert (len(domain.seen), domain.open) == (seen, [])


def test_an_engine_that_hangs_is_not_waited_for_and_its_range_ends_once_it_goes_on(
    rig: Rig, worker: Worker, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_RANGES_SECONDS", 0.02)
    worker.execute_model(cached(a=(5, 1)))
    thread = threading.Thread(target=rig.probe.remove_patches)
    thread.start()
    thread.join()
    assert not any(patch.active for patch in rig.probe.patches)
    assert domain.open == ["decode"]
    rig.probe.apply_patches()
    worker.step(cached(a=(6, 1)))
    assert domain.open == []
