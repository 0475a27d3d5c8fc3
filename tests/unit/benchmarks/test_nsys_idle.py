"""How long a device idled, from recordings of vLLM on an H100 (tests/data/PROVENANCE.md)."""

from __future__ import annotations

import contextlib
import lzma
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.nsys_idle import idle
from support.nsys_truth import Truth, device_busy, read_truth

DATA = Path(__file__).resolve().parents[2] / "data" / "nsys"


def truth(name: str, folder: Path) -> Truth:
    return read_truth(export(name, folder))


def export(name: str, folder: Path) -> Path:
    path = folder / "export.sqlite"
    path.write_bytes(lzma.decompress((DATA / f"vllm_h100_{name}.sqlite.xz").read_bytes()))
    return path


@pytest.mark.parametrize(("name", "ratio", "inside"), [("decode", 0.014, 0.009), ("prefill", 0.018, 0.016)])
def test_graphs_leave_the_device_little_to_wait_for(
    name: str, ratio: float, inside: float, tmp_path: Path
) -> None:
    found = idle(truth(name, tmp_path))
    assert found is not None
    assert (found.ratio, found.inside) == pytest.approx((ratio, inside), abs=0.001)


def test_eager_decode_idles_inside_its_steps(tmp_path: Path) -> None:
    """Three quarters of the time: every activity laid beside the next by hand, whatever step it is of."""
    recorded = truth("eager", tmp_path)
    found = idle(recorded)
    assert found is not None
    begin, end = recorded.begin[0], recorded.end[-1]
    ran = sum(max(min(b, end) - max(a, begin), 0) for a, b in recorded.busy.tolist())
    assert found.ratio == pytest.approx(1 - ran / (end - begin))
    assert (found.ratio, found.inside) == pytest.approx((0.745, 0.694), abs=0.001)


def test_a_recording_that_lost_launches_says_nothing(tmp_path: Path) -> None:
    recorded = truth("decode", tmp_path)
    complete = recorded.complete.copy()
    complete[2] = False
    assert idle(replace(recorded, complete=complete)) is None


def test_busy_time_needs_no_range_and_what_nsys_lost_is_told(tmp_path: Path) -> None:
    path = export("eager", tmp_path)
    found, lost = device_busy(path)
    assert np.array_equal(found, read_truth(path).busy)
    with contextlib.closing(sqlite3.connect(path)) as data:
        kernels = "CUPTI_ACTIVITY_KIND_KERNEL"
        data.execute("DELETE FROM NVTX_EVENTS")
        data.execute(f"DELETE FROM {kernels} WHERE rowid IN (SELECT rowid FROM {kernels} LIMIT 100)")
        data.commit()
    fewer, more_lost = device_busy(path)
    assert len(fewer) > 0
    assert more_lost > lost
