"""Benchmarks beside each other: what they get, and that nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "beside.py"


def run(tmp_path: Path, lines: str, *options: str) -> tuple[int, str]:
    path = tmp_path / "list"
    path.write_text(lines)
    command = [sys.executable, str(SCRIPT), str(path), "--results", str(tmp_path / "results"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_each_has_a_gpu_and_a_folder(tmp_path: Path) -> None:
    lines = '# said above\n\na 1 20 echo "$CUDA_VISIBLE_DEVICES $RESULTS"\nb 1 20 echo no >&2; exit 3\n'
    status, said = run(tmp_path, lines)
    assert status == 1
    folder = tmp_path / "results"
    assert (folder / "a" / "out.txt").read_text() == f"0 {folder / 'a'}\n"
    assert (folder / "b" / "err.txt").read_text() == "no\n"
    assert "b: exit status 3" in said
    assert run(tmp_path, lines, "--only", "a")[0] == 0


def test_nothing_that_took_too_long_stays(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "engine = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "engine = subprocess.Popen(engine, start_new_session=True)\n"
        f"open({str(pid)!r}, 'w').write(str(engine.pid))\n"
        "time.sleep(300)\n"
    )
    status, said = run(tmp_path, f"long 1 8 {sys.executable} {program}; true\n")
    assert status == 1
    assert "long: exit status 124" in said
    gone = psutil.Process(int(pid.read_text())) if psutil.pid_exists(int(pid.read_text())) else None
    until = time.monotonic() + 10
    while gone is not None and gone.is_running() and gone.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "what it started goes on"
        time.sleep(0.05)


@pytest.mark.parametrize("line", ["a 1 echo", "a x 20 echo hi", "a 0 20 echo hi", "a 1 soon echo hi"])
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    status, said = run(tmp_path, f"# first\n{line}\n")
    assert status == 1
    assert "list:2: a line is NAME GPUS SECONDS COMMAND" in said


def test_what_there_is_no_time_for_is_not_begun(tmp_path: Path) -> None:
    status, said = run(tmp_path, "a 1 30 echo hi\n", "--most-seconds", "10")
    assert status == 1
    assert "a: not begun" in said
    assert not (tmp_path / "results").exists()


def test_more_gpus_than_there_are(tmp_path: Path) -> None:
    status, said = run(tmp_path, f"a {os.cpu_count() or 1}00 5 echo hi\n")
    assert status == 2
    assert "and there are" in said


def test_the_list_of_the_docs_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import beside

    jobs = beside.read_jobs(SCRIPT.parent / "gpu_round.txt")
    assert len({job.name for job in jobs}) == len(jobs) > 5
