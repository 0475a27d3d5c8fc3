"""Iterations that were only noted are counted, each once, and a request's end never before its tokens."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import arrival, frontend
from llmprobe.hooks.vllm import iterations as iterations_module
from llmprobe.hooks.vllm.arrival import FirstToken, HttpRequest
from llmprobe.hooks.vllm.frontend import FrontEnd
from llmprobe.hooks.vllm.iterations import NOT_MADE, Iterations, Noted
from llmprobe.hooks.vllm.unfinished import Engine
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.layout import bucket_of
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


def noted(recorder: Recorder, told: SimpleNamespace | None, **other: Any) -> Noted:
    fields = {"engine": 0, "time_ns": 1, "first": (), "made": NOT_MADE, "own_ns": 1000, **other}
    engine, time_ns, first, made, own_ns = fields.values()
    return recorder, engine, time_ns, told, first, made, own_ns


def finished(**other: Any) -> SimpleNamespace:
    fields = {
        "num_generation_tokens": 7,
        "num_prompt_tokens": 3,
        "queued_time": 0.0,
        "prefill_time": 0.1,
        "e2e_latency": 0.2,
        "mean_time_per_output_token": 0.01,
        "finish_reason": 0,
    }
    return SimpleNamespace(**{**fields, **other})


def never(where: str, error: Exception) -> None:
    raise error


def test_they_are_counted_together(journal: Journal) -> None:
    recorder, reader = journal
    iterations = Iterations(never)
    iterations.note(noted(recorder, iteration(0.01, 0.01)))
    iterations.note(
        noted(recorder, iteration(0.02, num_prompt_tokens=5, num_preempted_reqs=1), made=(1.5, 1_500_070_000))
    )
    queued = [SimpleNamespace(type=1, timestamp=5.0), SimpleNamespace(type=2, timestamp=5.001)]
    first = (FirstToken(1_000_000, 9_000_000, queued), FirstToken(0, 9_000_000))
    iterations.note(noted(recorder, None, first=first, own_ns=0))
    recorder.publish()
    assert counted(reader) == (0, 0)
    for _ in range(2):  # the second time there is nothing to count
        iterations.write()
        recorder.publish()
        assert counted(reader) == (3, 3)
        counters = reader.counters()
        assert counters["sum_ns_inter_token_latency"] == 40_000_000
        assert (counters["prompt_tokens"], counters["preemptions"]) == (5, 1)
        assert (counters["sum_ns_time_to_first_token"], counters["sum_ns_first_token_queue"]) == (
            17_000_000,
            1_000_000,
        )
        assert (counters["first_tokens_queued"], counters["own_ns_request"]) == (1, 2000)
        assert counters["sum_ns_output_lag"] == 70_000


def test_those_of_vllm_0_11_name_their_gaps_otherwise(journal: Journal) -> None:
    recorder, reader = journal
    old = iteration(0.01)
    old.time_per_output_tokens_iter = vars(old).pop("inter_token_latencies_iter")
    iterations = Iterations(never)
    iterations.note(noted(recorder, old))
    iterations.write()
    recorder.publish()
    assert counted(reader) == (1, 1)


@given(st.lists(st.lists(st.sampled_from([0.01, 0.0100001, 0.02, 0.5]), max_size=6), max_size=5))
def test_every_gap_is_counted_whether_a_step_has_one_or_several(steps: list[list[float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder.open(Path(folder), "frontend", {"role": "frontend"})
        reader = JournalReader(recorder.writer.path, recorder.writer)
        iterations = Iterations(never)
        for gaps in steps:
            iterations.note(noted(recorder, iteration(*gaps)))
        iterations.write()
        recorder.publish()
        every = [round(seconds * 1e9) for gaps in steps for seconds in gaps]
        assert counted(reader) == (len(every), len(every))
        assert reader.counters()["sum_ns_inter_token_latency"] == sum(every)
        buckets = [bucket_of(nanoseconds) for nanoseconds in every]
        assert reader.histogram("inter_token_latency")[buckets].tolist() == [
            buckets.count(one) for one in buckets
        ]
        reader.close()
        recorder.close(remove=True)


def test_one_that_cannot_be_read_costs_none_of_the_others(journal: Journal) -> None:
    recorder, reader = journal
    failed: list[str] = []
    iterations = Iterations(lambda where, error: failed.append(where))
    iterations.note(noted(recorder, iteration(0.01)))
    iterations.note(noted(recorder, SimpleNamespace()))
    iterations.note(noted(recorder, iteration(0.01, float("nan"))))
    ends = [finished(), finished(e2e_latency=None), finished()]
    iterations.note(noted(recorder, iteration(0.01, finished_requests=ends)))
    iterations.write()
    recorder.publish()
    assert counted(reader) == (2, 2)
    assert reader.counters()["requests"] == 2
    assert failed == ["vllm.iteration", "vllm.iteration", "vllm.finished"]


def test_one_journal_that_cannot_be_written_costs_the_others_nothing(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, reader = journal
    broken = Recorder.open(tmp_path, "frontend", {"role": "frontend"})

    def tokens(*numbers: int, **more: Any) -> None:
        raise OSError("no journal")

    monkeypatch.setattr(broken, "tokens", tokens)
    failed: list[str] = []
    iterations = Iterations(lambda where, error: failed.append(where))
    for one in (broken, recorder):
        iterations.note(noted(one, iteration(0.01, finished_requests=[finished()])))
    iterations.write()
    recorder.publish()
    assert (counted(reader), reader.counters()["requests"]) == ((1, 1), 1)
    assert failed == ["vllm.iteration"]
    broken.close(remove=True)


def test_a_front_end_that_is_replaced_leaves_what_it_noted_to_the_next(
    journal: Journal, tmp_path: Path
) -> None:
    """vLLM makes its statistics anew when it is scaled to more engines."""
    recorder, reader = journal
    front, _ = front_end(journal, tmp_path, "a")
    front.record(None, iteration(0.01, finished_requests=[finished()]), 0)
    waits = FirstToken(0, 1_000_000)
    waits.held = True
    front._iterations.note(noted(recorder, None, first=(waits,)))
    front.look(True)
    after = FrontEnd(front._probe, None, [], before=front)
    waits.there_ns, waits.held = 5_000_000, False  # its piece leaves only now
    after.look(True)
    recorder.publish()
    assert (counted(reader), reader.counters()["requests"]) == ((1, 1), 1)
    assert reader.counters()["sum_ns_time_to_first_token"] == 5_000_000


def test_first_tokens_that_leave_while_the_hooks_are_off_are_counted_by_nobody(
    journal: Journal, tmp_path: Path
) -> None:
    recorder, reader = journal
    front, _ = front_end(journal, tmp_path, "a")
    left, waits = FirstToken(0, 1_000_000), FirstToken(0, 2_000_000)
    waits.held = True
    front._iterations.note(noted(recorder, None, first=(left, waits)))
    front.look(False)
    waits.held = False
    front.look(True)
    recorder.publish()
    assert int(reader.histogram("time_to_first_token").sum()) == 1
    assert reader.counters()["sum_ns_time_to_first_token"] == 1_000_000


def test_of_many_first_tokens_that_wait_for_their_piece_none_is_lost(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterations_module, "_HELD_AT_MOST", 3)
    recorder, reader = journal
    iterations = Iterations(never)
    tokens = [FirstToken(0, 1_000_000) for _ in range(5)]
    for token in tokens:
        token.held = True
    iterations.note(noted(recorder, None, first=tuple(tokens)))
    for _ in range(2):
        iterations.write()
        recorder.publish()
        assert int(reader.histogram("time_to_first_token").sum()) == 2  # those beyond, as far as they came
    for token in tokens:
        token.there_ns, token.held = 2_000_000, False
    iterations.write()
    recorder.publish()
    assert int(reader.histogram("time_to_first_token").sum()) == 5
    assert reader.counters()["sum_ns_time_to_first_token"] == 2 * 1_000_000 + 3 * 2_000_000


def test_a_first_token_that_cannot_be_counted_costs_the_others_nothing(journal: Journal) -> None:
    recorder, reader = journal
    failed: list[str] = []
    iterations = Iterations(lambda where, error: failed.append(where))
    broken: Any = [SimpleNamespace(type=1, timestamp="soon"), SimpleNamespace(type=2, timestamp="late")]
    iterations.note(noted(recorder, iteration(0.01), first=(FirstToken(0, 1, broken), FirstToken(0, 1))))
    iterations.write()
    recorder.publish()
    assert failed == ["vllm.iteration"]
    assert counted(reader) == (1, 1)
    assert int(reader.histogram("time_to_first_token").sum()) == 2  # only how long it queued is not known


def test_an_engine_has_one_journal_however_often_its_server_is_scaled(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what a journal that nobody writes any more has pending, work would be waited for until the end."""
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    monkeypatch.setattr(frontend.facts, "process_facts", lambda *given: {"role": "frontend"})
    monkeypatch.setattr(frontend.facts, "flags", lambda config: {"data_parallel_size": 3})
    monkeypatch.setattr(frontend.facts, "model_name", lambda config: "tiny")
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    front = FrontEnd(probe, config, [0, 1])
    processor: Any = SimpleNamespace(request_states={"a": object()})
    front.arrived(processor, SimpleNamespace(request_id="a", arrival_time=time.time()), True)
    front.sent(None, SimpleNamespace(request_id="a"), (1).to_bytes(2, "little"))
    before = list(probe.recorders())
    front = FrontEnd(probe, config, [0, 1, 2], before=front)
    assert len(probe.recorders()) == 3 and probe.recorders()[:2] == before
    assert before[1].facts["flags"] == {"data_parallel_size": 3}
    processor.request_states.clear()
    front.outputs(processor, [SimpleNamespace(request_id="a")])
    front.look(True)
    reader = JournalReader(before[1].writer.path, before[1].writer)
    assert [int(told["unfinished"]) for told in reader.read().pending] == [1, 0]
    reader.close()
    probe.disarm()


