"""How long the engine's outputs wait in a front end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import output_lag
from llmprobe.hooks.vllm.facts import engine_is_here
from llmprobe.hooks.vllm.frontend import FrontEnd
from llmprobe.hooks.vllm.output_lag import OutputLags
from llmprobe.hooks.vllm.unfinished import Engine
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings

SECOND = 10**9
NOW = 5000 * SECOND


@pytest.fixture
def recorders(tmp_path: Path) -> Iterator[list[Recorder]]:
    made = [Recorder.open(tmp_path, "frontend", {"role": "frontend"}) for _ in range(2)]
    yield made
    for recorder in made:
        recorder.close(remove=True)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lag, "_now", lambda: NOW)


def told(recorder: Recorder) -> tuple[int, int]:
    """How many lags, and their sum in nanoseconds."""
    recorder.publish()
    reader = JournalReader(recorder.writer.path, recorder.writer)
    try:
        return int(reader.histogram("output_lag").sum()), reader.counters()["sum_ns_output_lag"]
    finally:
        reader.close()


def test_a_lag_is_of_the_engine_whose_statistics_come_next(recorders: list[Recorder], now: None) -> None:
    lags, (first, second) = OutputLags(), recorders
    lags.handed(4998.0)
    lags.note(first)
    lags.handed(4999.0)
    lags.handed(4999.5)  # another part of the same iteration
    lags.note(second)
    lags.note(first)  # statistics without outputs
    lags.handed(4990.0)
    lags.note(None)  # of an engine that goes unrecorded
    lags.write()
    assert told(first) == (1, 2 * SECOND)
    assert told(second) == (1, SECOND // 2)


@pytest.mark.parametrize("made", [0.0, 5001.0, 5000.0 - 601, -7.0])
def test_what_another_clock_says_is_no_lag(recorders: list[Recorder], now: None, made: float) -> None:
    lags = OutputLags()
    lags.handed(made)
    lags.note(recorders[0])
    lags.write()
    assert told(recorders[0]) == (0, 0)


def test_what_nobody_writes_takes_no_more_and_more_memory(recorders: list[Recorder], now: None) -> None:
    lags = OutputLags()
    for _ in range(10_000):
        lags.handed(4999.0)
        lags.note(recorders[0])
    lags.write()
    assert told(recorders[0]) == (512, 512 * SECOND)


def test_two_threads_write_each_lag_once(recorders: list[Recorder], now: None) -> None:
    lags, ended = OutputLags(), threading.Event()

    def look() -> None:
        while not ended.is_set():
            lags.write()

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(3000):
        lags.handed(4999.0)
        lags.note(recorders[0])
        if number % 7 == 0:
            lags.write()
        while len(lags._noted) > 400:
            time.sleep(0.001)
    ended.set()
    thread.join()
    lags.write()
    assert told(recorders[0]) == (3000, 3000 * SECOND)


def test_a_front_end_tells_it_once_somebody_looks(
    recorders: list[Recorder], now: None, tmp_path: Path
) -> None:
    front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(tmp_path)})), None, [])
    front._engines[0] = Engine(0, recorders[0])
    processor: Any = SimpleNamespace(request_states={})
    stats = SimpleNamespace(num_running_reqs=1, num_waiting_reqs=0, kv_cache_usage=0.0)
    front.outputs(processor, [SimpleNamespace(request_id="a", events=None)], 4997.0)
    front.record(stats, None, 0)
    front.outputs(processor, [], 4000.0)  # statistics alone
    front.record(stats, None, 0)
    assert told(recorders[0]) == (0, 0)
    front.look(True)
    assert told(recorders[0]) == (1, 3 * SECOND)


def parallel(size: int, local: int | None, first: int = 0, **more: Any) -> Any:
    settings = {"data_parallel_size": size, "data_parallel_rank": first, **more}
    if local is not None:
        settings["data_parallel_size_local"] = local
    return SimpleNamespace(parallel_config=SimpleNamespace(**settings))


@pytest.mark.parametrize(
    ("config", "here"),
    [
        (parallel(1, 1), [0]),
        (parallel(4, 4), [0, 1, 2, 3]),
        (parallel(4, 2), [0, 1]),  # the others run on a headless node
        (parallel(4, 0), []),
        (parallel(4, 2, first=2), [2, 3]),  # a front end for each node
        (parallel(4, 1, first=3), [3]),  # or for each engine
        (parallel(4, 2, data_parallel_backend="ray"), []),  # which puts them where it likes
        (parallel(4, None), []),
    ],
)
def test_engines_of_this_machine_have_its_clock(config: Any, here: list[int]) -> None:
    engines = range(config.parallel_config.data_parallel_size)
    assert [engine for engine in engines if engine_is_here(config, engine)] == here


def test_an_engine_on_another_machine_has_no_lag_however_near_its_clock_is(
    recorders: list[Recorder], now: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that were started together have clocks that are seconds apart."""
    monkeypatch.setattr(FrontEnd, "_open", lambda self, config, engine: recorders[engine])
    front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(tmp_path)})), parallel(2, 1), [0, 1])
    processor: Any = SimpleNamespace(request_states={})
    stats = SimpleNamespace(num_running_reqs=1, num_waiting_reqs=0, kv_cache_usage=0.0)
    for engine in (0, 1):
        front.outputs(processor, [SimpleNamespace(request_id="a", events=None)], 4997.0)
        front.record(stats, None, engine)
    front.look(True)
    assert told(recorders[0]) == (1, 3 * SECOND)
    assert told(recorders[1]) == (0, 0)
