"""One agent a directory, and a log that stays small."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from llmprobe.agent.daemon import cap_log, resident_bytes, take_lock
from llmprobe.record.agent_launch import agent_running

_HOLD = """
import sys; from pathlib import Path
from llmprobe.agent.daemon import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held" if lock else "refused", flush=True); sys.stdin.read()
"""


_DETACHES = """
import os, signal, sys
from pathlib import Path
from llmprobe.agent.daemon import detach
path = Path(sys.argv[1])
starter = os.getpid()
if detach(path):
    os.write(1, f"{starter} {os.getpid()} {os.getpgrp()} {os.getsid(0)}\\n".encode())
    os.killpg(os.getpgrp(), signal.SIGHUP)
    os.write(1, b"stays\\n")
"""


def holder(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_lock_has_one_holder_and_dies_with_it(tmp_path: Path) -> None:
    assert not agent_running(tmp_path)
    with holder(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert agent_running(tmp_path)
        assert take_lock(tmp_path) is None
        assert agent_running(tmp_path), "looking must not take it away"
        first.kill()
    assert not agent_running(tmp_path)
    lock = take_lock(tmp_path)
    assert lock is not None
    lock.release()


def test_a_removed_directory_is_noticed(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    assert lock is not None
    assert lock.in_place()
    (tmp_path / "agent.lock").unlink()
    assert not lock.in_place()
    (tmp_path / "agent.lock").touch()
    assert not lock.in_place()
    lock.release()


def test_a_long_log_keeps_its_last_lines_and_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(1000):
        os.write(writer, f"line {number}\n".encode())
    cap_log(path, limit=5000, kept=100)
    os.write(writer, b"after\n")
    os.close(writer)
    lines = path.read_text().splitlines()
    assert lines[-2:] == ["line 999", "after"]
    assert lines[0].startswith("line ")
    assert path.stat().st_size < 200


def test_a_short_or_missing_log_is_left_alone(tmp_path: Path) -> None:
    cap_log(tmp_path / "none")
    (tmp_path / "log").write_text("x")
    cap_log(tmp_path / "log")
    assert (tmp_path / "log").read_text() == "x"


def test_resident_memory_is_in_bytes() -> None:
    assert 5 << 20 < resident_bytes() < 10 << 30


def test_a_daemon_leaves_the_process_group_but_shares_processors_with_those_who_started_it(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", _DETACHES, str(log)], timeout=60, check=True)
    deadline = time.monotonic() + 60
    while "stays" not in (said := log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    starter, pid, group, session = map(int, said.split()[:4])
    assert group not in (starter, os.getpgrp())
    assert pid not in (starter, os.getpid())
    assert session == os.getsid(0), "in a session of its own it would take a core of its own (autogroup)"
