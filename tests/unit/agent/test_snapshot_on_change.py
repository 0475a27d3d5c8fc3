from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.agent import snapshot
from llmprobe.agent.snapshot_on_change import SnapshotOnChange
from llmprobe.record.recorder import Recorder

DECODE = ("vllm-8000", "decode")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    recorder = Recorder.open(tmp_path / "shared", "worker", {"role": "worker"})
    yield tmp_path / "shared"
    recorder.close(remove=True)


def saved(folder: Path) -> list[dict[str, Any]]:
    return [snapshot.load(path) for path in sorted(folder.glob("*.json.gz"))]


def status() -> dict[str, Any]:
    return {"servers": [], "time": 1.0}


def looked(watch: SnapshotOnChange, *classes: str) -> list[bool]:
    """Look at one class after the other; whether each began a snapshot."""
    begun = []
    for found in classes:
        begun.append(watch.look({DECODE: found}, status))
        watch.close()
    return begun


def test_a_change_of_class_is_saved_with_its_reason(directory: Path, tmp_path: Path) -> None:
    watch = SnapshotOnChange(directory, tmp_path / "out")
    assert looked(watch, "memory_bound", "memory_bound", "sync_bound") == [False, False, True]
    (document,) = saved(tmp_path / "out")
    assert document["provenance"]["reason"] == "vllm-8000 decode: memory_bound to sync_bound"
    assert document["status"] == status()
    assert len(document["processes"]) == 1


def test_idle_and_unknown_between_two_classes_do_not_count(directory: Path, tmp_path: Path) -> None:
    watch = SnapshotOnChange(directory, tmp_path / "out")
    assert not any(looked(watch, "unknown", "memory_bound", "idle", "unknown", "memory_bound"))
    assert looked(watch, "idle", "compute_bound") == [False, True]


def test_a_server_that_left_is_forgotten(directory: Path, tmp_path: Path) -> None:
    watch = SnapshotOnChange(directory, tmp_path / "out")
    looked(watch, "memory_bound")
    assert not watch.look({}, status)
    assert looked(watch, "sync_bound") == [False]


def test_there_is_one_in_ten_minutes_at_most_and_the_newest_stay(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, number = Clock(), iter(range(100))
    monkeypatch.setattr(snapshot, "default_name", lambda made: f"llmprobe-{next(number):03}.json.gz")
    watch = SnapshotOnChange(directory, tmp_path / "out", clock=clock, keep=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.json.gz").write_text("not its own")
    classes = ("memory_bound", "sync_bound")
    looked(watch, classes[0])
    begun = []
    for turn in range(1, 9):
        clock.now += 300.0
        begun += looked(watch, classes[turn % 2])
    assert begun == [True, False] * 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mine.json.gz",
        "verdict-llmprobe-002.json.gz",
        "verdict-llmprobe-003.json.gz",
    ]


def test_a_folder_that_cannot_be_made_is_said_once_and_hurts_nobody(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    watch = SnapshotOnChange(directory, tmp_path / "file" / "out")
    assert looked(watch, "memory_bound", "sync_bound") == [False, True]
    assert "no snapshot of a changed verdict" in caplog.text
