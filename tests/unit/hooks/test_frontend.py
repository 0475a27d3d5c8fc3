"""When work is pending, as a front end tells it: also when vLLM tells less than it should."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import frontend, frontend_hooks
from llmprobe.hooks.vllm.frontend import FrontEnd
from llmprobe.hooks.vllm.unfinished import Engine as Known
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings

SECOND = 10**9


class Clock:
    """Nanoseconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000 * SECOND

    def __call__(self) -> int:
        return self.now

    def after(self, seconds: float) -> int:
        self.now += round(seconds * SECOND)
        return self.now


class Engine:
    """A front end over a real journal, with requests that come, end, and are left behind."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.recorder = Recorder.open(directory, "frontend", {"role": "frontend"})
        self._reader = JournalReader(self.recorder.writer.path, self.recorder.writer)
        self._told: list[tuple[int, int]] = []
        self.front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(directory)})), None, [])
        self.front._engines[0] = Known(0, self.recorder)
        self.processor = SimpleNamespace(request_states={})
        self.clock = clock

    def arrive(self, name: str) -> None:
        self.processor.request_states[name] = object()
        self.front.arrived(self.processor, SimpleNamespace(request_id=name, arrival_time=time.time()), True)

    def say(self, running: int, waiting: int = 0) -> None:
        """The engine's statistics of one step."""
        stats = SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=0.0)
        self.front.record(stats, None, 0)

    def abort(self, *names: str) -> None:
        for name in names:
            del self.processor.request_states[name]
        self.front.aborted(self.processor, list(names))

    def look(self, times: int = 1, active: bool = True) -> None:
        for _ in range(times):
            self.clock.after(0.25)
            self.front.look(active)

    def load(self) -> tuple[int, int]:
        """Requests that run and wait, by the journal."""
        self.recorder.publish()
        load = self._reader.load()
        assert load is not None
        return load.running, load.waiting

    def tokenless(self) -> int:
        """Requests without a token, by the journal."""
        self.front.look(True)
        self.recorder.publish()
        load = self._reader.load()
        return 0 if load is None else load.tokenless

    def told(self) -> list[tuple[int, int]]:
        """(time, whether anything is pending) of every record so far."""
        self._told += [(int(row["time"]), int(row["unfinished"] > 0)) for row in self._reader.read().pending]
        return self._told

    def pending(self) -> bool:
        return bool(self.told()) and bool(self.told()[-1][1])

    def close(self) -> None:
        self._reader.close()
        self.recorder.close(remove=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(frontend, "_now", clock)
    return clock


@pytest.fixture
def engine(tmp_path: Path, clock: Clock) -> Iterator[Engine]:
    made = Engine(tmp_path, clock)
    yield made
    made.close()


def test_with_the_last_abort_nothing_is_pending(engine: Engine) -> None:
    for number in range(40):
        engine.arrive(str(number))
    engine.say(40)
    engine.abort(*map(str, range(39)))
    assert engine.pending()
    engine.abort("39")
    assert [pending for _, pending in engine.told()] == [1, 0]


def test_looks_at_a_front_end_that_is_told_everything_change_nothing(engine: Engine) -> None:
    engine.look(10)
    for _ in range(3):
        engine.arrive("a")
        engine.look(10)
        engine.say(1)
        engine.look(10)
        engine.abort("a")
        engine.look(10)
    assert [pending for _, pending in engine.told()] == [1, 0] * 3


def test_requests_that_end_while_the_probe_is_off_are_not_pending_afterwards(
    engine: Engine, clock: Clock
) -> None:
    engine.arrive("a")
    engine.say(1)
    engine.look()
    off = clock.now
    engine.look(active=False)
    del engine.processor.request_states["a"]  # its client left; no hook was there
    engine.look(10, active=False)
    engine.look(30)
    assert [pending for _, pending in engine.told()] == [1, 0]
    assert engine.told()[-1][0] - off <= 0.25 * SECOND
    engine.arrive("b")
    assert engine.pending()


def test_a_front_end_says_how_many_of_its_requests_had_no_token(engine: Engine, clock: Clock) -> None:
    for name in "abc":
        engine.arrive(name)
    assert engine.tokenless() == 3
    engine.front.outputs(engine.processor, [SimpleNamespace(request_id="a")], None)
    assert engine.tokenless() == 2
    engine.say(1, 2)
    told = engine._reader.load()
    assert told is not None
    clock.after(5)
    engine.abort("b")
    assert engine.tokenless() == 1
    now = engine._reader.load()
    assert now is not None
    assert (now.time, now.waiting) == (told.time, 2), "what the engine said last is not newer for it"
    engine.look(active=False)
    engine.recorder.publish()
    assert engine._reader.load().tokenless == 0  # type: ignore[union-attr]


def test_what_waited_when_the_probe_went_off_does_not_wait_for_ever(engine: Engine) -> None:
    """Else an idle engine has requests until the next one comes, and they starve."""
    engine.say(16, 3)
    engine.look()
    assert engine.load() == (16, 3)
    engine.look(active=False)
    engine.look()
    assert engine.load() == (0, 0)
    engine.say(1, 2)
    engine.look(3)
    assert engine.load() == (1, 2)


def test_requests_that_came_while_the_probe_was_off_are_pending_once_it_is_on(
    engine: Engine, clock: Clock
) -> None:
    engine.arrive("a")
    engine.look(active=False)
    engine.processor.request_states["b"] = object()
    engine.look(active=False)
    engine.look()
    assert engine.told()[-1] == (clock.now, 1)
    engine.abort("a", "b")
    assert not engine.pending()


def test_an_end_that_no_hook_saw_is_seen_half_a_second_later(engine: Engine) -> None:
    engine.arrive("a")
    engine.look()
    engine.processor.request_states.clear()
    engine.look(2)
    assert not engine.pending()


def test_a_request_that_vllm_forgot_ends_when_the_engine_had_nothing_left(
    engine: Engine, clock: Clock
) -> None:
    engine.arrive("forgotten")
    engine.arrive("a")
    clock.after(0.1)
    engine.say(2)
    clock.after(0.1)
    engine.abort("a")
    ended = clock.after(0.1)
    engine.say(0)
    engine.look(6)
    assert engine.pending()
    engine.look(6)
    assert engine.told()[-1] == (ended, 0)
    engine.look(20)
    assert engine.told()[-1] == (ended, 0)  # it does not come back by itself
    engine.arrive("b")
    assert engine.pending()
    engine.abort("b")
    assert not engine.pending()  # nor is it in the way of others


@pytest.mark.parametrize("says", ["nothing", "something runs", "something waits", "only before it came"])
def test_a_request_that_waits_long_is_not_taken_for_forgotten(
    engine: Engine, clock: Clock, says: str
) -> None:
    engine.arrive("a")
    clock.after(0.1)
    engine.say(1)
    if says == "only before it came":
        engine.say(0)
    clock.after(0.1)
    engine.arrive("b")
    clock.after(0.1)
    if says == "something runs":
        engine.say(1)
    elif says == "something waits":
        engine.say(0, 1)
    engine.look(100)
    assert engine.pending()


def test_a_request_that_came_as_the_engine_said_its_last_is_not_taken_for_forgotten(
    engine: Engine, clock: Clock
) -> None:
    """Its first step may take long, and until then no engine says anything."""
    engine.arrive("a")
    clock.after(0.2)
    engine.say(1)
    clock.after(0.2)
    engine.arrive("b")
    clock.after(0.05)
    engine.say(0)  # said before "b" got there
    engine.abort("a")
    engine.look(100)
    assert engine.pending()


def test_a_request_taken_for_forgotten_counts_again_once_the_engine_has_something(
    engine: Engine, clock: Clock
) -> None:
    engine.arrive("late")
    clock.after(0.1)
    engine.say(0)
    engine.look(20)
    assert not engine.pending()
    engine.say(1)
    engine.look(3)
    assert engine.pending()


@given(st.lists(st.sampled_from(["arrive", "abort", "say", "look", "off", "on"]), max_size=60))
def test_whatever_happened_a_second_later_pending_is_what_is_true(
    tmp_path_factory: pytest.TempPathFactory, happened: list[str]
) -> None:
    clock = Clock()
    before, frontend._now = frontend._now, clock
    engine = Engine(tmp_path_factory.mktemp("dir"), clock)
    try:
        states, active, number = engine.processor.request_states, True, 0
        actions: dict[str, Callable[[], Any]] = {
            "arrive": lambda: engine.arrive(str(number)),
            "abort": lambda: engine.abort(next(iter(states))),
            "say": lambda: engine.say(len(states)),
            "look": lambda: engine.look(active=active),
        }
        for what in happened:
            number += 1
            if what in ("off", "on"):
                active = what == "on"
                engine.look(active=active)
            elif not active and what == "arrive":
                states[str(number)] = object()
            elif not active and what == "abort":
                states.pop(next(iter(states), ""), None)
            elif what != "abort" or states:
                actions[what]()
        engine.front.outputs(engine.processor, [])  # the engine goes on, and the probe is on
        engine.look(4)
        assert engine.pending() == bool(states)
    finally:
        frontend._now = before
        engine.close()


class StatLoggerManager:
    """As vLLM's, which `vllm.LLM` makes without telling engines and calls without naming one."""

    def __init__(self, vllm_config: Any, engine_idxs: list[int] | None = None) -> None:
        self.config = vllm_config

    def record(self, scheduler_stats: Any, iteration_stats: Any, engine_idx: int | None = None) -> None:
        pass


def config(model: str, index: int = 0, **settings: Any) -> Any:
    """What is read of a ``VllmConfig``."""
    return SimpleNamespace(
        model_config=SimpleNamespace(served_model_name=model, dtype="bfloat16", max_model_len=512),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=16),
        compilation_config=None,
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=index + 1,
            data_parallel_size_local=1,
            data_parallel_rank=index,
            data_parallel_index=index,
        ),
        **settings,
    )


