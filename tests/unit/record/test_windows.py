"""Window files, and the latch that remembers a death in a window."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.latch import Latch, died_in_a_window
from llmprobe.record.window_file import Seen, WindowFileError, read_window, window_path, write_window


def seen(count: int = 3) -> Seen:
    rows = np.zeros(count, ACTIVITY)
    rows["begin"] = np.arange(count) * 10
    rows["end"] = rows["begin"] + 5
    rows["name"] = np.arange(count) % 2
    return Seen(4, Window(100, 900, rows, ["one", 'two "quoted"\n'], 0))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = window_path(tmp_path / "journals" / "worker-1-ab.journal")
    assert path == tmp_path / "windows" / "worker-1-ab.window"
    write_window(path, seen())
    found = read_window(path)
    assert (found.number, found.window.begin_ns, found.window.end_ns) == (4, 100, 900)
    assert found.window.names == seen().window.names
    assert (found.window.activities == seen().window.activities).all()
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("cut", [0, 1, 40, 200, -1])
def test_a_file_that_is_cut_or_foreign_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "windows" / "a.window"
    write_window(path, seen())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WindowFileError):
        read_window(path)


def test_a_name_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "windows" / "a.window"
    broken = seen()
    broken.window.activities["name"] = 2
    write_window(path, broken)
    with pytest.raises(WindowFileError, match="name"):
        read_window(path)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "windows" / "a.window"
    write_window(path, seen())
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError):
        write_window(path, seen(5))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_open_window_of_a_living_process_is_no_death(tmp_path: Path) -> None:
    latch = Latch(tmp_path / "windows", "worker-1")
    assert died_in_a_window(tmp_path / "windows") is None
    latch.open_window()
    assert died_in_a_window(tmp_path / "windows") is None
    latch.close_window()
    latch.close_window()
    assert list((tmp_path / "windows").iterdir()) == []


def test_a_process_killed_in_a_window_is_remembered(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from llmprobe.record.latch import Latch\n"
        "latch = Latch(Path(sys.argv[1]), 'worker-1')\n"
        "latch.open_window(); latch.close_window(); latch.open_window()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -9
    left = died_in_a_window(tmp_path)
    assert left == tmp_path / "worker-1.open"
    assert died_in_a_window(tmp_path) == left  # looking does not forget
    left.unlink()
    assert died_in_a_window(tmp_path) is None
