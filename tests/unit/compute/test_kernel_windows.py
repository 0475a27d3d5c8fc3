"""What a kernel window says of steps, on activities made by hand and at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.kernel_windows import COPY, KERNEL, PhaseWindow, phase_windows, together
from llmprobe.compute.steps import RESTARTED
from llmprobe.record.cupti_records import ACTIVITY
from llmprobe.record.layout import STEP, Phase

US = 1000  # small numbers stand for microseconds: below one, nothing is a bubble
NAMES = ["ampere_gemm", "ncclDevKernel_AllReduce", "memcpy HtoD", "flash_fwd_kernel"]
GEMM, NCCL, MEMCPY, FLASH = range(4)


def step(
    number: int, e0: int, e1: int, e2: int, e3: int, *, phase: int = Phase.DECODE, time: int = 0
) -> np.ndarray:
    row = np.zeros(1, STEP)
    row["step"], row["phase"], row["time"] = number, phase, (time or e0 - 5) * US
    row["decode_tokens"] = 1
    row["e0"], row["e1"], row["e2"], row["e3"] = e0 * US, e1 * US, e2 * US, e3 * US
    return row


def activities(*rows: tuple[int, int, int]) -> np.ndarray:
    """(begin, end, name) each."""
    made = np.zeros(len(rows), ACTIVITY)
    for row, (begin, end, name) in zip(made, rows, strict=True):
        row["begin"], row["end"], row["name"] = begin * US, end * US, name
        row["kind"] = COPY if name == MEMCPY else KERNEL
    return made[np.argsort(made["begin"], kind="stable")]


def windows(seen: np.ndarray, steps: np.ndarray, begin: int, end: int) -> dict[str, PhaseWindow]:
    return phase_windows(seen, NAMES, steps, begin * US, end * US)


def test_bubbles_gaps_and_exposed_work_are_told_apart() -> None:
    steps = np.concatenate([step(1, 1000, 1080, 1090, 1100), step(2, 1200, 1280, 1290, 1300, time=1150)])
    seen = activities(
        (1000, 1080, GEMM),
        (1090, 1100, GEMM),
        (1110, 1130, MEMCPY),  # prepares step 2, between the steps
        (1200, 1220, GEMM),
        (1230, 1250, NCCL),  # exposed
        (1240, 1245, FLASH),  # hides 5 of it
        (1260, 1270, MEMCPY),  # exposed
        (1290, 1300, FLASH),
    )
    found = windows(seen, steps, 1140, 2000)["decode"]
    assert found.steps == 1  # the first was launched before the window was open
    assert (found.span_ns, found.sample_gap_ns) == (100 * US, 10 * US)
    assert (
        found.launch_gap_ns == (10 + 10 + 10) * US
    )  # before NCCL, before the copy, after it; not the sample gap
    assert (found.communication_ns, found.transfer_ns) == (15 * US, 10 * US)
    assert found.busy_ns == 60 * US
    assert found.class_ns == {"gemm": 20 * US, "communication": 20 * US, "attention": 15 * US}
    assert found.kernel_span_ns == 100 * US
    assert (found.gap_ns, found.gap_busy_ns) == (0, 0)  # it began before the window


def test_the_gap_between_whole_steps_is_split_into_waiting_and_preparation() -> None:
    steps = np.concatenate([step(1, 1000, 1100, 1100, 1100), step(2, 1200, 1300, 1300, 1300)])
    seen = activities((1000, 1100, GEMM), (1150, 1175, MEMCPY), (1200, 1300, GEMM))
    found = windows(seen, steps, 900, 2000)["decode"]
    assert (found.gap_ns, found.gap_busy_ns) == (100 * US, 25 * US)
    assert found.evidence(3.0).gap_busy_seconds == 25e-6
    steps["flags"][1] = RESTARTED
    restarted = windows(seen, steps, 900, 2000)["decode"]
    assert restarted.evidence(3.0).gap_busy_seconds is None


def test_how_long_kernels_ran_for_their_floor_is_known_where_every_floor_is() -> None:
    steps = np.concatenate([step(1, 1000, 1100, 1100, 1100), step(2, 1200, 1300, 1300, 1300)])
    seen = activities((1000, 1080, GEMM), (1200, 1280, GEMM))
    floors = np.array([50e-6, 50e-6])
    found = phase_windows(seen, NAMES, steps, 900 * US, 2000 * US, floors)["decode"]
    evidence = found.evidence(3.0)
    assert evidence.busy_per_floor == pytest.approx(1.6)
    assert (evidence.floor_step_seconds, evidence.step_tokens) == (pytest.approx(50e-6), 1)
    assert together([found, found]).evidence(3.0).busy_per_floor == pytest.approx(1.6)
    unknown = phase_windows(seen, NAMES, steps, 900 * US, 2000 * US, floors * [1, 0])["decode"]
    assert unknown.evidence(3.0).busy_per_floor is None
    assert windows(seen, steps, 900, 2000)["decode"].evidence(3.0).busy_per_floor is None
    waits = activities((1000, 1080, GEMM), (1200, 1280, NCCL))  # for as long as another rank is late
    late = phase_windows(waits, NAMES, steps, 900 * US, 2000 * US, floors)["decode"]
    assert late.evidence(3.0).busy_per_floor is None


def test_phases_are_apart_and_steps_that_outlast_the_window_are_left_out() -> None:
    steps = np.concatenate(
        [step(1, 1000, 1100, 1100, 1100), step(2, 1200, 1300, 1300, 1300, phase=Phase.PREFILL)]
    )
    seen = activities((1000, 1100, GEMM), (1200, 1300, FLASH))
    assert set(windows(seen, steps, 900, 2000)) == {"decode", "prefill"}
    assert set(windows(seen, steps, 900, 1299)) == {"decode"}
    assert windows(seen, steps, 1500, 2000) == {}


def test_a_window_without_kernels_is_all_bubble() -> None:
    steps = step(1, 1000, 1100, 1100, 1100)
    found = phase_windows(activities(), [], steps, 900 * US, 2000 * US)["decode"]
    evidence = found.evidence(0.0)
    assert (evidence.launch_gap_ratio, evidence.clock_ratio) == (1.0, 0.0)
    assert (found.class_ns, found.top) == ({}, ())


def test_windows_together_add_up_and_rank_their_kernels_anew() -> None:
    steps = step(1, 1000, 1100, 1100, 1100)
    one = windows(activities((1000, 1060, GEMM)), steps, 900, 2000)["decode"]
    two = windows(activities((1000, 1010, GEMM), (1020, 1100, FLASH)), steps, 900, 2000)["decode"]
    both = together([one, two])
    assert (both.steps, both.span_ns, both.busy_ns) == (2, 200 * US, 150 * US)
    assert [(kernel.name, kernel.count) for kernel in both.top] == [
        ("flash_fwd_kernel", 1),
        ("ampere_gemm", 2),
    ]


def test_kernels_back_to_back_leave_no_bubble() -> None:
    steps = step(1, 1000, 1100, 1100, 1100)
    seen = activities((1000, 1049, GEMM), (1050, 1098, FLASH))
    seen["begin"][1] -= 100  # 900 ns after the one before
    assert windows(seen, steps, 900, 2000)["decode"].launch_gap_ns == 2 * US
    seen["begin"][1] += 200
    assert windows(seen, steps, 900, 2000)["decode"].launch_gap_ns == 2 * US + 1100


def test_what_the_window_itself_costs_is_taken_off() -> None:
    before = [step(number, at, at + 90, at + 90, at + 90) for number, at in enumerate(range(0, 1000, 100), 1)]
    inside = [step(number, at, at + 100, at + 100, at + 100) for number, at in ((11, 1100), (12, 1300))]
    seen = activities((1130, 1200, GEMM), (1330, 1400, GEMM))
    found = windows(seen, np.concatenate([*before, *inside]), 1050, 2000)["decode"]
    assert (found.span_ns, found.disturbed_ns, found.launch_gap_ns) == (180 * US, 20 * US, 40 * US)
    longer = np.concatenate([*before, *inside])
    longer["decode_tokens"][:10] = 1
    longer["decode_tokens"][10:] = 2  # another load: no comparison
    assert windows(seen, longer, 1050, 2000)["decode"].disturbed_ns == 0


def test_steps_that_vary_by_themselves_do_not_hide_their_bubbles() -> None:
    """Two mixed steps in a window that are longer than most before it, as some of those were."""
    lengths = [30, 80, 30, 80, 30, 80, 30, 30, 30, 80]
    before = [
        step(number, at, at + length, at + length, at + length, phase=Phase.MIXED)
        for number, (at, length) in enumerate(zip(range(0, 1000, 100), lengths, strict=True), 1)
    ]
    inside = [
        step(number, at, at + 80, at + 80, at + 80, phase=Phase.MIXED)
        for number, at in ((11, 1100), (12, 1300))
    ]
    seen = activities((1150, 1180, GEMM), (1350, 1380, GEMM))
    found = windows(seen, np.concatenate([*before, *inside]), 1050, 2000)["mixed"]
    assert (found.span_ns, found.disturbed_ns, found.launch_gap_ns) == (160 * US, 0, 100 * US)


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 400), st.integers(0, 3)), max_size=30),
    st.lists(st.tuples(*[st.integers(0, 200)] * 4), min_size=1, max_size=6),
)
def test_parts_never_exceed_their_whole(
    ran: list[tuple[int, int, int]], lengths: list[tuple[int, int, int, int]]
) -> None:
    steps, at = [], 100
    for number, (gap, forward, wait, sample) in enumerate(lengths, 1):
        e0 = at + gap
        at = e0 + forward + wait + sample
        steps.append(step(number, e0, e0 + forward, e0 + forward + wait, at, time=50))
    seen = activities(*((begin, begin + length, name) for begin, length, name in ran))
    for found in windows(seen, np.concatenate(steps), 0, 10_000).values():
        assert 0 <= found.launch_gap_ns <= found.span_ns - found.sample_gap_ns
        assert 0 <= found.communication_ns + found.transfer_ns <= found.busy_ns <= found.span_ns
        assert 0 <= found.gap_busy_ns <= found.gap_ns
        in_sample_gap = found.busy_ns + found.launch_gap_ns - (found.span_ns - found.sample_gap_ns)
        assert 0 <= in_sample_gap <= found.sample_gap_ns
