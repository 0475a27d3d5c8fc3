"""The collector over real journals, with a clock of its own."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmprobe.collect.collector import Collector
from llmprobe.collect.process import Pending
from llmprobe.collect.recent import Recent
from llmprobe.collect.views import HistogramView
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.intervals import OPEN
from llmprobe.export.report import report, text
from llmprobe.record import layout
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.layout import Flag, Phase
from llmprobe.record.recorder import Recorder

from .pretended import (
    MODEL,
    PEAKS,
    SECOND,
    Clock,
    Server,
    busy_second,
    collector,
    one_step,
    only,
    program,
    series,
    total,
)


def test_every_second_is_accounted_for_once(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    busy_second(server, start)
    clock.now = start + 5 * SECOND
    view = only(found)
    # From the first step's begin to half a second ago: what is younger may still change.
    assert total(view) == pytest.approx(5 - 0.5 - 0.04, abs=1e-6)
    times = view.ranks[0].device_time
    assert times["decode"]["host_gap"] == pytest.approx(9 * 0.04)
    assert times["none"]["no_work"] == pytest.approx(3.5)
    busy_second(server, start + 10 * SECOND)
    clock.now = start + 12 * SECOND
    view = only(found)
    assert total(view) == pytest.approx(12 - 0.5 - 0.04, abs=1e-6)
    assert view.ranks[0].device_time["decode"]["host_gap"] == pytest.approx(19 * 0.04)


def test_an_agent_that_starts_anew_goes_on_with_the_same_totals(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    checkpoint = tmp_path / "agent.state"
    start = clock.now
    reference = collector(tmp_path, clock, server)
    first = collector(tmp_path, clock, server, checkpoint=checkpoint)
    for second in range(3):
        busy_second(server, start + 2 * second * SECOND)
        clock.now = start + (2 * second + 1) * SECOND
        first.tick()
        first.save()
    busy_second(server, start + 6 * SECOND)  # after the last save
    clock.now = start + 8 * SECOND
    second_agent = collector(tmp_path, clock, server, checkpoint=checkpoint)
    expected, restored = only(reference), only(second_agent)
    assert restored.ranks[0].steps == expected.ranks[0].steps == {"decode": 40}
    assert total(restored) == pytest.approx(total(expected))
    for phase, parts in expected.ranks[0].device_time.items():
        assert restored.ranks[0].device_time[phase] == pytest.approx(parts)
    for phase, kinds in expected.ranks[0].bytes.items():
        assert restored.ranks[0].bytes[phase] == pytest.approx(kinds)
    assert restored.ranks[0].flops == pytest.approx(expected.ranks[0].flops)


def test_without_a_front_end_idle_time_is_unattributed_and_said_so(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, fronts=0)
    found = collector(tmp_path, clock, server)
    server.step(clock.now, clock.now + SECOND)
    server.step(clock.now + 3 * SECOND, clock.now + 4 * SECOND)
    clock.now += 4 * SECOND
    view = only(found)
    time = view.ranks[0].device_time
    assert time["none"]["no_work"] == 0
    assert time["none"]["unattributed"] == pytest.approx(2)
    assert total(view) == pytest.approx(4)
    assert "no_work" in view.missing
    # It is no step's: neither what a step went into, nor what a run's utilisation is over.
    assert view.ranks[0].attribution["decode"].total_seconds == pytest.approx(2)
    decode = report([view])["servers"][0]["ranks"][0]["phases"]["decode"]
    assert decode["seconds"] == pytest.approx(2)
    assert decode["mbu_busy"] == pytest.approx(view.ranks[0].figures["decode"].mbu_busy)
    server.close()


def test_the_gap_before_a_step_after_a_lost_one_is_unattributed(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = collector(tmp_path, clock, server)
    server.fronts[0].pending(clock.now, 1)
    server.step(clock.now, clock.now + SECOND)
    server.step(clock.now + 2 * SECOND, clock.now + 3 * SECOND, flags=int(Flag.RESTARTED))
    parts = only(found).ranks[0].device_time["decode"]
    assert parts["host_gap"] == 0
    assert parts["unattributed"] >= 1


def test_utilisation_is_traffic_over_time_over_peak(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    busy_second(server, start)
    clock.now = start + 2 * SECOND
    figures = only(found).ranks[0].figures["decode"]
    # weights without the input embedding, keys and values of 10 tokens read, one token's written
    traffic = 900_000 + 10 * 100 + 100
    assert figures.steps == 10
    assert figures.mbu_busy == pytest.approx(traffic / 0.06 / 1e12)
    assert figures.mbu_step == pytest.approx(10 * traffic / (0.6 + 9 * 0.04) / 1e12)
    assert figures.sync_gap_ratio == pytest.approx(0.36 / 0.96)


def test_a_running_step_is_seen_and_an_abandoned_one_is_not(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = collector(tmp_path, clock, server)
    number = server.worker.begin(Phase.DECODE, 1, clock.now)
    server.worker.publish()
    clock.now += 12 * SECOND
    assert only(found).ranks[0].step_running_seconds == pytest.approx(12)
    server.worker.abandon(number)
    server.worker.publish()
    assert only(found).ranks[0].step_running_seconds is None
    server.step(clock.now, clock.now + SECOND)
    clock.now += 2 * SECOND
    assert only(found).ranks[0].step_running_seconds is None


def test_a_small_ring_is_read_before_it_comes_round(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    found.tick()
    slots = JournalReader(server.worker.writer.path, server.worker.writer).slots
    for process in found._processes.values():
        process._read_every_ns = SECOND // 10  # as of a ring of 500 records
    for _ in range(9):
        begin = clock.now
        clock.now += SECOND // 10
        for number in range(slots // 4):
            server.step(begin + number, begin + number + 1)
        found.tick()
    view = only(found)
    assert view.ranks[0].lost == 0
    assert view.ranks[0].steps == {"decode": 9 * (slots // 4)}
    assert len(found.recent_steps(5)) == 5


def test_a_histogram_keeps_its_sum(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    front = server.fronts[0]
    front.tokens(10, 4, first_token_ns=(2_000_000,), inter_token_ns={1_000_000: 3})
    front.request(1, 9_000_000, tpot_ns=1_000_000, queue_ns=5, prompt_tokens=10, generated_tokens=4)
    latency = only(found).engines[0].latency
    assert latency["time_to_first_token"].count == 1
    assert latency["inter_token_latency"].count == 3
    assert math.isclose(latency["inter_token_latency"].sum, 0.003)
    assert math.isclose(latency["request_duration"].sum, 0.009)


def test_time_goes_on_at_one_second_a_second_while_idle(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    server.fronts[0].pending(start, 1)
    server.step(start, start + SECOND)
    server.fronts[0].pending(start + SECOND + 1_000_000, 0)  # a front end hears of it a moment later
    totals = []
    for second in range(3, 9):
        clock.now = start + second * SECOND
        totals.append(total(only(found)))
    assert [after - before for before, after in itertools.pairwise(totals)] == pytest.approx([1] * 5)
    times = only(found).ranks[0].device_time["none"]
    assert times["unattributed"] == pytest.approx(0.001)
    assert times["no_work"] == pytest.approx(8 - 0.5 - 1.001)


def test_pending_work_without_records_is_one_span() -> None:
    pending = Pending()
    nothing = np.zeros(0, layout.PENDING)
    for _ in range(3):
        pending.add(nothing, 1)
    assert pending.spans().tolist() == [[0, OPEN]]
    ended = np.zeros(1, layout.PENDING)
    ended["time"] = 7
    pending.add(ended, 0)
    assert pending.spans().tolist() == [[0, 7]]


def test_an_agent_restart_during_a_generate_keeps_what_was_pending(tmp_path: Path, clock: Clock) -> None:
    made = program(tmp_path)
    checkpoint = tmp_path / "agent.state"
    options: dict[str, Any] = {
        "clock": clock, "own_writers": lambda: {made.writer.path: made.writer}, "checkpoint": checkpoint,
    }  # fmt: skip
    start = clock.now
    made.pending(start, 1)
    one_step(made, start, start + SECOND)
    clock.now = start + SECOND
    first = Collector(tmp_path, **options)
    first.tick(final=True)
    first.save()
    one_step(made, start + 3 * SECOND, start + 4 * SECOND)
    made.pending(start + 4 * SECOND, 0)
    clock.now = start + 6 * SECOND
    parts = only(Collector(tmp_path, **options)).ranks[0].device_time
    assert parts["decode"]["host_gap"] == pytest.approx(2)
    assert parts["none"]["no_work"] == pytest.approx(1.5)
    made.close()


def test_a_checkpoint_before_steps_are_accounted_for_loses_none(tmp_path: Path, clock: Clock) -> None:
    made = program(tmp_path)
    options: dict[str, Any] = {
        "clock": clock,
        "own_writers": lambda: {made.writer.path: made.writer},
        "checkpoint": tmp_path / "agent.state",
    }
    first = Collector(tmp_path, **options)
    first.tick(final=True)
    start = clock.now
    for second in range(3):  # records of both kinds by turns
        made.pending(start + second * SECOND, 1)
        one_step(made, start + second * SECOND, start + (second + 1) * SECOND)
        made.pending(start + (second + 1) * SECOND, 0)
    clock.now += SECOND // 10
    first.tick()  # read, but no view is due: the steps wait
    first.save()
    clock.now = start + 3 * SECOND
    assert total(only(Collector(tmp_path, **options))) == pytest.approx(3)
    made.close()


def test_a_model_and_peaks_that_come_late_are_used(tmp_path: Path, clock: Clock, server: Server) -> None:
    known: list[Peaks] = []
    server.worker.update_facts(model=None)
    writers = {r.writer.path: r.writer for r in (server.worker, *server.fronts)}
    found = Collector(
        tmp_path, clock=clock, peaks=lambda facts: known[0] if known else None, own_writers=lambda: writers
    )
    assert "no model" in only(found).missing["mbu_ratio"]
    server.worker.update_facts(model=MODEL)
    assert "no peak rates" in only(found).missing["mbu_ratio"]
    known.append(PEAKS)
    view = only(found)
    assert "mbu_ratio" not in view.missing
    assert view.ranks[0].peaks == PEAKS


def test_peaks_that_may_be_wrong_are_told_once(tmp_path: Path, clock: Clock, server: Server) -> None:
    doubtful = dataclasses.replace(PEAKS, caveat="peaks were measured while others ran")
    writers = {r.writer.path: r.writer for r in (server.worker, *server.fronts)}
    found = Collector(tmp_path, clock=clock, peaks=lambda facts: doubtful, own_writers=lambda: writers)
    assert only(found).notes == [doubtful.caveat]


def test_the_past_of_a_server_found_late_is_not_recent(tmp_path: Path, clock: Clock, server: Server) -> None:
    server.fronts[0].tokens(10, 4, first_token_ns=(2_000_000,))
    found = collector(tmp_path, clock, server)
    assert not only(found).engines[0].recent_latency
    server.fronts[0].tokens(10, 4, first_token_ns=(3_000_000,))
    clock.now += SECOND
    assert only(found).engines[0].recent_latency["time_to_first_token"]["count"] == 1


def test_a_server_that_just_began_is_recent_from_its_first_token(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    server.fronts[0].update_facts(started=time.time())
    server.fronts[0].tokens(10, 4, first_token_ns=(2_000_000,))
    recent = only(collector(tmp_path, clock, server)).engines[0].recent_latency
    assert recent["time_to_first_token"]["count"] == 1


def test_the_queue_is_that_of_requests_that_had_their_first_token(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    """Requests that end now were queued long ago, or had no first token: neither is part of TTFT now."""
    server.fronts[0].update_facts(started=time.time())
    server.fronts[0].request(1, 60 * SECOND, queue_ns=50 * SECOND)
    server.fronts[0].tokens(10, 4, first_token_ns=(SECOND, SECOND), first_token_queue_ns=(SECOND // 4,))
    (engine,) = only(collector(tmp_path, clock, server)).engines
    assert engine.recent_queue_seconds == pytest.approx(0.25)
    assert (engine.first_tokens_queued, engine.first_token_queue_seconds) == (1, pytest.approx(0.25))
    assert engine.recent_latency["request_queue"]["mean"] == pytest.approx(50)


def test_the_queue_is_not_known_where_first_tokens_do_not_tell_it(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    server.fronts[0].update_facts(started=time.time())
    server.fronts[0].load(running=1, waiting=0, kv_usage=0.1)
    server.fronts[0].tokens(10, 4, first_token_ns=(SECOND,))
    found = collector(tmp_path, clock, server)
    view = only(found)
    assert view.engines[0].recent_latency["time_to_first_token"]["count"] == 1
    assert view.engines[0].recent_queue_seconds is None
    assert "sequence_limit" in view.pressure or "kv_cache" in view.pressure
    assert "queue" not in view.pressure


def test_while_the_probe_is_off_nobody_knows_what_waits_and_nothing_starves(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = collector(tmp_path, clock, server)
    front = server.fronts[0]
    front.tokenless(3)
    front.load(kv_usage=0.5, running=16, waiting=3, unfinished=19)

    def look() -> Any:
        clock.now += 20 * SECOND
        found.tick()
        (view,) = found.views()
        return view.engines[0]

    look()
    assert (look().requests_waiting, look().starved_seconds) == (3, 40)
    front.status(armed=False, inert=False)
    off = look()
    assert (off.requests_running, off.requests_waiting, off.kv_usage, off.starved_seconds) == (None,) * 4
    front.status(armed=True, inert=False)
    assert (look().requests_waiting, look().starved_seconds) == (3, 20)


def test_a_journal_of_another_version_is_told_of_once_and_left_alone(
    tmp_path: Path,
    clock: Clock,
    server: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine that was started before an upgrade, or after one beside an agent from before."""
    with monkeypatch.context() as older:
        older.setattr(layout, "VERSION", 1)
        other = Recorder.open(tmp_path, "worker", {"role": "worker"})
    found = collector(tmp_path, clock, server)
    for _ in range(3):
        clock.now += 2 * SECOND
        found.tick()
    assert not found._unread  # else the folder is looked through at every tick
    assert len(found.views()) == 1
    (said,) = caplog.messages
    assert "has journal version 1; this llmprobe reads" in said
    assert other.writer.path.exists()
    other.close(remove=True)


