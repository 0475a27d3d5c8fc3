"""What decides whether a change of load can be scored, and from when on a load is steady."""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu_run import _changed, _steady_at
from support.gpu_scenario_list import SCENARIOS
from support.labels import Label

SECOND = 10**9
BY_NAME = {item.name: item for item in SCENARIOS}
HOST = Label(("sync_bound",), "a rule", True, "host_between_steps")


@pytest.mark.parametrize(
    ("stood", "holds"), [("memory_bound", True), ("sync_bound", False), ("unknown", False), ("idle", False)]
)
def test_a_change_is_one_of_a_verdict_that_stood(stood: str, holds: bool) -> None:
    label = _changed(HOST, BY_NAME["change: the host becomes slow"], {"decode": stood})
    assert label.holds == holds
    assert ("before the change" in label.rule) != holds


def test_another_phase_may_have_had_the_class_that_follows() -> None:
    label = Label(("compute_bound",), "a rule", True)
    assert _changed(label, BY_NAME["change: decode to prefill"], {"decode": "compute_bound"}).holds
    assert not _changed(label, BY_NAME["change: decode to prefill"], {}).holds


def test_without_a_change_nothing_has_to_have_stood_before() -> None:
    assert _changed(HOST, BY_NAME["host between steps, async"], {}) is HOST


def test_a_load_is_steady_once_its_first_requests_have_tokens() -> None:
    rows = np.array([(14 * SECOND,), (12 * SECOND,), (30 * SECOND,)], dtype=[("first", "i8")])
    assert _steady_at(rows, 10 * SECOND, 2) == 4.0
    assert _steady_at(rows, 10 * SECOND, 3) == 5.0  # no later than counters are read
    assert _steady_at(rows[:0], 10 * SECOND, 3) == 0.0
    assert _steady_at(None, 0, 0) == 0.0
