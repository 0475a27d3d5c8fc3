"""Verdicts, pressure and headline of a server, from real journals with a clock of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from compute.verdicts import host

from llmprobe.collect.collector import Collector
from llmprobe.collect.process import Process
from llmprobe.collect.telemetry import Telemetry
from llmprobe.collect.thresholds import load_thresholds
from llmprobe.compute.evidence import CounterEvidence
from llmprobe.compute.host import HostSignals, ThreadLoad, together
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import BOTTLENECKS
from llmprobe.export.report import report, text
from llmprobe.export.summary import summarize
from llmprobe.record.layout import Flag, Phase

from .judged import MS, PEAKS, World
from .pretended import MODEL, SECOND, Clock, Server


def test_a_steady_load_is_judged_within_fifteen_seconds_and_stays_so(world: World) -> None:
    seen = world.seconds(75)
    assert "memory_bound" in seen[:15]
    assert set(seen[15:]) == {"memory_bound"}
    assert set(seen) <= {"idle", "unknown", "memory_bound"}


def test_a_changed_load_gives_the_new_class_or_unknown_and_never_a_third(world: World) -> None:
    world.seconds(20)
    # The gap grows to 3 times the step: the host is slow now.
    seen = world.seconds(20, span_ms=18, gap_ms=54)
    assert set(seen) <= {"memory_bound", "unknown", "sync_bound"}
    assert set(seen[15:]) == {"sync_bound"}
    back = world.seconds(20)
    assert set(back) <= {"memory_bound", "unknown", "sync_bound"}
    assert set(back[15:]) == {"memory_bound"}


def test_the_headline_says_class_confidence_and_figure(world: World) -> None:
    world.seconds(15)
    view = world.second()
    verdict = view.verdicts["decode"]
    assert view.headline.startswith("Decode ")
    assert "MBU 0.70" in verdict.reason
    assert 0.3 < verdict.confidence <= 0.6  # the host's clock
    assert verdict.clock == "host"
    assert verdict.bound_by_operator == "linear"
    assert verdict.steps_per_second == pytest.approx(50, rel=0.05)


def _counted_world(directory: Path, counted: dict[str, CounterEvidence | None]) -> World:
    """A server on a GPU whose counters read as ``counted`` says, over a "long" and a "short" time."""

    class Counted(Telemetry):
        def counters(self, facts: Any) -> CounterEvidence | None:
            return counted["long"]

        def counters_lately(self, facts: Any) -> CounterEvidence | None:
            return counted["short"]

    clock = Clock()
    telemetry = Counted(lambda: None, clock=clock, root=directory / "root", thread=False)
    return World(directory, clock, telemetry=telemetry)


def test_experts_that_the_counter_does_not_see_are_in_no_figure_of_the_verdict(tmp_path: Path) -> None:
    """16 tokens reach 7 of 8 experts if routing is even, and 2 here."""
    read = CounterEvidence(0.36, 0.02, None, 0.0, shared=False)
    world = _counted_world(tmp_path, {"long": read, "short": read})
    experts = {"bytes": 4_000_000, "params": 2_000_000, "count": 8, "top_k": 1}
    model = {**MODEL, "operators": {**MODEL["operators"], "experts": experts}}
    world.server.worker.update_facts(model=model)
    world.server.requests = 16
    world.seconds(15, span_ms=72, gap_ms=2)
    view = world.second(span_ms=72, gap_ms=2)
    world.server.close()
    verdict = view.verdicts["decode"]
    assert verdict.bottleneck == "inefficient_kernels"
    assert "read 27% of the experts' weights instead of 88%" in verdict.reason
    step = 1 / 13  # as many as fit a second
    assert verdict.headroom_seconds == pytest.approx(step - 0.36 * step, rel=0.02)
    gains = [item.gain_seconds for item in view.advice["decode"] if item.gain_seconds is not None]
    assert gains
    assert max(gains) == pytest.approx(verdict.headroom_seconds, rel=0.02)
    figures = view.ranks[0].figures["decode"]
    assert figures.mbu_step == pytest.approx(0.81, abs=0.01)  # by the model: other windows have no counter


def test_the_first_load_of_a_server_is_not_held_against_counters_from_before_it(tmp_path: Path) -> None:
    """A GPU that idled before the first step reads less over 10 s than the steps of its first seconds say."""
    counted: dict[str, CounterEvidence | None] = {"long": None, "short": None}
    world = _counted_world(tmp_path, counted)
    seen = []
    for second in range(1, 16):
        for name, length in (("long", 10), ("short", 3)):
            counted[name] = CounterEvidence(0.66 * min(second / length, 1), 0.02, None, 0.0, shared=False)
        seen.append(world.second().verdicts["decode"])
    world.server.close()
    assert not [verdict.reason for verdict in seen if verdict.cause == "contradiction"]
    assert seen[7].bottleneck == "memory_bound"


def test_waiting_for_the_host_is_advised_upon_by_the_flags(world: World) -> None:
    world.server.worker.update_facts(clock="cuda")
    world.seconds(15, span_ms=18, gap_ms=54)
    view = world.second(span_ms=18, gap_ms=54)
    verdict = view.verdicts["decode"]
    assert (verdict.bottleneck, verdict.cause) == ("sync_bound", "host_between_steps")
    changes = [item.change for item in view.advice["decode"]]
    assert "--async-scheduling (now: False)" in changes
    assert view.advice["decode"][0].gain_seconds == pytest.approx(0.054, rel=0.1)


def test_attribution_is_there_by_phase(world: World) -> None:
    world.seconds(12)
    (rank,) = world.second().ranks
    found = rank.attribution["decode"]
    assert found.seconds["memory.linear"] / found.total_seconds == pytest.approx(0.63 * 8 / 9.011, rel=0.05)
    assert found.seconds["host"] / found.total_seconds == pytest.approx(0.1, rel=0.1)


def test_an_idle_server_is_idle_and_its_load_counts_for_nothing(world: World) -> None:
    world.seconds(15)
    seen = world.seconds(20, busy=False)
    assert seen[-1] == "idle"
    assert set(seen) <= {"memory_bound", "idle"}


def test_bursts_are_judged_on_pending_time(world: World) -> None:
    seen = [name for _ in range(8) for busy in (True, False) for name in world.seconds(3, busy=busy)]
    assert set(seen[20:]) == {"memory_bound"}


def test_how_long_each_verdict_stood_adds_up_and_survives_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path, checkpoint=tmp_path / "state")
    for _ in range(30):
        view = world.second()
    stood = view.bottleneck_seconds["decode"]
    assert sum(sum(causes.values()) for causes in stood.values()) == pytest.approx(29, abs=1)
    assert set(stood) <= set(BOTTLENECKS)
    world.collector.save()
    world.collector = world.collect()
    again = world.second().bottleneck_seconds["decode"]
    assert again["memory_bound"][""] >= stood["memory_bound"][""] > 10
    world.server.close()


def test_a_queue_takes_the_headline(world: World) -> None:
    front = world.server.fronts[0]
    front.load(kv_usage=0.98, running=8, waiting=40, unfinished=48)
    for second in range(16):
        front.tokens(
            10, 4, first_token_ns=(2 * SECOND,),
            first_token_queue_ns=(round(1.6 * SECOND),), inter_token_ns={MS: 3},
        )  # fmt: skip
        front.request(
            second, 3 * SECOND, tpot_ns=MS, queue_ns=round(1.6 * SECOND), prompt_tokens=10, generated_tokens=4
        )
        view = world.second()
    assert view.pressure["queue"].value == pytest.approx(0.8, rel=0.02)
    assert view.pressure["kv_cache"].active
    assert view.pressure["sequence_limit"].active
    assert view.headline.startswith(
        "SLOW: queueing is 80% of TTFT, 1.6 s (KV cache 98% full with 40 requests waiting"
    )
    assert {"queue", "kv_cache"} <= set(view.advice)
    first = list(view.advice)[: len(view.advice) - len(view.verdicts)]
    assert not set(first) & set(view.verdicts), "what the headline names comes first"


def test_a_queue_that_has_taken_the_headline_keeps_it_while_it_is_pressure(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprobe.compute.headline._STAYS_RATIO", 0.0)
    front = world.server.fronts[0]
    front.load(kv_usage=0.2, running=8, waiting=1, unfinished=9)

    def seconds(count: int, queued: float) -> str:
        for second in range(count):
            queue_ns = round(queued * SECOND)
            front.tokens(10, 4, first_token_ns=(2 * SECOND,), first_token_queue_ns=(queue_ns,))
            front.request(
                second, 3 * SECOND, tpot_ns=MS, queue_ns=queue_ns, prompt_tokens=10, generated_tokens=4
            )
            view = world.second()
        assert view.pressure["queue"].active
        return view.headline

    assert seconds(16, 0.6).startswith("Decode memory-bound")
    assert seconds(60, 1.6).startswith("SLOW: queueing is 80% of TTFT")
    assert seconds(60, 0.6).startswith("SLOW: queueing is 30% of TTFT")


def test_a_lone_request_that_waits_for_the_running_step_is_in_no_queue(world: World) -> None:
    front = world.server.fronts[0]
    front.load(kv_usage=0.01, running=1, waiting=0, unfinished=1)
    for _ in range(16):
        front.tokens(10, 4, first_token_ns=(13 * MS,), first_token_queue_ns=(7 * MS,))
        view = world.second()
    assert view.pressure["queue"].value == pytest.approx(7 / 13, rel=0.02)
    assert not view.pressure["queue"].active
    assert view.headline.startswith("Decode memory-bound")


def test_once_nothing_runs_the_last_queue_is_the_past(world: World) -> None:
    front = world.server.fronts[0]
    front.load(kv_usage=0.5, running=8, waiting=4, unfinished=12)
    for _ in range(16):
        front.tokens(10, 4, first_token_ns=(2 * SECOND,), first_token_queue_ns=(round(1.6 * SECOND),))
        view = world.second()
    assert view.headline.startswith("SLOW: queueing is 80% of TTFT")
    front.load(kv_usage=0.0, running=0, waiting=0)
    for _ in range(15):
        view = world.second(busy=False)
    assert view.pressure["queue"].high
    assert view.headline == "IDLE: fewer steps in the last 10 s than a verdict needs."
    front.load(kv_usage=0.1, running=1, waiting=0, unfinished=1)
    for _ in range(20):
        view = world.second(busy=False)
    assert view.headline.endswith("than a verdict needs; requests: 1 running, 0 waiting.")


def test_who_looks_further_is_sent_to_the_process_whose_thread_waits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.server.worker.update_facts(pid=4711, engine_core_pid=4242)
    core = host(threads=(ThreadLoad("VLLM::EngineCor", 0.5, 0.3),))
    both = together(host(threads=(ThreadLoad("VLLM::Worker", 0.9, 0.0),)), core)
    monkeypatch.setattr(world.collector._watches, "signals", lambda process: both)
    world.seconds(14, gap_ms=18)
    view = world.second(gap_ms=18)
    assert "thread VLLM::EngineCor waited for a core 30%" in view.headline
    assert view.advice["decode"][0].look == "taskset -pc 4242 && uptime"


def test_a_front_end_without_time_left_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine has finished; it still works on what the engine made."""
    front = world.server.fronts[0]
    front.load(kv_usage=0.3, running=16, waiting=0, unfinished=16)
    world.seconds(12)
    signals = host(threads=(ThreadLoad("pool", 0.1, 0.0), ThreadLoad("vllm", 0.9, 0.09)))
    for window, seen in ((1.0, False), (10.0, True)):
        told = dataclasses.replace(signals, window_seconds=window)
        monkeypatch.setattr(world.collector._watches, "front_end", lambda process, told=told: told)
        for _ in range(12):
            view = world.second(busy=False)
        assert ("front_end" in view.pressure) is seen
    assert view.pressure["front_end"].value == pytest.approx(0.99)
    assert view.headline == (
        "SLOW: the front end's thread vllm used 90% of a core and waited for one 9% of the time: "
        "tokens may reach clients late."
    )
    assert [item.finding for item in view.advice["front_end"]] == ["pressure.front_end.work"]
    assert view.engines[0].front_end == told