def test_whoever_had_a_token_waits_and_does_not_starve(tmp_path: Path, clock: Clock) -> None:
    """Preempted ones, and sessions whose client has more to say. Each front end knows its own requests, an
    engine's load one of them."""
    server = Server(tmp_path, fronts=2)
    found = collector(tmp_path, clock, server)

    def look() -> Any:
        clock.now += 20 * SECOND
        for front in server.fronts:
            front.publish()
        return only(found).engines[0]

    server.fronts[0].load(kv_usage=0.99, running=16, waiting=2, unfinished=18)
    look()
    waits = look()
    assert (waits.requests_waiting, waits.starved_seconds) == (2, 0)
    server.fronts[1].tokenless(1)
    look()
    assert look().starved_seconds == 20
    server.fronts[1].tokenless(0)
    assert look().starved_seconds == 0
    server.close()


def test_requests_starve_while_they_wait_and_none_has_a_first_token() -> None:
    recent, counts = Recent(), np.zeros(layout.BUCKETS, np.uint64)

    def look(second: int, waiting: int, first_tokens: int) -> float:
        seen = counts.copy()
        seen[0] = first_tokens
        recent.update(second * SECOND, {}, {"time_to_first_token": HistogramView(seen, 0.0)}, False, waiting)
        return recent.starved_seconds

    assert [look(second, 5, 7) for second in range(4)] == [0, 1, 2, 3]
    assert look(4, 4, 8) == 0  # one had its first token
    assert look(6, 4, 8) == 2
    assert look(7, 0, 8) == 0
    assert look(8, 1, 8) == 0  # another one that came just now
    assert look(9, 1, 8) == 1


