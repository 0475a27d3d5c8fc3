"""The verdict on a finished run: of its time with work pending, from what was seen while it went on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collect.judged import MS, PEAKS, World
from collect.pretended import SECOND, Clock, Server
from compute.verdicts import counters, host, kernels

from llmprobe.collect.collector import Collector
from llmprobe.collect.views import RankView, ServerView
from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS
from llmprobe.compute.facts import Experts
from llmprobe.compute.host import ThreadLoad
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import CAUSES
from llmprobe.export.report import report
from llmprobe.export.run_seen import RunLooks
from llmprobe.record.cupti_records import ACTIVITY, COPY, KERNEL, Window
from llmprobe.record.layout import Flag, Phase
from llmprobe.record.window_file import Seen, window_path, write_window

from .views_for_tests import engine, figures, gpu, pressure, rank, server


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.server.close()


def of(view: ServerView, **more: Any) -> dict[str, Any]:
    (found,) = report([view], **more)["servers"]
    return dict(found)


def decode(
    seconds: float,
    *,
    gap: float = 0.01,
    mbu: float = 0.7,
    flags: dict[str, Any] | None = None,
    **changes: Any,
) -> ServerView:
    """A server that has decoded for ``seconds``, ten steps of 10 ms in each tenth of one."""
    parts = {name: 0.0 for name in COMPONENTS if name not in IDLE_COMPONENTS}
    parts["host_gap"] = gap * seconds
    parts["floor_memory"] = mbu * (1 - gap) * seconds
    parts["unattributed"] = (1 - mbu) * (1 - gap) * seconds
    more = {key: changes.pop(key) for key in ("pressure", "engines", "notes") if key in changes}
    shown = rank(
        facts={"role": "worker", "model": {"any": 1}, "pid": 5},
        device_time={"decode": parts, "none": {"no_work": 1.0, "blocked": 0.0}},
        bytes={"decode": {"weights": 3352e9 * parts["floor_memory"]}},
        flops={"decode": 1e9},
        work_seconds={"decode": (seconds, (1 - gap) * seconds)},
        steps={"decode": round(seconds * 100)},
        figures=changes.pop("figures", {"decode": figures(steps=100, decode_tokens=1600)}),
        gpu=changes.pop("gpu", gpu()),
        **changes,
    )
    return server(ranks=[shown], flags=flags or {}, **{"pressure": {}, **more})


def watched(*views: ServerView, every: float = 1.0) -> RunLooks:
    """Looked at after each second."""
    now = iter(range(1000))
    looks = RunLooks(clock=lambda: next(now) * every)
    for view in views:
        looks.look([view])
    return looks


@pytest.mark.parametrize("idle", [0, 40])
def test_idle_time_around_a_load_changes_nothing_about_it(world: World, idle: int) -> None:
    for _ in range(3):
        world.second(span_ms=18, gap_ms=30)
    for _ in range(idle):
        world.second(busy=False)
    found = of(world.collector.views()[0])
    assert found["verdicts"]["decode"]["bottleneck"] == "sync_bound"
    assert found["verdicts"]["decode"]["share_ratio"] == pytest.approx(1)
    assert found["headline"].startswith("Decode sync-bound")


@pytest.mark.parametrize(("steps", "said"), [(1, "1 step in this run is"), (4, "4 steps in this run are")])
def test_a_handful_of_steps_is_too_few_and_no_idleness(world: World, steps: int, said: str) -> None:
    world.second(span_ms=900 // steps, gap_ms=100 // steps)
    world.second(busy=False)
    found = of(world.collector.views()[0])
    assert found["headline"] == f"CAN'T TELL: decode: {said} too few for a verdict."
    assert found["verdicts"]["decode"]["reason"] == f"{said} too few for a verdict"
    assert "decode" not in found["advice"]  # least of all that all is well


def test_a_few_long_steps_are_a_load(world: World) -> None:
    for _ in range(6):
        begin = world.at
        world.server.fronts[0].pending(begin, 1)
        world.server.step(begin + SECOND, begin + 3 * SECOND)
        world.at += 3 * SECOND
        world.clock.now = world.at
        world.collector.tick()
    assert of(world.collector.views()[0])["verdicts"]["decode"]["bottleneck"] == "sync_bound"


def test_a_run_without_steps_is_idle(world: World) -> None:
    assert of(world.second(busy=False))["headline"] == "IDLE: no steps in this run."


def test_steps_that_are_one_cuda_graph_have_no_bubbles(tmp_path: Path) -> None:
    """Half of what memory could do, without kernel windows: live knows that no launch can be late there."""
    clock, pretended = Clock(), Server(tmp_path)
    pretended.worker.update_facts(
        clock="cuda", flags={"cudagraph_mode": "FULL_AND_PIECEWISE", "max_cudagraph_capture_size": 512}
    )
    own = {one.writer.path: one.writer for one in (pretended.worker, *pretended.fronts)}
    halved = dataclasses.replace(PEAKS, bandwidth_bytes_per_second=2 * PEAKS.bandwidth_bytes_per_second)
    collector = Collector(tmp_path, clock=clock, peaks=lambda facts: halved, own_writers=lambda: own)
    pretended.fronts[0].pending(clock.now, 1)
    for number in range(100):
        at = clock.now + number * 20_000_000
        pretended.step(at + 1_000_000, at + 20_000_000)
    clock.now += 2 * SECOND
    collector.tick(final=True)
    (view,) = collector.views()
    pretended.close()
    assert view.ranks[0].one_graph == {"decode"}
    assert of(view)["verdicts"]["decode"]["bottleneck"] == "inefficient_kernels"


def test_kernel_windows_of_the_run_are_evidence_after_it_too() -> None:
    """At the end the last one is too old; while the steps ran, it was not."""
    seen = kernels(launch=0.4)
    old = dataclasses.replace(seen, age_seconds=1e4)
    looks = watched(decode(1, kernels={"decode": seen}), decode(2, kernels={"decode": seen}))
    verdict = of(decode(2.5, kernels={"decode": old}), looks=looks)["verdicts"]["decode"]
    assert (verdict["bottleneck"], verdict["cause"]) == ("sync_bound", "launch_bubbles")
    # Of windows that were good for little of the run nothing is said of the rest.
    looks = watched(decode(1, kernels={"decode": seen}))
    found = of(decode(9, kernels={"decode": old}, mbu=0.3), looks=looks)
    assert found["verdicts"]["decode"]["cause"] == "no_kernel_windows"
    assert found["ranks"][0]["phases"]["decode"]["sync_gap_is_lower_bound"] is True


@pytest.mark.parametrize(
    ("gap_ms", "copied_ms", "reduced_ms", "bottleneck", "seconds", "good_seconds"),
    [
        (40, 16, 0, "sync_bound", 30, 60),
        (4, 0, 15, "memory_bound", 30, 60),
        (10, 8, 12, "memory_bound", 30, 60),
        (40, 16, 0, "sync_bound", 120, 3600),  # totals are split by windows of a minute all the same
    ],
)
def test_what_kernel_windows_saw_is_taken_into_account_once(
    tmp_path: Path,
    gap_ms: int,
    copied_ms: int,
    reduced_ms: int,
    bottleneck: str,
    seconds: int,
    good_seconds: int,
) -> None:
    """The totals of a run have been split by them already: its verdict is the live one of a steady load."""
    span_ms = 100 - gap_ms
    peaks = dataclasses.replace(PEAKS, bandwidth_bytes_per_second=901_100 / (span_ms / 1e3) / 0.6)
    limits = Thresholds.from_mapping({"kernel_age_seconds": good_seconds})
    world = World(tmp_path, peaks=lambda facts: peaks, thresholds=limits)
    looks = RunLooks(clock=lambda: world.clock.now / 1e9)
    for second in range(seconds):
        rows = []
        for step in range(10):
            e0, ms = world.at + step * 100_000_000 + gap_ms * 1_000_000, 1_000_000
            rows.append((e0 - copied_ms * ms, e0, 2, 7, 0, COPY))
            rows.append((e0, e0 + reduced_ms * ms, 1, 7, 0, KERNEL))
            rows.append((e0 + reduced_ms * ms, e0 + span_ms * ms, 0, 7, 0, KERNEL))
        names = ["_ZN4gemm6kernelEv", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "memcpy HtoD"]
        window = Window(world.at, world.at + SECOND, np.array(rows, ACTIVITY), names, 0)
        view = world.second(span_ms=span_ms, gap_ms=gap_ms)
        if second < 30:
            write_window(window_path(world.server.worker.writer.path), Seen(second + 1, window))
        looks.look([view])
    world.server.close()
    live, found = view.verdicts["decode"], of(view, looks=looks)["verdicts"]["decode"]
    assert live.bottleneck == found["bottleneck"] == bottleneck
    waits = [{**dict.fromkeys(CAUSES, 0.0), **one} for one in (found["wait_seconds"], live.wait_seconds)]
    assert waits[0] == pytest.approx(waits[1], rel=0.02, abs=1e-4)
    measured = {item.quantity: item.value for item in live.evidence}
    assert {item["quantity"]: item["value"] for item in found["evidence"]} == {
        quantity: pytest.approx(value, rel=0.02) for quantity, value in measured.items()
    }


def test_time_that_is_no_steps_lowers_no_utilisation_of_a_run(world: World) -> None:
    """An encoder's, and of steps that were lost, of whose bytes nothing is known."""
    worker, front = world.server.worker, world.server.fronts[0]
    front.pending(world.at, 1)
    for number in range(60):
        begin = world.at + (20 if number % 2 else 1000 if number == 30 else 2) * MS
        end = begin + 18 * MS
        worker.step(
            worker.begin(Phase.DECODE, 1, begin), begin, Phase.DECODE, 0,
            int(Flag.RESTARTED) if number == 30 else 0, (begin, end, end, end),
            requests=1, prefill_requests=0, prompt_tokens=0, decode_tokens=1, sampled=1,
            context_decode=(10, 0, 0, 0), encode_ns=18 * MS * (number % 2),
        )  # fmt: skip
        world.at = end
    world.clock.now = world.at
    world.collector.tick(final=True)
    (view,) = world.collector.views()
    live = view.ranks[0].figures["decode"]
    shown = of(view)
    run = shown["ranks"][0]["phases"]["decode"]
    assert live.mbu_busy == pytest.approx(0.7, rel=0.01)
    for name in ("mbu_step", "mbu_busy", "mfu_step", "mfu_busy"):
        assert run[name] == pytest.approx(getattr(live, name)), name
    assert run["seconds"] > live.seconds + 1, "it is in the run's time all the same"
    assert shown["verdicts"]["decode"]["headroom_seconds"] == pytest.approx(0.02 - 0.7 * 0.018, rel=0.05)


