"""Kernel windows on their way from a process's file to figures, verdict and metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmprobe.collect.windows import Windows
from llmprobe.record.cupti_records import ACTIVITY, COPY, KERNEL, Window
from llmprobe.record.demangle import demangled
from llmprobe.record.window_file import Seen, window_path, write_window

from .pretended import SECOND, Clock, Server, busy_second, collector, only, series

NAMES = ["_ZN4gemm6kernelEv", "memcpy HtoD"]


def leave_window(server: Server, begin: int, end: int, number: int = 1, dropped: int = 0) -> None:
    """A window over a `busy_second`, in which kernels fill half of each step and 10 ms of each gap."""
    rows = []
    for step in range(10):
        e0 = begin + step * 100_000_000 + 40_000_000
        rows.append((e0 - 20_000_000, e0 - 10_000_000, 1, 7, 0, COPY))
        rows.append((e0, e0 + 30_000_000, 0, 7, 0, KERNEL))
    activities = np.array(rows, ACTIVITY)
    window = Window(begin, end, activities, NAMES, dropped)
    write_window(window_path(server.worker.writer.path), Seen(number, window))


def test_a_window_splits_the_steps_that_follow_it(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    busy_second(server, start)
    leave_window(server, start + 10_000_000, start + SECOND)
    clock.now = start + 2 * SECOND
    view = only(found)
    (rank,) = view.ranks
    seen = rank.kernels["decode"]
    # A step's last quarter is sampling; nothing waits before it.
    assert seen.steps == 10
    assert (seen.launch_gap_ratio, seen.gap_busy_seconds) == (pytest.approx(0.5), pytest.approx(0.01))
    assert seen.age_seconds == pytest.approx(1.0)
    assert seen.busy_per_floor is not None  # the model and the peaks are known
    assert (seen.step_tokens, seen.floor_step_seconds) == (1.0, pytest.approx(900_150 / 1e12, rel=0.01))
    assert rank.top_kernels["decode"][0].name == "gemm::kernel()"
    assert rank.kernel_totals is not None
    assert rank.kernel_totals.seconds == {"decode": {"gemm": pytest.approx(0.3)}}
    assert "launch_gap" not in view.missing
    assert any(line.startswith("llmprobe_kernel_seconds_total") for line in series(found))

    busy_second(server, start + 3 * SECOND)
    clock.now = start + 5 * SECOND
    before = rank.device_time["decode"]
    after = only(found).ranks[0].device_time["decode"]
    gained = {name: after[name] - before[name] for name in after}
    assert gained["launch_gap"] == pytest.approx(0.3)
    # Nine gaps of 40 ms are known, the first as long as the request waited; a quarter of each was busy.
    assert gained["host_gap"] == pytest.approx(0.4 * 0.75)
    assert sum(gained.values()) == pytest.approx(1.0)


def test_a_window_is_counted_once_also_by_the_next_agent(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    first = collector(tmp_path, clock, server, checkpoint=tmp_path / "checkpoint")
    start = clock.now
    busy_second(server, start)
    leave_window(server, start, start + SECOND)
    clock.now = start + 2 * SECOND
    told = only(first).ranks[0].kernel_totals
    clock.now += SECOND
    assert only(first).ranks[0].kernel_totals == told
    first.save()
    first.close()
    again = only(collector(tmp_path, clock, server, checkpoint=tmp_path / "checkpoint"))
    assert again.ranks[0].kernel_totals == told


def test_old_windows_are_no_evidence(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    busy_second(server, start)
    leave_window(server, start, start + SECOND)
    clock.now = start + 2 * SECOND
    before = only(found).ranks[0]
    assert before.kernels
    clock.now = start + 80 * SECOND
    busy_second(server, start + 78 * SECOND)
    after = only(found).ranks[0].device_time["decode"]
    assert after["launch_gap"] == before.device_time["decode"]["launch_gap"]
    assert after["unattributed"] > before.device_time["decode"]["unattributed"]
    clock.now = start + 200 * SECOND
    assert only(found).ranks[0].kernels == {}


def test_windows_of_a_minute_stand_together_until_they_hold_enough_steps(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    seen = []
    for number, second in enumerate((0, 40, 45), 1):
        begin = start + second * SECOND
        busy_second(server, begin)
        leave_window(server, begin, begin + SECOND, number)
        clock.now = begin + 2 * SECOND
        seen.append(only(found).ranks[0].kernels["decode"].steps)
    assert seen == [10, 20, 20]  # the third and second are enough without the first
    clock.now = start + 104 * SECOND  # the second is older than a minute
    kernels = only(found).ranks[0].kernels["decode"]
    assert (kernels.steps, kernels.age_seconds) == (10, pytest.approx(58.0))


def test_one_or_two_steps_are_no_evidence_until_more_windows_have_seen_some(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    seen = []
    for number, second in enumerate((0, 10), 1):
        begin = start + second * SECOND
        busy_second(server, begin)
        leave_window(server, begin, begin + SECOND // 4, number)
        clock.now = begin + 2 * SECOND
        view = only(found)
        kernels = view.ranks[0].kernels
        seen.append((kernels["decode"].steps if kernels else 0, "launch_gap" in view.missing))
    assert seen == [(0, True), (4, False)]


def test_windows_that_lost_records_or_are_damaged_say_nothing(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = collector(tmp_path, clock, server)
    start = clock.now
    busy_second(server, start)
    leave_window(server, start, start + SECOND, dropped=3)
    clock.now = start + 2 * SECOND
    assert only(found).ranks[0].kernels == {}
    window_path(server.worker.writer.path).write_bytes(b"{}\nnonsense")
    clock.now += SECOND
    assert only(found).ranks[0].kernels == {}


def test_why_there_are_none_is_said(tmp_path: Path, clock: Clock, server: Server) -> None:
    found = collector(tmp_path, clock, server)
    assert "CUDA" in only(found).missing["launch_gap"]
    server.worker.update_facts(clock="cuda")
    clock.now += 3 * SECOND
    assert "LLMPROBE_KERNEL_WINDOWS" in only(found).missing["launch_gap"]
    server.worker.update_facts(kernel_windows={"on": False, "reason": "a profiler was injected"})
    clock.now += 3 * SECOND
    assert only(found).missing["launch_gap"].endswith("a profiler was injected")


def test_the_file_of_a_dead_process_goes_with_its_journal(
    tmp_path: Path, clock: Clock, server: Server, dead: set[Path]
) -> None:
    found = collector(tmp_path, clock, server, remove_dead=True)
    leave_window(server, 0, SECOND)
    path = window_path(server.worker.writer.path)
    only(found)
    dead.add(server.worker.writer.path)
    for _ in range(3):
        clock.now += 31 * SECOND
        found.tick()
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("_Z9transposePfi", "transpose(float*, int)"),
        ("nvjet_tst_128x8", "nvjet_tst_128x8"),
        ("_Znonsense", "_Znonsense"),
        ("", ""),
    ],
)
def test_names_are_shown_as_people_write_them(name: str, said: str) -> None:
    assert demangled(name) == said


def test_no_file_is_no_error(tmp_path: Path) -> None:
    windows = Windows(tmp_path / "journals" / "a.journal")
    windows.look(SECOND, lambda: np.zeros(0))
    assert (windows.evidence(SECOND), windows.totals()) == ({}, None)
