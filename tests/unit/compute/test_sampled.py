"""Windows applied to steps that nobody watched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.accounting import COMPONENTS, StepAccounts, account
from llmprobe.compute.evidence import KernelEvidence, Unwatched
from llmprobe.compute.figures import STALLS, summarise
from llmprobe.compute.sampled import apply_windows, seen_of
from llmprobe.record.layout import STEP, Phase

PENDING = np.array([[0, 10**12]])
NONE_ELSE = {"communication_ratio": 0.0, "transfer_ratio": 0.0}
WORK = {"busy_per_floor": 1.5, "floor_step_seconds": 40e-9, "step_tokens": 4.0, **NONE_ELSE}


def rows() -> StepAccounts:
    """Two decode steps of 80 ns after gaps of 20 ns, the second restarted: its gap is not known."""
    steps = np.zeros(2, STEP)
    for number, (row, begin) in enumerate(zip(steps, (1020, 1120), strict=True), 1):
        row["step"], row["phase"] = number, Phase.DECODE
        row["e0"], row["e1"], row["e2"], row["e3"] = begin, begin + 60, begin + 70, begin + 80
    return account(steps, cursor_ns=1000, last_step=0, pending=PENDING, model=None, peaks=None)


def of(accounts: StepAccounts, name: str) -> float:
    return float(accounts.components[:, COMPONENTS.index(name)].sum() * 1e9)


def seen(**changes: float) -> KernelEvidence:
    values = {"launch_gap_ratio": 0.25, "communication_ratio": 0.1, "transfer_ratio": 0.05, **changes}
    return KernelEvidence(steps=10, age_seconds=1.0, **values)


def test_busy_time_is_split_by_what_windows_saw() -> None:
    accounts = rows()
    apply_windows(accounts, {"decode": seen(gap_busy_seconds=10e-9)})
    assert of(accounts, "launch_gap") == pytest.approx(40)
    assert of(accounts, "communication") == pytest.approx(16)
    assert of(accounts, "transfer") == pytest.approx(8)
    assert of(accounts, "host_gap") == pytest.approx(20)
    assert of(accounts, "inefficiency") == pytest.approx(140 - 64 + 20)
    assert of(accounts, "unattributed") == pytest.approx(0)
    assert accounts.sampled_kernels.all()


def test_other_phases_stay_as_they_are() -> None:
    accounts, before = rows(), rows()
    apply_windows(accounts, {"prefill": seen()})
    assert (accounts.components == before.components).all()
    assert not accounts.sampled_kernels.any()


def test_figures_count_bubbles_as_waiting_and_say_that_they_are_no_lower_bound_now() -> None:
    plain = summarise(rows(), since_ns=0, now_ns=2000, peaks=None)["decode"]
    accounts = rows()
    apply_windows(accounts, {"decode": seen(communication_ratio=0.0, transfer_ratio=0.0)})
    found = summarise(accounts, since_ns=0, now_ns=2000, peaks=None)["decode"]
    assert (plain.sync_gap_ratio, plain.sync_gap_is_lower_bound) == (pytest.approx(60 / 200), True)
    assert (found.sync_gap_ratio, found.sync_gap_is_lower_bound) == (pytest.approx(100 / 200), False)


@given(*[st.floats(0, 1)] * 4)
def test_a_row_still_sums_to_the_time_it_covers(
    launch: float, communication: float, transfer: float, gap_busy: float
) -> None:
    accounts, before = rows(), rows()
    evidence = seen(
        launch_gap_ratio=launch,
        communication_ratio=communication,
        transfer_ratio=transfer,
        gap_busy_seconds=gap_busy * 30e-9,
    )
    apply_windows(accounts, {"decode": evidence})
    assert accounts.components.sum(axis=1) == pytest.approx(before.components.sum(axis=1))
    assert (accounts.components >= -1e-18).all()
    stalls = sum(of(accounts, name) for name in STALLS)
    assert stalls <= accounts.components.sum() * 1e9 + 1e-6


def modelled(*busy_ns: int, floor_ns: int = 40) -> StepAccounts:
    """Decode steps that were busy for so long, one after another, with a floor of 40 ns each."""
    steps = np.zeros(len(busy_ns), STEP)
    begin = 1000
    for number, (row, busy) in enumerate(zip(steps, busy_ns, strict=True), 1):
        row["step"], row["phase"] = number, Phase.DECODE
        row["e0"], row["e1"], row["e2"], row["e3"] = begin, begin + busy, begin + busy, begin + busy
        begin += busy
    accounts = account(steps, cursor_ns=1000, last_step=0, pending=PENDING, model=None, peaks=None)
    accounts.floor_s[:] = floor_ns / 1e9
    accounts.decode_tokens[:] = 4
    accounts.components[:, COMPONENTS.index("floor_memory")] = floor_ns / 1e9
    accounts.components[:, COMPONENTS.index("unattributed")] -= floor_ns / 1e9
    return accounts


def test_bubbles_are_what_steps_take_beyond_what_their_kernels_run_for() -> None:
    """Windows saw kernels run for 60 ns and nothing else; now the host is late, and not in the windows."""
    accounts = modelled(80, 100, 60)
    apply_windows(accounts, {"decode": seen(launch_gap_ratio=0.0, **WORK)})
    assert accounts.components[:, COMPONENTS.index("launch_gap")] * 1e9 == pytest.approx([20, 40, 0])
    assert of(accounts, "inefficiency") == pytest.approx(3 * 20)


def test_steps_that_differ_from_their_model_make_no_bubbles_together() -> None:
    accounts = modelled(50, 70, 60)  # 60 each, in the mean
    apply_windows(accounts, {"decode": seen(**WORK)})
    assert of(accounts, "launch_gap") == pytest.approx(0)


def test_steps_without_a_floor_have_the_share_of_bubbles_that_windows_saw() -> None:
    accounts = modelled(80, 80, floor_ns=0)
    apply_windows(accounts, {"decode": seen(**WORK)})
    assert of(accounts, "launch_gap") == pytest.approx(0.25 * 160)


def test_what_prepares_a_step_takes_as_long_however_long_the_gap_is() -> None:
    accounts = rows()  # gaps of 20 ns
    apply_windows(accounts, {"decode": seen(gap_busy_seconds=5e-9)})
    assert of(accounts, "host_gap") == pytest.approx(40 - 10)


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8),
    st.floats(0.5, 5.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_bubbles_are_never_less_than_none_nor_more_than_busy_time(
    busy: list[float], per_floor: float, floor_ratio: float, launch: float
) -> None:
    times = np.array(busy)
    floor = times[::-1] * floor_ratio
    work = {"floor_step_seconds": float(floor.mean()), "step_tokens": 4.0}
    evidence = seen(launch_gap_ratio=launch, busy_per_floor=per_floor, **work)
    steps = Unwatched(times, times, floor, np.full(len(times), 4.0))
    for earlier in (None, steps):
        gaps = evidence.launch_gaps(steps, earlier)
        assert (gaps >= 0).all()
        assert (gaps <= times * (1 + 1e-9)).all()


@pytest.mark.parametrize(("floor_ns", "tokens"), [(60, 4), (40, 16), (20, 4), (40, 1)])
def test_steps_of_other_work_have_the_share_of_bubbles_that_windows_saw(floor_ns: int, tokens: int) -> None:
    """Kernels are not as far from their floor in another batch: that would look like bubbles."""
    accounts = modelled(80, 80, floor_ns=floor_ns)
    accounts.decode_tokens[:] = tokens
    apply_windows(accounts, {"decode": seen(**{**WORK, "launch_gap_ratio": 0.1})})
    assert of(accounts, "launch_gap") == pytest.approx(0.1 * 160)


def test_what_scatters_from_step_to_step_is_no_bubble_however_few_come_at_a_time() -> None:
    scattered = np.random.default_rng(1).normal(60, 12, 400).clip(40)
    times = {}
    for at_once in (1, 400):
        earlier: dict[str, Unwatched] = {}
        times[at_once] = 0.0
        for first in range(0, 400, at_once):
            accounts = modelled(*scattered[first : first + at_once].round().astype(int).tolist())
            apply_windows(accounts, {"decode": seen(**WORK)}, earlier)
            times[at_once] += of(accounts, "launch_gap")
    assert times[400] < 0.01 * scattered.sum()
    assert times[1] < 0.025 * scattered.sum()
    assert len(earlier["decode"].span_s) == 32


def test_figures_with_windows_applied_say_themselves_what_was_seen() -> None:
    accounts = modelled(80, 100, 60)
    evidence = seen(launch_gap_ratio=0.5, **WORK)
    before = summarise(modelled(80, 100, 60), since_ns=0, now_ns=2000, peaks=None)["decode"]
    apply_windows(accounts, {"decode": evidence})
    figures = summarise(accounts, since_ns=0, now_ns=2000, peaks=None)["decode"]
    for each in (before, figures):  # looked at as a whole, or step by step
        found = seen_of(each, evidence)
        assert found.launch_gap_ratio == pytest.approx(60 / 240)
        assert found.transfer_ratio == 0
