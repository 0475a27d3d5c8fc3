"""The clock lies as long as it is told to, and no longer."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import slow_host
from support.lying_clock import make_clocks_lie

from llmprobe.record.clock import HostClock
from llmprobe.record.cuda_clock import CudaClock


def test_spans_are_told_to_be_a_share_of_what_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(HostClock, "harvest", HostClock.harvest)
    monkeypatch.setattr(CudaClock, "_place", CudaClock._place)
    file = tmp_path / "clock"
    monkeypatch.setenv(slow_host.CLOCK_VARIABLE, str(file))
    make_clocks_lie()
    clock = HostClock()

    def harvested() -> list[tuple[int, int, int, int]]:
        stamps = clock.begin(None)
        assert stamps is not None
        stamps.ns = [1000, 1400, 0, 2000]
        clock.finish(stamps)
        return [done.times for done in clock.harvest()]

    assert harvested() == [(1000, 1400, 1400, 2000)]
    slow_host.tell(file, 0.5)
    assert harvested() == [(1000, 1200, 1200, 1500)]
    slow_host.tell(file, 0)
    assert harvested() == [(1000, 1400, 1400, 2000)]
