"""Benchmarks beside each other: what they get, and that nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "beside.py"


def run(tmp_path: Path, lines: str, *options: str, gpus: str = "7") -> tuple[int, str]:
    path = tmp_path / "list"
    path.write_text(lines)
    command = [sys.executable, str(SCRIPT), str(path), "--results", str(tmp_path / "results"), *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environment)
    return done.returncode, done.stderr


def test_each_has_a_gpu_and_a_folder(tmp_path: Path) -> None:
    lines = '# said above\n\na 1 20 echo "$CUDA_VISIBLE_DEVICES $RESULTS"\nb 1 20 echo no >&2; exit 3\n'
    status, said = run(tmp_path, lines)
    assert status == 1
    folder = tmp_path / "results"
    assert (folder / "a" / "out.txt").read_text() == f"7 {folder / 'a'}\n"
    assert (folder / "b" / "err.txt").read_text() == "no\n"
    assert "b: exit status 3" in said
    assert run(tmp_path, lines, "--only", "a")[0] == 0


_ENGINE = """
import subprocess, sys, time
engine = [sys.executable, "-c", "import time; time.sleep(300)"]
engine = subprocess.Popen(engine, start_new_session=True, env={{}})
open({pid!r}, "w").write(str(engine.pid))
{then}
"""


@pytest.mark.parametrize(("then", "status"), [("time.sleep(300)", 124), ("sys.exit(3)", 3)])
def test_nothing_of_it_stays(tmp_path: Path, then: str, status: int) -> None:
    """Not what a session of its own hides, whether it takes too long or fails."""
    pid, program = tmp_path / "pid", tmp_path / "program.py"
    program.write_text(_ENGINE.format(pid=str(pid), then=then))
    _, said = run(tmp_path, f"long 1 8 {sys.executable} {program}; exit $?\n")
    assert f"long: exit status {status}" in said
    assert not psutil.pid_exists(int(pid.read_text()))


def test_one_that_is_told_to_end_can_clean_up(tmp_path: Path) -> None:
    program, told = tmp_path / "program.py", tmp_path / "told"
    program.write_text(
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), open({str(told)!r}, 'w'), sys.exit(0)))\n"
        "time.sleep(300)\n"
    )
    run(tmp_path, f"long 1 3 {sys.executable} {program}; true\n")
    assert told.exists()


def test_gpus_are_those_that_may_be_used(tmp_path: Path) -> None:
    status, _ = run(tmp_path, "a 2 20 echo $CUDA_VISIBLE_DEVICES\n", gpus="3, GPU-1f")
    assert status == 0
    assert (tmp_path / "results" / "a" / "out.txt").read_text() == "3,GPU-1f\n"


def test_names_are_those_of_the_list_and_each_is_one(tmp_path: Path) -> None:
    status, said = run(tmp_path, "a 1 20 true\n", "--only", "b")
    assert (status, "no line named b" in said) == (1, True)
    status, said = run(tmp_path, "a 1 20 true\na 1 20 true\n")
    assert (status, "list:2: 'a' is the name of a line before" in said) == (1, True)


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
    status, said = run(tmp_path, "a 2 5 echo hi\n")
    assert status == 2
    assert "and there are" in said


def test_the_list_of_the_docs_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import beside

    jobs = beside.read_jobs(SCRIPT.parent / "gpu_round.txt")
    assert len({job.name for job in jobs}) == len(jobs) > 5
