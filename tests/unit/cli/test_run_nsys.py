"""What `llmprobe run --nsys` takes; what it does with it is tested with the real nsys."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmprobe.cli import nsys_target
from llmprobe.cli.app import app
from llmprobe.cli.run_nsys import NsysUsageError, find_nsys, parse_graphs, parse_trace


def program(folder: Path, name: str = "nsys") -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o700)
    return path


def test_nsys_is_found_by_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nsys("") == find_nsys(str(path)) == find_nsys("nsys") == str(path)
    monkeypatch.chdir(tmp_path)
    assert find_nsys("./nsys") == str(path)


def test_nsys_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NsysUsageError, match=r"no/nsys: no such program"):
        find_nsys(str(tmp_path / "no" / "nsys"))


def test_traces_are_checked(tmp_path: Path) -> None:
    assert parse_trace(None) == ("cuda", "nvtx")
    assert parse_trace("nvtx, osrt") == ("nvtx", "osrt")
    for wrong in ("", "nvtx,", "nvtx;id", "--help", "mpi"):
        with pytest.raises(NsysUsageError, match="is none of"):
            parse_trace(wrong)


def test_graphs_are_whole_unless_asked_for_by_node() -> None:
    assert parse_graphs(None, ("cuda", "nvtx")) == "graph"
    assert parse_graphs("node", ("nvtx", "cuda")) == "node"
    assert parse_graphs(None, ("nvtx",)) is None
    with pytest.raises(NsysUsageError, match=r"cuda-graph-trace whole: it takes graph or node"):
        parse_graphs("whole", ("cuda",))
    with pytest.raises(NsysUsageError, match=r"cuda-graph-trace graph: cuda is not traced"):
        parse_graphs("graph", ("nvtx",))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["run", "--nsys=/no/nsys", "--", "true"], 2, "--nsys=/no/nsys: no such program"),
        (["run", "--nsys", "--trace", "x", "--", "true"], 2, "'x' is none of"),
        (["run", "--trace", "nvtx", "--", "true"], 2, "--trace is for --nsys"),
        (["run", "--cuda-graph-trace", "node", "--", "true"], 2, "--cuda-graph-trace is for --nsys"),
        (["run", "--nsys", "--cuda-graph-trace", "all", "--", "true"], 2, "it takes graph or node"),
        (
            ["run", "--nsys", "--trace", "nvtx", "--cuda-graph-trace", "node", "--", "true"],
            2,
            "cuda is not traced",
        ),
        (["run", "--nsys", "--", "/no/such/command"], 127, "cannot run '/no/such/command'"),
    ],
)
def test_wrong_usage_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, said: str
) -> None:
    program(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LLMPROBE_DIR", str(tmp_path / "shared"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status
    assert said in result.output


@pytest.mark.parametrize("broken", ["shared", "temporary"])
def test_a_folder_that_cannot_be_made_is_one_line_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    program(tmp_path)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "nsys").write_text("not a folder")
    temporary = tmp_path / "temporary"
    if broken == "shared":
        temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LLMPROBE_DIR", str(tmp_path / "shared"))
    result = CliRunner().invoke(app, ["run", "--nsys", "--", "true"])
    assert result.exit_code == 2
    assert ("LLMPROBE_DIR" if broken == "shared" else "TMPDIR") in result.output
    assert not list(temporary.glob("*"))


def test_nsys_behind_the_dashes_is_the_commands_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("llmprobe")), "run", "--no-summary", "--", "echo", "--nsys"],
        capture_output=True,
        text=True,
        env={**os.environ, "LLMPROBE_DIR": str(tmp_path / "shared")},
    )
    assert (done.returncode, done.stdout) == (0, "--nsys\n")


def become(tmp_path: Path, temporary: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run `nsys_target` behind pipes, as nsys does, with the true output elsewhere."""
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        numbers = [str(out.fileno()), str(err.fileno())]
        pid_file = str(tmp_path / "pid")
        return subprocess.run(
            [sys.executable, "-I", "-S", nsys_target.__file__, pid_file, *numbers, "63", temporary, *command],
            pass_fds=(out.fileno(), err.fileno()),
            env={**os.environ, "TMPDIR": "/of/nsys"},
            umask=0o077,
            capture_output=True,
            text=True,
        )


def test_the_command_gets_its_own_output_umask_and_temporary_folder(tmp_path: Path) -> None:
    script = 'echo "$$ $(umask) ${TMPDIR-unset}"; echo bad >&2; exit 7'
    done = become(tmp_path, "-", "/bin/sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    pid = (tmp_path / "pid").read_text()
    assert (tmp_path / "out").read_text() == f"{pid} 0077 unset\n"
    assert (tmp_path / "err").read_text() == "bad\n"
    become(tmp_path, "/mine", "/bin/sh", "-c", script)
    assert (tmp_path / "out").read_text().endswith(" 0077 /mine\n")


def test_a_command_that_cannot_be_run_is_said_where_its_errors_go(tmp_path: Path) -> None:
    assert become(tmp_path, "-", "/no/such/command").returncode == 127
    assert "cannot run '/no/such/command': No such file" in (tmp_path / "err").read_text()
