"""What a kernel window says of steps, on activities made by hand and at random."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.kernel_windows import COPY, KERNEL, phase_windows, together
from llmprobe.compute.steps import RESTARTED
from llmprobe.record.cupti import ACTIVITY
from llmprobe.record.layout import STEP, Phase

NAMES = ["ampere_gemm", "ncclDevKernel_AllReduce", "memcpy HtoD", "flash_fwd_kernel"]
GEMM, NCCL, MEMCPY, FLASH = range(4)


def step(
    number: int, e0: int, e1: int, e2: int, e3: int, *, phase: int = Phase.DECODE, time: int = 0
) -> np.ndarray:
    row = np.zeros(1, STEP)
    row["step"], row["phase"], row["time"] = number, phase, time or e0 - 5
    row["e0"], row["e1"], row["e2"], row["e3"] = e0, e1, e2, e3
    return row


def activities(*rows: tuple[int, int, int]) -> np.ndarray:
    """(begin, end, name) each."""
    made = np.zeros(len(rows), ACTIVITY)
    for row, (begin, end, name) in zip(made, rows, strict=True):
        row["begin"], row["end"], row["name"] = begin, end, name
        row["kind"] = COPY if name == MEMCPY else KERNEL
    return made[np.argsort(made["begin"], kind="stable")]


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
    found = phase_windows(seen, NAMES, steps, begin_ns=1140, end_ns=2000)["decode"]
    assert found.steps == 1  # the first was launched before the window was open
    assert (found.span_ns, found.sample_gap_ns) == (100, 10)
    assert found.launch_gap_ns == 10 + 10 + 10  # before NCCL, before the copy, after it; not the sample gap
    assert (found.communication_ns, found.transfer_ns) == (15, 10)
    assert found.busy_ns == 60
    assert found.class_ns == {"gemm": 20, "communication": 20, "attention": 15}
    assert found.kernel_span_ns == 100
    assert (found.gap_ns, found.gap_busy_ns) == (0, 0)  # it began before the window


def test_the_gap_between_whole_steps_is_split_into_waiting_and_preparation() -> None:
    steps = np.concatenate([step(1, 1000, 1100, 1100, 1100), step(2, 1200, 1300, 1300, 1300)])
    seen = activities((1000, 1100, GEMM), (1150, 1175, MEMCPY), (1200, 1300, GEMM))
    found = phase_windows(seen, NAMES, steps, begin_ns=900, end_ns=2000)["decode"]
    assert (found.gap_ns, found.gap_busy_ns) == (100, 25)
    assert found.evidence(3.0).gap_busy_ratio == 0.25
    steps["flags"][1] = RESTARTED
    restarted = phase_windows(seen, NAMES, steps, begin_ns=900, end_ns=2000)["decode"]
    assert restarted.evidence(3.0).gap_busy_ratio is None


def test_phases_are_apart_and_steps_that_outlast_the_window_are_left_out() -> None:
    steps = np.concatenate(
        [step(1, 1000, 1100, 1100, 1100), step(2, 1200, 1300, 1300, 1300, phase=Phase.PREFILL)]
    )
    seen = activities((1000, 1100, GEMM), (1200, 1300, FLASH))
    assert set(phase_windows(seen, NAMES, steps, 900, 2000)) == {"decode", "prefill"}
    assert set(phase_windows(seen, NAMES, steps, 900, 1299)) == {"decode"}
    assert phase_windows(seen, NAMES, steps, 1500, 2000) == {}


def test_a_window_without_kernels_is_all_bubble() -> None:
    steps = step(1, 1000, 1100, 1100, 1100)
    found = phase_windows(activities(), [], steps, 900, 2000)["decode"]
    evidence = found.evidence(0.0)
    assert (evidence.launch_gap_ratio, evidence.clock_ratio) == (1.0, 0.0)
    assert (found.class_ns, found.top) == ({}, ())


def test_windows_together_add_up_and_rank_their_kernels_anew() -> None:
    steps = step(1, 1000, 1100, 1100, 1100)
    one = phase_windows(activities((1000, 1060, GEMM)), NAMES, steps, 900, 2000)["decode"]
    two = phase_windows(activities((1000, 1010, GEMM), (1020, 1100, FLASH)), NAMES, steps, 900, 2000)[
        "decode"
    ]
    both = together([one, two])
    assert (both.steps, both.span_ns, both.busy_ns) == (2, 200, 150)
    assert [(kernel.name, kernel.count) for kernel in both.top] == [
        ("flash_fwd_kernel", 1),
        ("ampere_gemm", 2),
    ]


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
    for found in phase_windows(seen, NAMES, np.concatenate(steps), 0, 10_000).values():
        assert 0 <= found.launch_gap_ns <= found.span_ns - found.sample_gap_ns
        assert 0 <= found.communication_ns + found.transfer_ns <= found.busy_ns <= found.span_ns
        assert 0 <= found.gap_busy_ns <= found.gap_ns
        in_sample_gap = found.busy_ns + found.launch_gap_ns - (found.span_ns - found.sample_gap_ns)
        assert 0 <= in_sample_gap <= found.sample_gap_ns
