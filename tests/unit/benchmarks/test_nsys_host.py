"""Who waits for whom, from a recording of vLLM on an H200 (tests/data/PROVENANCE.md)."""

from __future__ import annotations

import contextlib
import itertools
import lzma
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from support.nsys_host import host_steps
from support.nsys_truth import device_busy, read_truth

DATA = Path(__file__).resolve().parents[2] / "data" / "nsys"


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return export("vllm_h200_graphs_decode", tmp_path)


def export(name: str, folder: Path) -> Path:
    path = folder / f"{name}.sqlite"
    path.write_bytes(lzma.decompress((DATA / f"{name}.sqlite.xz").read_bytes()))
    return path


def test_decode_steps_wait_for_the_gpu_and_the_one_with_a_prompt_lets_it_wait(recording: Path) -> None:
    found = host_steps(recording)
    decode = ~found.launched_often
    assert (decode.sum(), found.launched_often.sum()) == (63, 1)
    milliseconds = [values[decode].mean() / 1e6 for values in (found.took, found.waited, found.idle)]
    assert milliseconds == pytest.approx([5.133, 2.761, 0.079], abs=0.001)
    milliseconds = [values[~decode].mean() / 1e6 for values in (found.took, found.waited, found.idle)]
    assert milliseconds == pytest.approx([87.901, 0.009, 44.793], abs=0.001)
    assert found.calls["cudaEventSynchronize_v3020"][0] == pytest.approx(1)


def test_a_runner_that_waits_twice_a_step_has_its_steps_whole(tmp_path: Path) -> None:
    """vLLM's V1 runner, as llmprobe's ranges have it: seven launches and a graph a step."""
    recording = export("vllm_h100_decode", tmp_path)
    entered = read_truth(recording).entered
    found = host_steps(recording)
    assert len(found.took) >= len(entered) - 2
    assert found.took.mean() / 1e6 == pytest.approx(np.diff(entered).mean() / 1e6, rel=0.02)
    assert found.calls["cudaGraphLaunch_v10000"][0] == pytest.approx(1)
    assert found.calls["cudaEventSynchronize_v3020"][0] == pytest.approx(2)


def test_idle_time_is_what_lies_between_activities(recording: Path) -> None:
    """Laid beside each other one by one."""
    with contextlib.closing(sqlite3.connect(recording)) as data:
        ends = [
            row[0]
            for row in data.execute(
                "SELECT end FROM CUPTI_ACTIVITY_KIND_RUNTIME JOIN StringIds ON id = nameId "
                "WHERE value LIKE 'cudaEventSynchronize%' ORDER BY end"
            )
        ]
    busy = device_busy(recording)[0].tolist()
    by_hand = [
        end - begin - sum(max(min(last, end) - max(first, begin), 0) for first, last in busy)
        for begin, end in itertools.pairwise(ends)
    ]
    assert np.array_equal(host_steps(recording).idle, by_hand)


def test_a_thread_that_never_waits_says_nothing(recording: Path) -> None:
    with contextlib.closing(sqlite3.connect(recording)) as data:
        data.execute("UPDATE StringIds SET value = 'cudaOther' WHERE value LIKE 'cudaEventSynchronize%'")
        data.commit()
    with pytest.raises(ValueError, match="0 waits of the engine's thread"):
        host_steps(recording)