def test_the_busiest_of_several_front_ends_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, server = Clock(), Server(tmp_path, fronts=3)
    own = {one.writer.path: one.writer for one in (server.worker, *server.fronts)}
    found = Collector(tmp_path, clock=clock, own_writers=lambda: own)
    busy = dict(zip((front.writer.path for front in server.fronts), (0.2, 0.97, None), strict=True))

    def front_end(process: Process) -> HostSignals | None:
        ratio = busy[process.path]
        return None if ratio is None else host(threads=(ThreadLoad("vllm", ratio, None),))

    monkeypatch.setattr(found._watches, "front_end", front_end)
    server.fronts[0].load(1, 0)
    found.tick()
    (view,) = found.views()
    assert view.pressure["front_end"].value == 0.97
    assert view.pressure["front_end"].active
    server.close()


def test_a_probe_that_is_off_is_not_judged(world: World) -> None:
    world.seconds(15)
    world.server.worker.status(armed=False, inert=False)
    view = world.second(busy=False)
    assert view.verdicts == {}
    assert view.headline == "OFF: the probe is switched off."


def test_a_step_that_hangs_takes_the_headline_and_ends(world: World) -> None:
    world.seconds(15)
    number = world.server.worker.begin(Phase.DECODE, 4, world.at)
    world.server.worker.publish()
    seen = []
    for _ in range(9):
        view = world.second(span_ms=2000)  # pending, and no step ends
        assert view.ranks[0].stall is None
        seen.append(view.verdicts["decode"])
    for _ in range(6):
        view = world.second(span_ms=2000)
        seen.append(view.verdicts["decode"])
    assert {item.bottleneck for item in seen} == {"memory_bound", "unknown"}, "a step that runs is not idle"
    assert (seen[-1].cause, seen[-1].share_ratio) == ("step_running", 1.0)
    stall = view.ranks[0].stall
    assert stall is not None
    assert (stall.where, stall.step, stall.phase, stall.tokens) == ("step", number, "decode", 4)
    assert view.headline.startswith(f"STALLED: rank 0 has been in step {number} (decode, 4 tokens) for 1")
    assert list(view.advice) == ["stall"], "nobody tunes what does not get on"
    assert "py-spy" in view.advice["stall"][0].look
    world.server.worker.abandon(number)
    world.server.worker.publish()
    world.second()
    view = world.second()
    assert view.ranks[0].stall is None
    assert "stall" not in view.advice
    assert world.second(span_ms=2000).ranks[0].running is None