def test_counters_count_only_where_steps_filled_what_they_are_of() -> None:
    def evidence(*seconds: float) -> dict[str, float]:
        views = [decode(at, counters_lately=counters(0.72, 0.02)) for at in seconds]
        verdict = of(decode(seconds[-1]), looks=watched(*views))["verdicts"]["decode"]
        return {item["quantity"]: item["value"] for item in verdict["evidence"]}

    assert evidence(*range(1, 8))["dram_active_ratio"] == pytest.approx(0.72)
    assert "dram_active_ratio" not in evidence(1, 2, 3)  # the first of these reach back before the load
    assert "dram_active_ratio" not in evidence(*(number / 2 for number in range(1, 9)))  # half of it idle


def test_experts_that_the_counter_did_not_see_are_in_no_figure_of_the_verdict() -> None:
    """Experts are 0.6 of the 0.69 that the model has, and nearly all are read if routing is even."""
    experts = Experts(0.7 * 3352e9 / 100, 1.0, 8, 1)
    views = [
        decode(
            at,
            experts=experts,
            counters_lately=counters(0.3, 0.02),
            operator_floors={"decode": {"experts": [0.6 * at, 0.0], "linear": [0.093 * at, 0.0]}},
        )
        for at in range(1, 12)
    ]
    verdict = of(views[-1], looks=watched(*views))["verdicts"]["decode"]
    assert "MBU 0.30" in verdict["reason"]
    assert "read 30% of the experts' weights instead of 86%" in verdict["reason"]