@pytest.mark.swallows
def test_after_disable_and_enable_errors_are_the_new_probes(journal: Journal, tmp_path: Path) -> None:
    """Readers learn of them, and it gives up: the earlier probe is there no longer."""
    recorder, _ = journal
    before, _ = front_end(journal, tmp_path)
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    after = FrontEnd(probe, None, [], before=before)
    after._engines[0] = Engine(0, recorder)
    after.record(None, SimpleNamespace(time_to_first_tokens_iter=[]), 0)  # of a vLLM that says something else
    after.look(True)
    assert sum(probe.guard.errors.values()) == 1
    assert not before._probe.guard.errors


def test_an_iteration_with_many_first_tokens_has_them_all(journal: Journal, tmp_path: Path) -> None:
    """Such as the first one of a program that asks a thousand short questions."""
    recorder, reader = journal
    names = [f"request {number}" for number in range(1000)]
    front, processor = front_end(journal, tmp_path, *names, "waits")
    told = iteration(time_to_first_tokens_iter=[7.0] * len(names))  # what vLLM says, if ours do not match
    front.outputs(processor, [SimpleNamespace(request_id=name, events=None) for name in names], None, told)
    front.record(None, told, 0)
    front.look(True)
    recorder.publish()
    assert int(reader.histogram("time_to_first_token").sum()) == len(names)
    assert reader.counters()["sum_ns_time_to_first_token"] < len(names) * 7 * 10**9


