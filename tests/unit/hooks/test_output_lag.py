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