@pytest.fixture
def managers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Probe, type]]:
    """vLLM's class under our hooks, and the probe."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0"))
    monkeypatch.setattr(frontend_hooks, "_front_end", None)
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    frontend_hooks.install_stat_loggers(probe, SimpleNamespace(StatLoggerManager=StatLoggerManager))  # type: ignore[arg-type]
    yield probe, StatLoggerManager
    probe.remove_patches()
    probe.disarm()


def statistics(running: int) -> Any:
    return SimpleNamespace(num_running_reqs=running, num_waiting_reqs=0, kv_cache_usage=0.5)


def test_an_engine_after_another_one_in_the_same_program_has_its_own_name_and_flags(
    managers: tuple[Probe, Any],
) -> None:
    probe, manager = managers
    first = manager(config("first"))
    recorder = probe.recorder
    assert recorder is not None and recorder.facts["model_name"] == "first"
    started = recorder.facts["started"]
    first.record(statistics(1), None)
    del first
    second = config("second")
    second.model_config.max_model_len = 256
    later = manager(second)
    later.record(statistics(2), None)
    probe.writers[0]()
    (known,) = probe.recorders()
    assert known.facts["model_name"] == "second"
    assert known.facts["flags"]["max_model_len"] == 256
    assert known.facts["started"] == started  # its totals go on
    assert known.facts["notes"] == []


def test_engines_of_one_program_that_work_side_by_side_are_said(managers: tuple[Probe, Any]) -> None:
    probe, manager = managers
    first, second = manager(config("first")), manager(config("second"))
    second.record(statistics(1), None)
    probe.writers[0]()
    (known,) = probe.recorders()
    assert known.facts["notes"] == []  # the first may be a leftover
    first.record(statistics(1), None)
    for _ in range(3):
        probe.writers[0]()
    (note,) = known.facts["notes"]
    assert "side by side" in note


def test_a_server_that_is_scaled_is_none_beside_itself(managers: tuple[Probe, Any]) -> None:
    probe, manager = managers
    same = config("first")
    before, after = manager(same, [0]), manager(same, [0, 1])
    before.record(statistics(1), None, engine_idx=0)  # under way when the second was made
    after.record(statistics(1), None, engine_idx=1)
    probe.writers[0]()
    assert [known.facts["notes"] for known in probe.recorders()] == [[], []]


def test_an_engine_with_a_program_of_its_own_has_the_index_that_its_worker_has(
    managers: tuple[Probe, Any],
) -> None:
    """Offline data parallelism: each rank runs `vllm.LLM`, its place in the environment."""
    probe, manager = managers
    manager(config("moe", index=3)).record(statistics(7), None)
    (known,) = probe.recorders()
    assert known.facts["engine"] == 3
    known.publish()
    reader = JournalReader(known.writer.path, known.writer)
    load = reader.load()
    assert load is not None and load.running == 7
    reader.close()