def test_requests_that_come_and_go_make_no_idleness_of_a_step_that_hangs(world: World) -> None:
    world.seconds(15)
    world.server.worker.begin(Phase.DECODE, 4, world.at)
    world.server.worker.publish()
    seen = []
    for second in range(20):  # none is there in every third look
        seen.append(world.second(span_ms=2000, busy=second % 3 != 0).verdicts["decode"].bottleneck)
    assert set(seen) == {"memory_bound", "unknown"}
    for _ in range(12):
        view = world.second(busy=False)  # they are gone for good, and with them the work
    assert view.verdicts["decode"].bottleneck == "idle"


def test_a_rank_with_nothing_to_do_does_not_stall(world: World) -> None:
    world.seconds(15)
    for _ in range(40):
        assert world.second(busy=False).ranks[0].stall is None


def test_without_a_front_end_nothing_is_claimed(tmp_path: Path) -> None:
    server = Server(tmp_path, fronts=0)
    clock = Clock()
    own = {server.worker.writer.path: server.worker.writer}
    found = Collector(tmp_path, clock=clock, peaks=lambda facts: PEAKS, own_writers=lambda: own)
    for _ in range(15):
        for step in range(50):
            begin = clock.now + step * 20 * MS
            server.step(begin, begin + 18 * MS)
        clock.now += SECOND
        found.tick()
    (view,) = found.views()
    verdict = view.verdicts["decode"]
    assert (verdict.bottleneck, verdict.cause) == ("unknown", "no_front_end")
    server.close()


