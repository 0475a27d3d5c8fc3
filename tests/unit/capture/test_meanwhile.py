"""Live figures of a capture's own seconds, from step records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collect.pretended import MODEL

from llmprobe.capture.meanwhile import (
    figures_of,
    journal_steps,
    kept_bounds,
    kept_steps,
    meanwhile,
    read_steps,
    roofs,
    steps_before,
)
from llmprobe.compute.accounting import step_floors
from llmprobe.compute.evidence import KernelEvidence
from llmprobe.record.journal import JournalError
from llmprobe.record.layout import STEP, Clock, Flag, Phase
from llmprobe.record.recorder import Recorder

MS = 1_000_000
WINDOW = KernelEvidence(20, 0.25, 0.0, 0.0, age_seconds=3.0)


def records(*steps: tuple[Phase, int, int, int]) -> np.ndarray:
    """Of (phase, begin, end, flags), in milliseconds; sampling takes the last one, 1 ms after the forward."""
    rows = np.zeros(len(steps), STEP)
    for number, (row, (phase, begin, end, flags)) in enumerate(zip(rows, steps, strict=True), 1):
        row["step"], row["phase"], row["flags"] = number, phase, flags
        row["e0"], row["e1"], row["e2"], row["e3"] = (at * MS for at in (begin, end - 2, end - 1, end))
    return rows


def test_the_gaps_are_those_of_the_recorded_steps() -> None:
    decode = figures_of(records((Phase.DECODE, 100, 110, 0), (Phase.DECODE, 112, 120, 0)), {})["decode"]
    # Nothing is known of the time before the first; 2 ms before the second, and 1 ms before each sampling.
    assert decode["sync_gap_ratio"] == pytest.approx(4 / 20)
    assert decode["seconds"] == pytest.approx(0.020)
    assert (decode["steps"], decode["sync_gap_is_lower_bound"]) == (2, True)


def test_phases_are_told_apart_and_what_is_no_step_is_left_out() -> None:
    steps = records(
        (Phase.DECODE, 100, 110, 0),
        (Phase.MIXED, 118, 130, 0),
        (Phase.DECODE, 130, 140, Flag.RESTARTED),
        (Phase.DECODE, 150, 160, Flag.EMPTY),
    )
    steps = np.concatenate((steps, steps[:1]))
    steps[-1]["phase"] = 99
    found = figures_of(steps, {})
    assert found["mixed"]["sync_gap_ratio"] == pytest.approx((8 + 1) / 20)
    assert (found["decode"]["steps"], found.keys()) == (2, {"decode", "mixed"})


def test_kernel_windows_are_applied_as_they_are_live() -> None:
    steps = records((Phase.DECODE, 100, 110, 0), (Phase.DECODE, 110, 120, 0))
    decode = figures_of(steps, {"decode": WINDOW})["decode"]
    assert decode["sync_gap_ratio"] == pytest.approx(2 / 20 + 0.25)
    assert not decode["sync_gap_is_lower_bound"]
    assert figures_of(steps, {"prefill": WINDOW}) == figures_of(steps, {})


def test_without_steps_there_is_nothing() -> None:
    assert figures_of(records(), {}) == {}
    assert figures_of(records((Phase.DECODE, 1, 2, Flag.EMPTY)), {}) == {}
    assert meanwhile({}, {}) == {"ranks": [], "rough": False}
    assert meanwhile({}, {}, rough=True) == {"ranks": [], "rough": True}


@pytest.mark.parametrize(
    ("changes", "applied"),
    [
        ({}, True),
        ({"engine": 3}, True),
        ({"rank": 1}, False),  # of another process
        ({"age_seconds": 61.0}, False),
        ({"launch_gap_ratio": None}, False),  # an agent of another version wrote it
    ],
)
def test_windows_are_those_of_the_process_and_not_old(changes: dict[str, Any], applied: bool) -> None:
    seen = {**dataclasses.asdict(WINDOW), "of_a_later_version": 1}
    rank: dict[str, Any] = {"engine": 0, "rank": 0}
    for name, value in changes.items():
        (rank if name in rank else seen)[name] = value
    before = {"server": {"ranks": [{**rank, "kernels": {"decode": seen}}, {"rank": 7}]}}
    name = f"engine{rank['engine']}-rank0" if rank["engine"] else "rank0"
    found = meanwhile({name: records((Phase.DECODE, 100, 110, 0))}, before)
    ((only,),) = (found["ranks"],)
    assert only["name"] == name
    assert only["figures"]["decode"]["sync_gap_is_lower_bound"] is not applied


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder.open(tmp_path, "worker", {"role": "worker"})
    yield made
    made.close(remove=True)


def test_steps_that_ran_in_part_in_that_time_are_read_from_the_journal(
    recorder: Recorder, tmp_path: Path
) -> None:
    for number in range(1, 1001):
        begin = number * 10 * MS
        recorder.begin(int(Phase.DECODE), 1, begin)
        recorder.step(
            number, begin, int(Phase.DECODE), int(Clock.CUDA), 0, (begin, begin, begin, begin + 8 * MS),
            requests=1, prefill_requests=0, prompt_tokens=0, decode_tokens=1,
        )  # fmt: skip
    recorder.publish()
    journal = recorder.writer.path
    steps = journal_steps(journal, 4005 * MS, 8001 * MS)
    assert steps["step"].tolist() == list(range(400, 801))
    found = read_steps({"rank0": journal, "rank1": tmp_path / "gone"}, 4005 * MS, 8001 * MS)
    assert list(found) == ["rank0"]  # one that cannot be read costs its own figures only
    assert figures_of(found["rank0"], {})["decode"]["sync_gap_ratio"] == pytest.approx(0.2, abs=0.001)
    with pytest.raises((JournalError, OSError)):
        journal_steps(tmp_path / "gone", 0, 1)


def test_what_a_recording_added_to_steps_is_known_by_those_before_it(
    recorder: Recorder, tmp_path: Path
) -> None:
    end = 0
    for number in range(1, 1001):
        begin, end = end + 2 * MS, end + (10 if number <= 600 else 12) * MS
        recorder.begin(int(Phase.DECODE), 1, begin)
        recorder.step(
            number, begin, int(Phase.DECODE), int(Clock.CUDA), 0, (begin, begin, begin, end),
            requests=1, prefill_requests=0, prompt_tokens=0, decode_tokens=1,
        )  # fmt: skip
    recorder.publish()
    journals = {"rank0": recorder.writer.path, "rank1": tmp_path / "gone"}
    recorded = {
        "rank0": journal_steps(journals["rank0"], 6010 * MS, end),
        "rank1": records(),
        "rank2": records(),
    }
    for begin_ns in (None, 6001 * MS):
        earlier = steps_before(journals, recorded, begin_ns)
        assert list(earlier) == ["rank0"]
        assert earlier["rank0"]["step"].tolist() == list(range(201, 601))
        (first, *_) = meanwhile(recorded, {}, earlier)["ranks"]
        assert first["figures"]["decode"]["lengthened_ratio"] == pytest.approx(1 / 6)
    assert "lengthened_ratio" not in meanwhile(recorded, {})["ranks"][0]["figures"]["decode"]


def test_what_lies_beside_a_recording_is_used_if_it_is_sound(tmp_path: Path) -> None:
    np.save(tmp_path / "raw-rank0.npy", records((Phase.DECODE, 1, 9, 0)))
    np.save(tmp_path / "raw-rank1.npy", np.zeros(3))
    (tmp_path / "raw-rank2.npy").write_bytes(b"damaged")
    assert list(kept_steps(tmp_path, "raw-")) == ["rank0"]


def test_steps_that_were_recorded_in_part_are_left_out_as_the_capture_leaves_them_out() -> None:
    steps = records(
        (Phase.DECODE, 100, 160, 0),  # it was launched before the recording began, which held it up
        (Phase.DECODE, 170, 180, 0),
        (Phase.DECODE, 182, 190, 0),
        (Phase.DECODE, 195, 210, 0),
    )
    steps["time"] = steps["e0"]
    decode = figures_of(steps, {}, within=(110 * MS, 200 * MS))["decode"]
    # The time before the first whole one is known: the one before it is.
    assert (decode["steps"], decode["seconds"]) == (2, pytest.approx(0.030))
    assert decode["sync_gap_ratio"] == pytest.approx((10 + 2 + 2) / 30)
    assert figures_of(steps, {}, within=(300 * MS, 400 * MS)) == {}
    (rank,) = meanwhile({"rank0": steps}, {}, within={"rank0": (110 * MS, 200 * MS)})["ranks"]
    assert rank["figures"]["decode"] == decode


def test_bubbles_are_of_the_recorded_steps_own_time(tmp_path: Path) -> None:
    """Kernels ran for 4 ms a step in the windows; in the recording steps took twice as long."""
    writing = Recorder.open(tmp_path, "worker", {"role": "worker", "model": MODEL})
    said = {"bandwidth_bytes_per_second": 1e9, "flops_per_second": 1e12, "dtype": "bfloat16"}
    rank = {"engine": 0, "rank": 0, "peaks": {**said, "source": "nominal", "detail": "", "of_later": 1}}
    try:
        of = roofs({"rank0": writing.writer.path, "rank1": tmp_path / "gone"}, {"server": {"ranks": [rank]}})
        assert roofs({"rank0": writing.writer.path}, {"server": {"ranks": [{"rank": 0}]}}) == {}
        writing.update_facts(model={**MODEL, "unmodelled": ["experts"]})
        assert roofs({"rank0": writing.writer.path}, {"server": {"ranks": [rank]}}) == {}
    finally:
        writing.close(remove=True)
    steps = records((Phase.DECODE, 100, 108, 0), (Phase.DECODE, 108, 116, 0))
    steps["decode_tokens"] = steps["sampled"] = steps["requests"] = 1
    floor_ms = float(step_floors(steps, of["rank0"].model, of["rank0"].peaks)[0]) * 1e3
    assert 0 < floor_ms < 4
    windows = dataclasses.replace(
        WINDOW, busy_per_floor=4 / floor_ms, floor_step_seconds=floor_ms / 1e3, step_tokens=1.0
    )
    decode = figures_of(steps, {"decode": windows}, of["rank0"])["decode"]
    assert decode["sync_gap_ratio"] == pytest.approx((8 - 4) / 8)  # the wait before sampling is of it


def test_when_a_process_recorded_is_read_if_it_is_sound(tmp_path: Path) -> None:
    (tmp_path / "raw-rank0.json").write_text('{"begin_ns": 1, "end_ns": 2}')
    (tmp_path / "raw-rank1.json").write_text('{"begin_ns": 1}')
    (tmp_path / "raw-rank2.json").write_text("[")
    assert kept_bounds(tmp_path, "raw-") == {"rank0": (1, 2)}