def test_a_queue_that_grows_counts_those_that_still_wait() -> None:
    recent, counts = Recent(), np.zeros(layout.BUCKETS, np.uint64)

    def look(second: int, waiting: int, first_tokens: int) -> float | None:
        seen = counts.copy()
        seen[0] = first_tokens
        latency = {"time_to_first_token": HistogramView(seen, 0.0)}
        recent.update(second * SECOND, {}, latency, waiting=waiting)
        return recent.backlog_seconds

    assert look(0, 20, 3) is None
    assert look(1, 20, 3) is None  # no first token, no rate
    assert look(2, 20, 4) == 40  # 20 waited for 2 s for 1 to be served
    assert look(3, 20, 5) == 30
    assert look(33, 0, 65) == 0  # nobody waits any more, and what was is past


@pytest.mark.parametrize("waiting", [0, 1, 20])
def test_in_a_steady_queue_a_request_waits_for_the_number_before_it(waiting: int) -> None:
    """Two are served a second, so each waits for half as many seconds as there are requests that wait."""
    recent, counts = Recent(), np.zeros(layout.BUCKETS, np.uint64)
    for second in range(90):
        seen = counts.copy()
        seen[0] = 2 * second
        recent.update(second * SECOND, {}, {"time_to_first_token": HistogramView(seen, 0.0)}, waiting=waiting)
    assert recent.backlog_seconds == waiting / 2