def test_lost_steps_are_no_wait(world: World) -> None:
    for _ in range(15):
        end = world.at + SECOND
        world.server.fronts[0].pending(world.at, 1)
        for step in range(50):
            begin = world.at + step * 20 * MS
            world.server.step(begin + 10 * MS, begin + 20 * MS, flags=int(Flag.RESTARTED))
        world.at = world.clock.now = end
        world.collector.tick()
    (view,) = world.collector.views()
    assert view.verdicts["decode"].bottleneck != "sync_bound"


def test_everything_is_strict_json(world: World) -> None:
    world.seconds(15)
    status = json.loads(json.dumps(summarize([world.second()]), allow_nan=False))
    (server,) = status["servers"]
    assert server["verdicts"]["decode"]["bottleneck"] == "memory_bound"
    assert server["headline"]
    assert server["ranks"][0]["attribution"]["decode"]["seconds"]["memory.linear"] > 0


def test_the_report_of_a_run_judges_all_of_it(world: World) -> None:
    world.seconds(30)
    document = report(world.collector.views())
    (server,) = document["servers"]
    assert server["verdicts"]["decode"]["bottleneck"] == "memory_bound"
    assert server["verdicts"]["decode"]["bound_by_operator"] == "linear"
    assert server["advice"]["decode"]
    shown = text(document)
    assert server["headline"][:40] in shown
    assert "next look: llmprobe" in shown


def test_the_report_of_a_part_judges_that_part_alone(world: World) -> None:
    world.seconds(20, span_ms=18, gap_ms=54)
    before = world.collector.views()
    world.seconds(20)
    (part,) = report(world.collector.views(), before)["servers"]
    (whole,) = report(world.collector.views())["servers"]
    assert part["verdicts"]["decode"]["bottleneck"] == "memory_bound"
    assert whole["verdicts"]["decode"]["bottleneck"] == "sync_bound"