def test_nobody_counting_them_makes_no_heap(journal: Journal) -> None:
    recorder, reader = journal
    iterations = Iterations(never)
    for _ in range(2000):
        iterations.note(noted(recorder, iteration(0.01)))
        assert len(iterations._noted) < 1000
    iterations.write()
    recorder.publish()
    assert counted(reader) == (2000, 2000)


def test_two_threads_that_count_do_so_once(journal: Journal) -> None:
    recorder, reader = journal
    iterations = Iterations(never)
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            iterations.write()

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(3000):
        token = FirstToken(0, 1)
        token.held = number % 3 == 0
        told = iteration(0.01, finished_requests=[finished()])
        iterations.note(noted(recorder, told, first=(token,)))
        if number % 7 == 0:
            iterations.write()
        token.held = False
    ended.set()
    thread.join()
    iterations.write()
    recorder.publish()
    assert counted(reader) == (3000, 3000)
    assert reader.counters()["requests"] == 3000
    assert reader.counters()["sum_ns_time_to_first_token"] == 3000


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
    front.look(True)
    recorder.publish()
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
    front.look(True)
    recorder.publish()
    assert reader.counters()["first_tokens_queued"] == 0
    http.let_go(now)
    front.look(True)
    recorder.publish()
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
    front.look(True)
    recorder.publish()
    assert int(reader.histogram("time_to_first_token").sum()) == 1
    assert reader.counters()["first_tokens_queued"] == 0


