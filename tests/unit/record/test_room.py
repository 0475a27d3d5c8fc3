"""What is left for the agent never takes the room that the engine's own shared memory may want."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmprobe.record import torch_trace
from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.room import RESERVE_BYTES, NoRoom, Room
from llmprobe.record.window_file import Seen, read_window, write_window

MIB = 1 << 20


def disk(total: int, free: int) -> Callable[[Path], Any]:
    return lambda folder: SimpleNamespace(f_blocks=total, f_bavail=free, f_frsize=1)


@pytest.mark.parametrize(
    ("total", "free", "reserve"),
    [
        (64 * MIB, 64 * MIB, 32 * MIB),
        (64 * MIB, 40 * MIB, 32 * MIB),
        (1024 * MIB, 600 * MIB, 300 * MIB),
        (1024 * MIB, 300 * MIB, RESERVE_BYTES),
        (24 << 30, 20 << 30, 10 << 30),
    ],
)
def test_half_of_what_is_free_stays_and_a_floor(total: int, free: int, reserve: int) -> None:
    room = Room(Path("/"), disk(total, free))
    assert room.reserve_bytes == reserve
    fits = max(0, free - reserve)
    assert room.holds(fits)
    room.check(fits)
    assert not room.holds(fits + 1)
    with pytest.raises(NoRoom, match="stay free for the engine"):
        room.check(fits + 1)


def test_what_others_take_meanwhile_counts() -> None:
    free = [60 * MIB]
    room = Room(Path("/"), lambda folder: disk(64 * MIB, free[0])(folder))
    assert room.holds(20 * MIB)
    free[0] = 40 * MIB
    assert not room.holds(20 * MIB)
    free[0] = 10 * MIB
    assert not room.holds(0)


def test_a_file_system_without_a_limit_has_room() -> None:
    assert Room(Path("/"), disk(0, 0)).holds(1 << 50)


def window(count: int) -> Window:
    return Window(0, 9, np.zeros(count, ACTIVITY), ["gemm"], 0)


def test_a_window_file_is_as_long_as_what_is_in_it(tmp_path: Path) -> None:
    write_window(tmp_path / "a.window", Seen(1, window(1000)))
    assert len(read_window(tmp_path / "a.window").window.activities) == 1000
    assert (tmp_path / "a.window").read_bytes().endswith(bytes(26))
    assert (tmp_path / "a.window").stat().st_size < 26 * 1000 + 400


@pytest.fixture
def nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder is in a file system of 64 MiB that has 34 left."""

    class Nearly(Room):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder, disk(64 * MIB, 34 * MIB))

    for module in (torch_trace, sys.modules["llmprobe.record.window_file"]):
        monkeypatch.setattr(module, "Room", Nearly)


def test_a_window_that_does_not_fit_is_not_begun(tmp_path: Path, nearly_full: None) -> None:
    write_window(tmp_path / "a.window", Seen(1, window(70_000)))
    with pytest.raises(NoRoom, match="34 MiB free, and 32 MiB"):
        write_window(tmp_path / "a.window", Seen(2, window(90_000)))
    assert read_window(tmp_path / "a.window").number == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.window"]


def test_a_trace_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "captures" / "a.result"

    class Filling(Room):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder, lambda folder: disk(64 * MIB, 40 * MIB - taken(folder))(folder))

    def taken(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.iterdir())

    monkeypatch.setattr(torch_trace, "Room", Filling)
    (tmp_path / "small").write_bytes(os.urandom(5 * MIB))
    (tmp_path / "large").write_bytes(os.urandom(12 * MIB))
    with pytest.raises(NoRoom):
        torch_trace._zip(tmp_path / "large", target)
    assert list(target.parent.iterdir()) == []
    torch_trace._zip(tmp_path / "small", target)
    assert target.stat().st_size > 5 * MIB


_ENGINE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 32 << 20)  # sparse, as multiprocessing.shared_memory makes it
ring = mmap.mmap(fd, 32 << 20)
print("mapped", flush=True)
for line in sys.stdin:
    for page in range(0, int(line), 4096):
        ring[page] = 1
    print("touched", flush=True)
"""
_WRITER = """
import os, subprocess, sys
from pathlib import Path
import numpy as np
from llmprobe.record import torch_trace
from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.window_file import Seen, write_window

shared, disk, engine = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", shared], check=True)
child = subprocess.Popen(
    [sys.executable, "-c", engine, str(shared / "psm_ring")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
child.stdout.readline()

def touch(upto):
    child.stdin.write(b"%d\\n" % upto)
    child.stdin.flush()
    child.stdout.readline()

lowest = []
raw = disk / "trace.json"
with raw.open("wb") as file:
    for _ in range(80):
        file.write(os.urandom(1 << 20))
real = os.statvfs

def watching(folder):
    found = real(folder)
    lowest.append(found.f_bavail * found.f_frsize)
    return found

from llmprobe.record import room
room.Room.__init__.__defaults__ = (watching,)
for write in (
    lambda: torch_trace._zip(raw, shared / "captures" / "x.result"),
    lambda: write_window(shared / "x.window", Seen(1, Window(0, 9, np.zeros(2_000_000, ACTIVITY), ["a"], 0))),
):
    try:
        write()
    except OSError as error:
        print(type(error).__name__)
    else:
        print("written")
    print(*sorted(path.name for path in shared.rglob("*") if path.is_file()))
touch(32 << 20)
child.stdin.close()
print(child.wait(), min(lowest) >> 20)
"""


def test_a_small_shared_memory_keeps_room_for_the_engines_own(tmp_path: Path) -> None:
    """In a file system as a container's /dev/shm: an engine that touches its pages late lives."""
    (tmp_path / "shared").mkdir()
    inside = ["unshare", "--map-root-user", "--mount"]
    probe = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "shared")]
    try:
        subprocess.run([*inside, *probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    program = [sys.executable, "-c", _WRITER, str(tmp_path / "shared"), str(tmp_path), _ENGINE]
    said = subprocess.run([*inside, *program], check=True, capture_output=True, text=True).stdout.splitlines()
    assert said[:4] == ["NoRoom", "psm_ring", "NoRoom", "psm_ring"]
    ended, lowest = said[4].split()
    assert ended == "0", "the engine was killed (SIGBUS is -7)"
    assert int(lowest) >= 32
