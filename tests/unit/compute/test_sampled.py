"""Windows applied to steps that nobody watched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.accounting import COMPONENTS, StepAccounts, account
from llmprobe.compute.evidence import KernelEvidence
from llmprobe.compute.figures import STALLS, summarise
from llmprobe.compute.sampled import apply_windows
from llmprobe.record.layout import STEP, Phase

PENDING = np.array([[0, 10**12]])


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
    apply_windows(accounts, {"decode": seen(gap_busy_ratio=0.5)})
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
        gap_busy_ratio=gap_busy,
    )
    apply_windows(accounts, {"decode": evidence})
    assert accounts.components.sum(axis=1) == pytest.approx(before.components.sum(axis=1))
    assert (accounts.components >= -1e-18).all()
    stalls = sum(of(accounts, name) for name in STALLS)
    assert stalls <= accounts.components.sum() * 1e9 + 1e-6