def test_an_agent_that_was_held_up_makes_no_queue_of_one_look() -> None:
    recent, counts = Recent(), np.zeros(layout.BUCKETS, np.uint64)
    recent.update(0, {}, {"time_to_first_token": HistogramView(counts.copy(), 0.0)})
    counts[0] = 10
    recent.update(25 * SECOND, {}, {"time_to_first_token": HistogramView(counts, 0.0)}, waiting=2)
    assert recent.backlog_seconds == 1  # 2 for at most 5 s


def test_a_cache_that_was_full_a_moment_ago_is_remembered_for_ten_seconds() -> None:
    recent = Recent()

    def look(second: int, usage: float | None) -> float | None:
        recent.update(second * SECOND, {}, {}, kv_waited_for=usage)
        return recent.kv_peak

    assert [look(0, None), look(1, 0.97), look(2, 0.85), look(10, 0.88)] == [None, 0.97, 0.97, 0.97]
    assert look(11, 0.86) == 0.88
    assert look(30, None) is None


def test_counts_that_fall_are_no_latencies() -> None:
    recent = Recent()
    counts = np.zeros(layout.BUCKETS, np.uint64)
    recent.update(0, {"requests": 5}, {"request_queue": HistogramView(counts + np.uint64(5), 1.0)})
    recent.update(SECOND, {"requests": 4}, {"request_queue": HistogramView(counts, 0.0)})
    assert recent.latency == {}
    assert recent.counts["requests"] == 0


