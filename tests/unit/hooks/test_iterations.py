"""Tokens of iterations that were only noted are counted, each once, and never after their request's end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import arrival
from llmprobe.hooks.vllm.arrival import HttpRequest
from llmprobe.hooks.vllm.frontend import FrontEnd
from llmprobe.hooks.vllm.iterations import PlainIterations
from llmprobe.hooks.vllm.unfinished import Engine
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings

Journal = tuple[Recorder, JournalReader]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    recorder = Recorder.open(tmp_path, "frontend", {"role": "frontend"})
    reader = JournalReader(recorder.writer.path, recorder.writer)
    yield recorder, reader
    reader.close()
    recorder.close(remove=True)


def iteration(*gaps: float, **other: Any) -> SimpleNamespace:
    fields = {
        "num_generation_tokens": len(gaps),
        "num_prompt_tokens": 0,
        "num_preempted_reqs": 0,
        "inter_token_latencies_iter": list(gaps),
        "time_to_first_tokens_iter": [],
        "finished_requests": [],
    }
    return SimpleNamespace(**{**fields, **other})


def counted(reader: JournalReader) -> tuple[int, int]:
    return reader.counters()["generated_tokens"], int(reader.histogram("inter_token_latency").sum())


def test_plain_ones_are_counted_together(journal: Journal) -> None:
    recorder, reader = journal
    plain = PlainIterations()
    assert plain.note(recorder, iteration(0.01, 0.01), 0)
    assert plain.note(recorder, iteration(0.02), 0)
    assert counted(reader) == (0, 0)
    plain.write()
    recorder.publish()
    assert counted(reader) == (3, 3)
    assert reader.counters()["sum_ns_inter_token_latency"] == 40_000_000
    assert reader.counters()["own_ns_request"] > 0
    plain.write()
    recorder.publish()
    assert counted(reader) == (3, 3)


def test_those_of_vllm_0_11_name_their_gaps_otherwise(journal: Journal) -> None:
    recorder, reader = journal
    old = iteration(0.01)
    old.time_per_output_tokens_iter = vars(old).pop("inter_token_latencies_iter")
    plain = PlainIterations()
    assert plain.note(recorder, old, 0)
    plain.write()
    recorder.publish()
    assert counted(reader) == (1, 1)


@pytest.mark.parametrize(
    "more",
    [
        {"time_to_first_tokens_iter": [0.1]},
        {"finished_requests": [object()]},
        {"num_prompt_tokens": 4},
        {"num_preempted_reqs": 1},
        {"inter_token_latencies_iter": []},
    ],
)
def test_any_other_iteration_is_left_to_the_front_end(journal: Journal, more: dict[str, Any]) -> None:
    assert not PlainIterations().note(journal[0], iteration(0.01, **more), 0)


def test_nobody_counting_them_makes_no_heap(journal: Journal) -> None:
    recorder, reader = journal
    plain = PlainIterations()
    noted = 0
    while plain.note(recorder, iteration(0.01), 0):
        noted += 1
        assert noted < 10_000
    plain.write()
    recorder.publish()
    assert counted(reader) == (noted, noted)


def test_two_threads_that_count_do_so_once(journal: Journal) -> None:
    recorder, reader = journal
    plain = PlainIterations()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            plain.write()

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(3000):
        if not plain.note(recorder, iteration(0.01), 0):
            plain.write()
            assert plain.note(recorder, iteration(0.01), 0)
        if number % 7 == 0:
            plain.write()
    ended.set()
    thread.join()
    plain.write()
    recorder.publish()
    assert counted(reader) == (3000, 3000)


def test_only_requests_with_a_first_token_tell_how_long_they_were_queued(
    journal: Journal, tmp_path: Path
) -> None:
    """Whoever was aborted while it waited has no TTFT that its wait could be a part of."""
    recorder, reader = journal
    front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(tmp_path)})), None, [])
    front._engines[0] = Engine(0, recorder)
    processor = SimpleNamespace(request_states={"served": object(), "starved": object()})
    for name in ("served", "starved"):
        front.arrived(processor, SimpleNamespace(request_id=name, arrival_time=time.time() - 8), True)
    events = [SimpleNamespace(type=1, timestamp=70.0), SimpleNamespace(type=2, timestamp=72.0)]
    front.outputs(processor, [SimpleNamespace(request_id="served", events=events)])
    front.record(None, iteration(time_to_first_tokens_iter=[8.0], num_generation_tokens=1), 0)
    del processor.request_states["starved"]
    front.aborted(processor, ["starved"])
    counters = reader.counters()
    assert (counters["requests"], counters["requests_aborted"]) == (1, 1)
    assert (counters["first_tokens_queued"], counters["sum_ns_first_token_queue"]) == (1, 2_000_000_000)
    assert int(reader.histogram("time_to_first_token").sum()) == 1
    assert counters["sum_ns_time_to_first_token"] >= 8_000_000_000


def test_a_first_token_that_waits_for_its_piece_of_a_stream_tells_its_queue_once_it_has_left(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, reader = journal
    front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(tmp_path)})), None, [])
    front._engines[0] = Engine(0, recorder)
    now = time.monotonic_ns()
    http = HttpRequest(now - 8 * 10**9)
    http._streaming = True
    monkeypatch.setattr(arrival, "_http_request", SimpleNamespace(get=lambda: http))
    processor = SimpleNamespace(request_states={"a": object()})
    front.arrived(processor, SimpleNamespace(request_id="a", arrival_time=time.time()), True)
    events = [SimpleNamespace(type=1, timestamp=70.0), SimpleNamespace(type=2, timestamp=72.0)]
    front.outputs(processor, [SimpleNamespace(request_id="a", events=events)], None)
    front.record(None, iteration(time_to_first_tokens_iter=[8.0], num_generation_tokens=1), 0)
    recorder.publish()
    assert reader.counters()["first_tokens_queued"] == 0
    http.let_go(now)
    counters = reader.counters()
    assert (counters["first_tokens_queued"], counters["sum_ns_first_token_queue"]) == (1, 2_000_000_000)
    assert counters["sum_ns_time_to_first_token"] == 8_000_000_000


@pytest.mark.parametrize("more", [{}, {"events": None}, {"events": []}])
def test_where_an_engine_does_not_say_how_long_a_request_was_queued_nothing_is_counted(
    journal: Journal, tmp_path: Path, more: dict[str, Any]
) -> None:
    recorder, reader = journal
    front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(tmp_path)})), None, [])
    front._engines[0] = Engine(0, recorder)
    processor = SimpleNamespace(request_states={"a": object()})
    front.arrived(processor, SimpleNamespace(request_id="a", arrival_time=time.time() - 8), True)
    front.outputs(processor, [SimpleNamespace(request_id="a", **more)], None)
    front.record(None, iteration(time_to_first_tokens_iter=[8.0], num_generation_tokens=1), 0)
    recorder.publish()
    assert int(reader.histogram("time_to_first_token").sum()) == 1
    assert reader.counters()["first_tokens_queued"] == 0


def test_when_a_request_ends_all_its_tokens_are_counted(journal: Journal, tmp_path: Path) -> None:
    recorder, reader = journal
    front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(tmp_path)})), None, [])
    front._engines[0] = Engine(0, recorder)
    for _ in range(5):
        front.record(None, iteration(0.01), 0)
    assert counted(reader) == (0, 0)
    finished = SimpleNamespace(
        num_generation_tokens=7,
        num_prompt_tokens=3,
        queued_time=0.0,
        prefill_time=0.1,
        e2e_latency=0.2,
        mean_time_per_output_token=0.01,
        finish_reason=0,
    )
    front.record(None, iteration(0.01, finished_requests=[finished]), 0)
    assert counted(reader) == (6, 6)
    assert reader.counters()["requests"] == 1