def front_end(journal: Journal, tmp_path: Path, *requests: str) -> tuple[FrontEnd, SimpleNamespace]:
    """One that has these requests, and what vLLM knows of them."""
    front = FrontEnd(Probe(Settings.from_env({"LLMPROBE_DIR": str(tmp_path)})), None, [])
    front._engines[0] = Engine(0, journal[0])
    processor = SimpleNamespace(request_states={name: object() for name in requests})
    for name in requests:
        front.arrived(processor, SimpleNamespace(request_id=name, arrival_time=time.time()), True)
    return front, processor


def test_while_others_run_a_request_that_ends_is_counted_with_the_next_look(
    journal: Journal, tmp_path: Path
) -> None:
    recorder, reader = journal
    front, processor = front_end(journal, tmp_path, "a", "b")
    for _ in range(5):
        front.record(None, iteration(0.01), 0)
    del processor.request_states["a"]
    front.outputs(processor, [SimpleNamespace(request_id=name) for name in "ab"], None, iteration(0.01))
    before = time.monotonic_ns()
    front.record(None, iteration(0.01, finished_requests=[finished()]), 0)
    assert (counted(reader), reader.counters()["requests"]) == ((0, 0), 0)
    after = time.monotonic_ns()
    front.look(True)
    recorder.publish()
    assert (counted(reader), reader.counters()["requests"]) == ((6, 6), 1)
    (record,) = reader.read().requests
    assert before <= record["time"] <= after  # when it ended, not when it was written


def test_when_the_last_request_ends_all_is_counted_before_nothing_is_pending(
    journal: Journal, tmp_path: Path
) -> None:
    _, reader = journal
    front, processor = front_end(journal, tmp_path, "a")
    for _ in range(5):
        front.record(None, iteration(0.01), 0)
    del processor.request_states["a"]
    front.outputs(processor, [SimpleNamespace(request_id="a")], None, iteration(0.01))
    front.record(None, iteration(0.01, finished_requests=[finished()]), 0)
    assert (counted(reader), reader.counters()["requests"]) == ((6, 6), 1)
    records = reader.read()
    assert [row["unfinished"] for row in records.pending] == [1, 0]
    assert records.requests["seq"][0] < records.pending["seq"][1]


@pytest.mark.parametrize("first", ["a", "d", "bc", "abcd", ""])
def test_first_tokens_are_found_wherever_they_are_among_the_outputs(
    journal: Journal, tmp_path: Path, first: str
) -> None:
    recorder, reader = journal
    front, processor = front_end(journal, tmp_path, *first, "waits")
    told = iteration(0.01, time_to_first_tokens_iter=[0.1] * len(first))
    those = [SimpleNamespace(request_id=name, events=None) for name in "abcd"]
    front.outputs(processor, those[:2], None, told)  # in parts, as vLLM does with many
    front.outputs(processor, those[2:], None, told)
    front.record(None, told, 0)
    front.look(True)
    recorder.publish()
    assert int(reader.histogram("time_to_first_token").sum()) == len(first)
    assert (
        reader.counters()["sum_ns_time_to_first_token"] < len(first) * 10**8 or not first
    )  # ours, not vLLM's
    assert len(front._first_tokens) == 1


def test_first_tokens_of_an_engine_that_goes_unrecorded_are_no_other_ones(
    journal: Journal, tmp_path: Path
) -> None:
    recorder, reader = journal
    front, processor = front_end(journal, tmp_path, "a", "b")
    told = iteration(time_to_first_tokens_iter=[7.0])  # what vLLM says, where ours does not match
    for name, engine in (("a", 1), ("b", 0)):
        front.outputs(processor, [SimpleNamespace(request_id=name, events=None)], None, told)
        front.record(None, told, engine)
    front.look(True)
    recorder.publish()
    assert int(reader.histogram("time_to_first_token").sum()) == 1
    assert reader.counters()["sum_ns_time_to_first_token"] < 7 * 10**9


def test_what_the_hooks_take_on_the_event_loop_is_booked(journal: Journal, tmp_path: Path) -> None:
    recorder, reader = journal
    front, processor = front_end(journal, tmp_path, "a", "b")
    front.outputs(processor, [SimpleNamespace(request_id="a", events=None)], None, None)
    booked = front._own_ns
    assert booked > 0
    front.record(None, iteration(0.01), 0)
    front.look(True)
    recorder.publish()
    assert reader.counters()["own_ns_request"] > booked