def test_recent_means_are_of_the_last_thirty_seconds_alone() -> None:
    recent = Recent()
    counts = np.zeros(layout.BUCKETS, np.uint64)
    for second in range(60):
        counts = counts.copy()
        counts[layout.bucket_of(10**9)] += 1
        recent.update(
            second * SECOND, {"preemptions": second}, {"request_queue": HistogramView(counts, second)}
        )
    assert recent.latency["request_queue"]["count"] == 30
    assert recent.latency["request_queue"]["mean"] == pytest.approx(1)
    assert recent.counts == {
        "requests": 0,
        "preemptions": 30,
        "prompt_tokens": 0,
        "generated_tokens": 0,
        "seconds": 30.0,
    }


def test_a_rate_is_over_the_time_since_the_first_step(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    busy_second(server, clock.now)
    clock.now += 2 * SECOND
    assert only(found).ranks[0].figures["decode"].steps_per_second == pytest.approx(10 / 1.96)
    clock.now += 26 * SECOND
    busy_second(server, clock.now)
    clock.now += 7 * SECOND
    assert only(found).ranks[0].figures["decode"].steps_per_second == pytest.approx(10 / 30)


def test_without_a_front_end_there_is_no_sync_gap(tmp_path: Path, clock: Clock) -> None:
    made = Server(tmp_path, fronts=0)
    found = collector(tmp_path, clock, made)
    made.step(clock.now, clock.now + SECOND)
    made.step(clock.now + 3 * SECOND, clock.now + 4 * SECOND)
    clock.now += 5 * SECOND
    view = only(found)
    assert view.ranks[0].figures["decode"].sync_gap_ratio is None
    assert "front end" in view.missing["sync_gap_ratio"]
    assert not any("host_gap" in one or one.startswith("llmprobe_sync_gap") for one in series(found))
    (shown,) = report([view])["servers"]
    decode = shown["ranks"][0]["phases"]["decode"]
    assert decode["sync_gap_ratio"] is None
    assert "host_gap" not in decode["components_seconds"]
    assert "decode" in text(report([view]))
    made.close()


def test_what_nobody_measured_is_not_shown_as_0(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    busy_second(server, clock.now)
    clock.now += 3 * SECOND
    only(found)
    assert not any("blocked" in one for one in series(found))
    (step,) = found.recent_steps(1)
    assert not {"kv_used_bytes", "new_tokens"} & step.keys()
    assert step["server"] == "vllm-1"


def test_time_in_which_the_probe_was_off_is_neither_a_wait_nor_no_work(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    busy_second(server, start)
    clock.now = start + 2 * SECOND
    only(found)
    server.worker.status(armed=False, inert=False)
    for _ in range(6):
        clock.now += SECOND
        only(found)
    times = only(found).ranks[0].device_time
    assert times["none"]["unattributed"] == pytest.approx(6)
    server.worker.status(armed=True, inert=False)
    busy_second(server, clock.now)
    clock.now += 2 * SECOND
    view = only(found)
    assert view.ranks[0].device_time["none"]["no_work"] == pytest.approx(0.5 + 0.5 + 0.5)
    assert view.ranks[0].device_time["decode"]["host_gap"] == pytest.approx(19 * 0.04, abs=0.041)
    assert total(view) == pytest.approx((clock.now - start) / SECOND - 0.5 - 0.04, abs=1e-6)


@pytest.mark.parametrize("status", [{"armed": False, "inert": False}, {"armed": True, "inert": True}])
def test_a_step_in_which_the_probe_fell_silent_hides_no_time(
    tmp_path: Path, clock: Clock, server: Server, status: dict[str, bool]
) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    busy_second(server, start)
    server.worker.begin(Phase.DECODE, 1, start + SECOND)  # nobody will tell of its end
    server.worker.publish()
    clock.now = start + 2 * SECOND
    only(found)
    server.worker.status(**status)
    for _ in range(6):
        clock.now += SECOND
        only(found)
    (rank,) = only(found).ranks
    assert rank.device_time["none"]["unattributed"] == pytest.approx(6.5)
    assert rank.device_time["none"].get("no_work", 0.0) == 0
    server.fronts[0].pending(clock.now, 1)
    clock.now += 600 * SECOND
    (rank,) = only(found).ranks
    assert rank.stall is None