def test_a_gpu_that_others_used_is_judged_by_nobody() -> None:
    def found(looks: int, shared: int) -> dict[str, Any]:
        own, all_together = (counters(dram, 0.02, shared=dram > 0.8) for dram in (0.7, 0.9))
        views = []
        for at in range(1, looks + 1):
            read = all_together if at > looks - shared else own
            views.append(decode(at, counters=read, counters_lately=read))
        return dict(of(decode(looks), looks=watched(*views))["verdicts"]["decode"])

    assert found(10, 2)["cause"] == "shared_gpu"
    # Somebody came for a moment: that is not what the run was, and what they used is left out.
    once = found(30, 1)
    assert once["bottleneck"] == "memory_bound"
    (read,) = (item["value"] for item in once["evidence"] if item["quantity"] == "dram_active_ratio")
    assert read == pytest.approx(0.7)


def test_who_else_uses_a_gpu_matters_after_a_run_as_live_only_where_counters_are_read() -> None:
    """Others in the slices of a split GPU, or on one that has no counters."""
    looks = watched(*(decode(at, gpu=gpu(shared=True)) for at in (1, 2)))
    assert of(decode(3), looks=looks)["verdicts"]["decode"]["bottleneck"] == "memory_bound"


def test_looks_that_come_unevenly_do_not_make_idle_time_work() -> None:
    """Host signals may be of more than the ten seconds for which they are meant to be kept."""
    full = host(threads=(ThreadLoad("python", 1.0, 0.0),), cpu_ratio=1.0)
    views = [decode(at, gap=0.5, host=full) for at in range(1, 9)]
    times = [float(at) for at in range(1, 9)]
    for number, at in enumerate([9.02, *(12.9 + more for more in range(10)), 22.51]):
        idle = host(window_seconds=13.5) if at == 22.51 else None
        views.append(decode(8 + 0.001 * (number + 1), gap=0.5, host=idle))
        times.append(at)
    clock = iter([*times, times[-1]])
    looks = RunLooks(clock=lambda: next(clock))
    for view in views:
        looks.look([view])
    assert "thread_busy" in of(views[-1], looks=looks)["verdicts"]["decode"]["signs"]


