"""The collector over real journals, with a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.collect.collector import Collector
from llmprobe.collect.views import ServerView
from llmprobe.compute.hardware import Peaks
from llmprobe.record.layout import Flag, Phase
from llmprobe.record.recorder import Recorder

SECOND = 10**9
PEAKS = Peaks(1e12, 1e14, "bfloat16", "nominal", "made for this test")
MODEL = {
    "weights_bytes": 1_000_000,
    "compute_dtype": "bfloat16",
    "operators": {
        "linear": {"bytes": 800_000, "params": 400_000},
        "head": {"bytes": 100_000, "params": 50_000},
    },
    "embedding_bytes": 100_000,
    "tied": False,
    "kv": {
        "capacity_bytes": 10_000_000,
        "groups": [
            {
                "kind": "full",
                "window": None,
                "layers": 2,
                "bytes_per_token": 100.0,
                "flops_per_pair": 200.0,
                "bytes_per_request": 0.0,
            }
        ],
    },
    "unmodelled": [],
}


class Server:
    """One pretended server: a worker and front ends, each with a journal."""

    def __init__(self, directory: Path, group: str = "g", server: str = "vllm-1", fronts: int = 1) -> None:
        said = {"group": group, "server": server, "model_name": "m", "framework": "vllm", "engine": 0}
        self.worker = Recorder.open(
            directory, "worker", {**said, "role": "worker", "rank": 0, "clock": "host", "model": MODEL}
        )
        self.fronts = [
            Recorder.open(directory, "frontend", {**said, "role": "frontend"}) for _ in range(fronts)
        ]

    def step(self, begin: int, end: int, phase: Phase = Phase.DECODE, flags: int = 0) -> None:
        middle = begin + (end - begin) * 3 // 4
        number = self.worker.begin(phase, 1, begin)
        self.worker.step(
            number,
            begin,
            phase,
            0,
            flags,
            (begin, middle, middle, end),
            requests=1,
            prefill_requests=0,
            prompt_tokens=0,
            decode_tokens=1,
            sampled=1,
            context_decode=(10, 0, 0, 0),
            pairs_decode=(10, 0, 0, 0),
        )

    def close(self) -> None:
        for recorder in (self.worker, *self.fronts):
            recorder.close()


class Clock:
    now = 100 * SECOND

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


def collector(tmp_path: Path, clock: Clock, server: Server, **more: Any) -> Collector:
    def own() -> dict[Path, Any]:
        recorders = (server.worker, *server.fronts)
        return {recorder.writer.path: recorder.writer for recorder in recorders}

    return Collector(tmp_path, clock=clock, peaks=lambda facts: PEAKS, own_writers=own, **more)


def only(found: Collector) -> ServerView:
    found.tick(final=True)
    (view,) = found.views()
    return view


def total(view: ServerView) -> float:
    return sum(sum(parts.values()) for parts in view.ranks[0].device_time.values())


def busy_second(server: Server, at: int, steps: int = 10) -> None:
    """A request that pends for a second in which ``steps`` steps of 60 ms run, 40 ms apart."""
    for front in server.fronts:
        front.pending(at, 1)
    for number in range(steps):
        server.step(at + number * 100_000_000 + 40_000_000, at + (number + 1) * 100_000_000)
    for front in server.fronts:
        front.pending(at + SECOND, 0)


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


def test_work_is_pending_while_any_front_end_has_some(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, fronts=2)
    start = clock.now
    found = collector(tmp_path, clock, server)
    one, two = server.fronts
    one.pending(start, 1)
    server.step(start, start + SECOND)
    two.pending(start + SECOND // 2, 1)
    one.pending(start + SECOND, 0)
    server.step(start + 2 * SECOND, start + 3 * SECOND)
    two.pending(start + 3 * SECOND, 0)
    clock.now = start + 4 * SECOND
    parts = only(found).ranks[0].device_time
    assert parts["decode"]["host_gap"] == pytest.approx(1)
    assert parts["none"]["no_work"] == pytest.approx(0.5)
    server.close()


def test_without_a_front_end_idle_time_is_unattributed_and_said_so(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, fronts=0)
    found = collector(tmp_path, clock, server)
    server.step(clock.now, clock.now + SECOND)
    server.step(clock.now + 3 * SECOND, clock.now + 4 * SECOND)
    view = only(found)
    assert "none" not in view.ranks[0].device_time or not view.ranks[0].device_time["none"]["no_work"]
    assert total(view) == pytest.approx(4)
    assert "no_work" in view.missing
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


def test_a_dead_worker_leaves_the_views_and_its_journal_is_removed_later(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = Collector(tmp_path, clock=clock, own_writers=dict, remove_dead=True)
    other = Server(tmp_path, group="h", server="vllm-2")
    path = other.worker.writer.path
    other.close()  # its lock is gone, as after a kill
    clock.now += SECOND
    found.tick()
    clock.now += 2 * SECOND
    found.tick()
    assert "vllm-2" not in {view.server for view in found.views()}
    assert path.exists()
    clock.now += 40 * SECOND
    found.tick()
    clock.now += 2 * SECOND
    found.tick()
    assert not path.exists()


def test_two_servers_of_one_name_get_numbers(tmp_path: Path, clock: Clock) -> None:
    servers = [Server(tmp_path, group=group, server="generate") for group in ("g", "h")]
    writers = {r.writer.path: r.writer for s in servers for r in (s.worker, *s.fronts)}
    found = Collector(tmp_path, clock=clock, own_writers=lambda: writers)
    found.tick(final=True)
    assert [view.server for view in found.views()] == ["generate", "generate-2"]
    for made in servers:
        made.close()


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
