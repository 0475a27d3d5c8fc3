"""Ranges of the host on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.analysis import analyze
from llmprobe.analysis.events import Spans
from llmprobe.analysis.phases import owner

from .nsys_file import THREAD, NsysFile

RANGE = st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(0, 1))


@settings(deadline=None)
@given(rows=st.lists(RANGE, max_size=12), times=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 2))))
def test_a_launch_belongs_to_the_innermost_range_of_its_thread(
    rows: list[tuple[int, int, int]], times: list[tuple[int, int]]
) -> None:
    columns = [(begin, begin + length, 0, thread, -1) for begin, length, thread in rows]
    ranges = Spans(*np.array(columns, dtype=np.int64).reshape(-1, 5).T)
    when = np.array([time for time, _ in times], dtype=np.int64)
    thread = np.array([number for _, number in times], dtype=np.int64)
    for time, of, row in zip(when, thread, owner(ranges, when, thread), strict=True):
        holding = [(begin, -end) for begin, end, _, mine, _ in columns if mine == of and begin <= time < end]
        if row < 0:
            assert not holding
        else:
            assert columns[row][3] == of
            assert (columns[row][0], -columns[row][1]) == max(holding)


def step(file: NsysFile, phase: str, host: int, device: list[tuple[int, int]], thread: int = THREAD) -> None:
    """One marked step that launches kernels."""
    file.range(phase, host, host + 100, thread=thread)
    for number, (begin, end) in enumerate(device):
        file.kernel("nvjet", begin, end, launched=host + 10 + number, thread=thread)


def test_what_runs_between_steps_is_no_idle_time(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    step(file, "prefill", 0, [(1000, 2000)])
    file.kernel("prepare", 2500, 2600, launched=150)
    step(file, "decode", 200, [(3000, 3400), (3600, 4000)])
    rows = {row.name: row for row in analyze(file.close()).phases}
    decode = rows["decode"]
    assert decode.gap_seconds == pytest.approx(900e-9)
    assert decode.seconds == pytest.approx(1000e-9)
    assert decode.idle_ratio == pytest.approx(0.2)
    assert decode.sync_gap_ratio == pytest.approx((900 + 200) / 1900)
    assert rows["prefill"].gap_seconds == 0


def test_ranks_that_mark_the_same_time_are_told_apart_by_thread(tmp_path: Path) -> None:
    other = (1 << 56) | (5000 << 24)
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    file.domain(thread=other | 1)
    step(file, "decode", 0, [(1000, 2000)])
    file.range("prefill", 0, 100, thread=other | 1)
    file.kernel("nvjet", 1000, 5000, launched=50, device=1, thread=other | 1)
    rows = {row.name: row for row in analyze(file.close()).phases}
    assert (rows["decode"].gpu, rows["prefill"].gpu) == ("GPU 0", "GPU 1")
    assert rows["prefill"].seconds == pytest.approx(4000e-9)


def test_work_launched_outside_of_ranges_belongs_to_no_phase(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    step(file, "decode", 0, [(1000, 2000)])
    file.kernel("late", 3000, 9000, launched=100)  # the range ends at 100
    (row,) = analyze(file.close()).phases
    assert row.seconds == pytest.approx(1000e-9)


def test_parts_stand_below_their_phase(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    step(file, "decode", 0, [(1000, 2000), (2000, 2500)])
    file.range("forward", 5, 11)
    file.range("sample", 11, 99)
    rows = {row.part: row for row in analyze(file.close()).phases}
    assert rows[None].seconds == pytest.approx(1500e-9)
    assert (rows["forward"].name, rows["forward"].seconds) == ("decode", pytest.approx(1000e-9))
    assert rows["sample"].seconds == pytest.approx(500e-9)
    assert rows["sample"].sync_gap_ratio is None


def test_a_range_that_was_cut_off_is_left_out_and_said(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    step(file, "decode", 0, [(1000, 2000)])
    file.range("decode", 500, None)
    report = analyze(file.close())
    assert report.phases[0].steps == 1
    assert "cut_ranges" in [reason.check for reason in report.trust.reasons]


def test_a_draft_inside_of_a_step_is_a_phase_of_its_own(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    file.range("decode", 0, 1000)
    file.range("draft", 100, 200)
    for launched, begin in ((50, 5000), (150, 6000), (500, 7000)):
        file.kernel("nvjet", begin, begin + 1000, launched=launched)
    rows = {row.name: row for row in analyze(file.close()).phases}
    assert rows["draft"].seconds == pytest.approx(1000e-9)
    assert rows["decode"].seconds == pytest.approx(3000e-9)


def test_a_step_of_which_something_had_yet_to_run_is_cut(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    step(file, "decode", 0, [(10_000, 20_000)])
    step(file, "decode", 200, [(25_000, 35_000)])  # 5 µs later
    step(file, "decode", 400, [(45_000, 46_000)])  # 10 µs later
    for number in range(3):
        file.call("cudaLaunchKernel_v7000", 420 + number)
    step(file, "prefill", 600, [])
    file.call("cudaLaunchKernel_v7000", 650)
    report = analyze(file.close())
    (row,) = report.phases
    assert (row.steps, row.cut_steps) == (3, 1)
    assert row.sync_gap_ratio == pytest.approx(15 / 36)
    assert row.comparable_sync_gap_ratio == pytest.approx(5 / 25)
    text = " ".join(report.to_text().split())
    assert "of these in part only, for the recording began or ended in them: 1 decode" in text


def test_gaps_that_the_device_itself_takes_are_not_held_against_a_live_figure(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    step(file, "decode", 0, [(10_000, 20_000), (20_900, 30_000), (32_000, 40_000)])
    step(file, "decode", 200, [(40_800, 50_000)])
    report = analyze(file.close())
    (row,) = report.phases
    assert row.cut_steps == 0
    assert row.sync_gap_ratio == pytest.approx((900 + 2000 + 800) / 40_000)
    assert row.comparable_sync_gap_ratio == pytest.approx(2000 / 40_000)
    (gpu,) = report.gpus
    assert gpu.back_to_back_idle_seconds == pytest.approx(1700e-9)
    assert gpu.busy_seconds == pytest.approx(36_300e-9)
    assert "gaps below 1 µs 1.7 µs" in report.to_text()