def test_host_signals_outlive_the_process() -> None:
    full = host(threads=(ThreadLoad("python", 1.0, 0.0),), cpu_ratio=1.0)
    working = [decode(at, gap=0.5, host=full) for at in (1, 2)]
    idle = decode(2.0, gap=0.5, host=host())  # of no work at all
    found = of(decode(2.0, gap=0.5, host=None), looks=watched(*working, idle))["verdicts"]["decode"]
    assert found["signs"]
    assert of(decode(2.0, gap=0.5, host=None))["verdicts"]["decode"]["signs"] == []


def test_what_the_host_did_while_a_model_was_loaded_explains_no_step() -> None:
    full = host(threads=(ThreadLoad("python", 1.0, 0.0),), cpu_ratio=1.0, window_seconds=10.0)
    found = of(decode(0.5, gap=0.5), looks=watched(decode(0.3, gap=0.5, host=full)))["verdicts"]["decode"]
    assert found["bottleneck"] == "sync_bound"
    assert found["signs"] == []


def test_the_batch_is_known_and_so_what_to_change_about_it() -> None:
    def findings(tokens: int) -> list[str]:
        shown = {"decode": figures(steps=100, decode_tokens=tokens)}
        view = decode(2, figures=shown, flags={"max_num_seqs": 16})
        return [item["finding"] for item in of(view)["advice"]["decode"]]

    assert findings(1600) != findings(100)  # full, and one at a time


def test_pressure_of_a_moment_is_kept_and_says_for_how_long() -> None:
    full = pressure(kind="kv_cache", high=True, value=0.99, threshold=0.95, text="KV cache 99% full")
    free = pressure(kind="kv_cache", active=False, value=0.2, threshold=0.95, text="KV cache 20% full")
    waiting = engine(requests_waiting=7, kv_usage=0.99)

    def told(*kinds: Any) -> dict[str, Any]:
        views = [
            decode(second + 1, pressure={"kv_cache": kind}, engines=[waiting])
            for second, kind in enumerate(kinds)
        ]
        return of(decode(len(kinds) + 1, engines=[engine()]), looks=watched(*views))

    found = told(*[full] * 3, *[free] * 3)
    assert found["pressure"]["kv_cache"]["text"] == "KV cache 99% full at worst, pressing 50% of the time"
    assert found["pressure"]["kv_cache"]["high"]
    assert found["headline"].startswith("SLOW: KV cache 99% full")
    assert found["advice"]["kv_cache"]
    found = told(full, *[free] * 3)
    assert (found["pressure"]["kv_cache"]["active"], found["pressure"]["kv_cache"]["high"]) == (True, False)
    found = told(full, *[free] * 19)
    assert not found["pressure"]["kv_cache"]["active"]


@pytest.mark.parametrize(("of_engine", "proposed"), [(0, [40]), (1, [])])
def test_what_ran_when_the_cache_was_fullest_is_what_it_could_not_hold(
    of_engine: int, proposed: list[int]
) -> None:
    full = pressure(kind="kv_cache", engine=of_engine, high=True, value=0.99, text="KV cache 99% full")
    busy = engine(engine=of_engine, requests_running=40, requests_waiting=7, kv_usage=0.99)
    looks = watched(*(decode(second + 1, pressure={"kv_cache": full}, engines=[busy]) for second in range(3)))
    ended = engine(requests_running=0, requests_waiting=0, preemptions=9)
    found = of(decode(4, engines=[ended], flags={"max_num_seqs": 256}), looks=looks)
    assert found["pressure"]["preemption"]["active"]
    assert [item["proposed"] for item in found["advice"]["preemption"] if item["flag"]] == proposed


def test_looks_before_a_block_are_none_of_it() -> None:
    """``measure()`` in a program that worked before: only what the block did weighs."""
    before: RankView = decode(100, kernels={"decode": kernels()}).ranks[0]
    looks = RunLooks([server(ranks=[before])], clock=lambda: 0.0)
    looks.look([decode(101)])
    assert of(decode(101), since=[decode(100)], looks=looks)["verdicts"]["decode"]["steps_per_second"] == (
        pytest.approx(100)
    )
    assert looks.seen(decode(101)).ranks[0, 0, 5].kernels == {}