def test_the_report_tells_the_queue_of_its_part_of_the_run(world: World) -> None:
    front = world.server.fronts[0]
    for _ in range(20):
        front.tokens(10, 4, first_token_ns=(SECOND,), first_token_queue_ns=(SECOND // 100,))
        world.second()
    before = world.collector.views()
    for _ in range(20):
        front.tokens(10, 4, first_token_ns=(SECOND,), first_token_queue_ns=(SECOND * 9 // 10,))
        front.request(1, 60 * SECOND, queue_ns=SECOND // 10)  # it began before
        world.second()
    (part,) = report(world.collector.views(), before)["servers"]
    assert part["pressure"]["queue"]["value"] == pytest.approx(0.9, rel=0.02)
    (whole,) = report(world.collector.views())["servers"]
    assert whole["pressure"]["queue"]["value"] == pytest.approx(0.455, rel=0.02)


def test_thresholds_decide(tmp_path: Path) -> None:
    world = World(tmp_path, thresholds=Thresholds.from_mapping({"sync_gap_ratio": 0.05}))
    assert world.seconds(15)[-1] == "sync_bound"
    world.server.close()


def test_thresholds_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text("# ours\nsync_gap_ratio = 0.3\nidle_steps = 20\n")
    found, problem = load_thresholds(path)
    assert problem is None
    assert (found.sync_gap_ratio, found.idle_steps) == (0.3, 20)
    assert load_thresholds(None) == (Thresholds(), None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"sync_gap_ratio = 3", "sync_gap_ratio=3 is not allowed: a number from 0.01 to 0.99"),
        (b"sync_gap = 0.3", "no such threshold"),
        (b"sync_gap_ratio", "it is not TOML"),
        (b"\xff\xfe", "it is not TOML"),
        (b"kernel_age_seconds = 1" + b"0" * 400, "is not allowed: a number from 1 to 3600"),
        (b"kernel_age_seconds = " + b"1" * 5000, "it is not TOML"),
        (b"kernel_age_seconds = " + b"[" * 20_000 + b"]" * 20_000, "it is nested too deeply"),
        (b'"a\\nb" = 1', "no such threshold"),
        (None, "it cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file_is_said_in_one_line_and_counts_for_nothing(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "limits.toml"
    if content is not None:
        path.write_bytes(b"idle_steps = 20\n" + content)
    found, problem = load_thresholds(path)
    assert found == Thresholds()
    assert problem is not None
    assert problem.startswith(f"LLMPROBE_THRESHOLDS={str(path)!r}: ")
    assert says in problem
    assert "\n" not in problem


def test_the_model_of_these_tests_moves_what_they_say() -> None:
    operators = MODEL["operators"]
    weights = operators["linear"]["bytes"] + operators["head"]["bytes"]  # type: ignore[index]
    assert weights + 11 * 100 == 901_100


@pytest.mark.parametrize(
    ("dtype", "unmodelled", "cause", "says", "calibrate"),
    [
        ("bfloat16", [], "no_peaks", "no peak rates for A GPU in bfloat16: run `llmprobe calibrate`", True),
        ("nvfp4", [], "no_peaks", "no peak rates for A GPU in fp4: none are published, and", False),
        ("bfloat16", ["a part of it"], "no_model", "no model of the work: a part of it", False),
    ],
)
def test_what_is_missing_is_said_alike_everywhere_and_nobody_is_sent_to_measure_in_vain(
    tmp_path: Path, dtype: str, unmodelled: list[str], cause: str, says: str, calibrate: bool
) -> None:
    world = World(tmp_path, peaks=lambda facts: None)
    world.server.worker.update_facts(
        device={"type": "cuda", "name": "A GPU", "uuid": "GPU-1"},
        model={**MODEL, "compute_dtype": dtype, "unmodelled": unmodelled},
    )
    world.seconds(15)
    view = world.second()
    world.server.close()
    (ended,) = report([view])["servers"]
    live, found = view.verdicts["decode"], ended["verdicts"]["decode"]
    assert (live.cause, found["cause"]) == (cause, cause)
    assert live.reason == found["reason"] == view.missing["mbu_ratio"]
    assert live.reason.startswith(says)
    looks = {item.look for item in view.advice["decode"]}
    after = {item["look"] for item in ended["advice"]["decode"]}
    assert looks
    assert after
    assert ("llmprobe calibrate" in looks, "llmprobe calibrate" in after) == (calibrate, calibrate)
