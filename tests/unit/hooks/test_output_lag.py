"""How long the engine's outputs wait in a front end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import frontend
from llmprobe.hooks.vllm.facts import engine_is_here
from llmprobe.hooks.vllm.frontend import FrontEnd
from llmprobe.hooks.vllm.output_lag import output_lag
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
    monkeypatch.setattr(frontend, "_now", lambda: NOW)


def told(recorder: Recorder) -> tuple[int, int]:
    """How many lags, and their sum in nanoseconds."""
    recorder.publish()
    reader = JournalReader(recorder.writer.path, recorder.writer)
    try:
        return int(reader.histogram("output_lag").sum()), reader.counters()["sum_ns_output_lag"]
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("made", "lag"),
    [
        (4998.0, 2 * SECOND),
        (4999.5, SECOND // 2),
        (5000.0, 0),
        (None, None),
        (0.0, None),
        # What another clock says is no lag.
        (5001.0, None),
        (5000.0 - 601, None),
        (-7.0, None),
    ],
)
def test_a_lag_is_what_has_passed_on_the_same_clock(made: float | None, lag: int | None) -> None:
    assert output_lag(made, NOW) == lag


STATS = SimpleNamespace(num_running_reqs=1, num_waiting_reqs=0, kv_cache_usage=0.0)
OUTPUTS = [SimpleNamespace(request_id="a", events=None)]


def test_a_lag_is_of_the_engine_whose_statistics_come_next(
    recorders: list[Recorder], now: None, tmp_path: Path
) -> None:
    front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(tmp_path)})), None, [])
    for number, recorder in enumerate(recorders):
        front._engines[number] = Engine(number, recorder)
    processor: Any = SimpleNamespace(request_states={})
    front.outputs(processor, OUTPUTS, 4998.0)
    front.record(STATS, None, 0)
    front.outputs(processor, OUTPUTS, 4999.0)
    front.outputs(processor, OUTPUTS, 4999.5)  # another part of the same iteration
    front.record(STATS, None, 1)
    front.record(STATS, None, 0)  # statistics without outputs
    front.outputs(processor, OUTPUTS, 4990.0)
    front.record(STATS, None, 2)  # of an engine that goes unrecorded
    front.outputs(processor, [], 4000.0)  # statistics alone
    front.record(STATS, None, 0)
    assert told(recorders[0]) == (0, 0)
    front.look(True)
    assert told(recorders[0]) == (1, 2 * SECOND)
    assert told(recorders[1]) == (1, SECOND // 2)


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
    for engine in (0, 1):
        front.outputs(processor, OUTPUTS, 4997.0)
        front.record(STATS, None, engine)
    front.look(True)
    assert told(recorders[0]) == (1, 3 * SECOND)
    assert told(recorders[1]) == (0, 0)
