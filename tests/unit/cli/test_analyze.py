"""``llmprobe analyze`` and ``llmprobe scrub`` as a shell sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmprobe.cli.app import app

DATA = Path(__file__).parents[2] / "data"
NSYS, TRACE = DATA / "nsys" / "transformers_cpu.sqlite", DATA / "kineto" / "transformers_cpu.json.gz"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_report_is_printed_for_each_file() -> None:
    done = run("analyze", NSYS, TRACE)
    assert done.exit_code == 0
    assert done.stdout.count("Nothing about a GPU can be told") == 2
    assert "decode" in done.stdout
    assert "aten::mm" in done.stdout
    assert done.stderr == ""


def test_json_is_an_object_for_a_file_and_a_list_for_several() -> None:
    one = json.loads(run("analyze", NSYS, "--json").stdout)
    assert one["source"]["path"] == str(NSYS)
    assert json.loads(run("analyze", NSYS, NSYS, "--json").stdout) == [one, one]


def test_a_bad_file_is_one_line_and_the_others_are_still_shown(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    done = run("analyze", bad, NSYS, tmp_path / "absent")
    assert done.exit_code == 1
    assert "decode" in done.stdout
    first, second = done.stderr.splitlines()
    assert first.startswith(f"llmprobe: {bad}: ")
    assert second == f"llmprobe: {tmp_path / 'absent'}: no such file"


def test_of_a_folder_it_is_said_which_file_may_be_meant(tmp_path: Path) -> None:
    assert run("analyze", tmp_path).stderr == f"llmprobe: {tmp_path}: is a folder\n"
    (tmp_path / "report.json").touch()
    (tmp_path / "torch-rank0.json.gz").touch()
    said = run("analyze", tmp_path).stderr
    assert said.endswith(f"name a file in it, such as {tmp_path / 'torch-rank0.json.gz'}\n")


@pytest.mark.parametrize("verb", ["analyze", "scrub"])
def test_no_file_is_wrong_usage(verb: str) -> None:
    assert run(verb).exit_code == 2


def test_a_scrubbed_copy_lies_beside_its_source(tmp_path: Path) -> None:
    source = tmp_path / "a.json.gz"
    source.write_bytes(TRACE.read_bytes())
    done = run("scrub", source)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'a.scrubbed.json.gz'}\n"
    again = run("scrub", source)
    assert again.exit_code == 1
    assert "is there already" in again.stderr
    assert len(again.stderr.splitlines()) == 1


def test_scrub_says_in_json_what_it_wrote(tmp_path: Path) -> None:
    target = tmp_path / "out.sqlite"
    said = json.loads(run("scrub", NSYS, "-o", target, "--json").stdout)
    assert said == {
        "source": str(NSYS),
        "target": str(target),
        "source_bytes": NSYS.stat().st_size,
        "target_bytes": target.stat().st_size,
    }


def shell(
    *arguments: object, output: int = subprocess.PIPE, **changes: str
) -> subprocess.CompletedProcess[bytes]:
    """The command with an environment and an output that a test of Click has not."""
    code = "import sys; from llmprobe.cli.app import main; sys.argv[0] = 'llmprobe'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **changes},
        stdout=output,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )


def test_an_output_that_lacks_characters_gets_the_report_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "\N{SNOWMAN}.sqlite"
    path.write_bytes(NSYS.read_bytes())
    done = shell("analyze", path, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"decode" in done.stdout
    done = shell("scrub", path, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, b"")


def test_so_does_any_other_result() -> None:
    done = shell("doctor", PYTHONIOENCODING="ascii")
    assert b"found; why it matters" in done.stdout
    assert b"?" in done.stdout  # arrows and dashes
    assert done.stderr == b"" or done.stderr.count(b"\n") == 1  # what is broken


@pytest.mark.parametrize(
    "arguments",
    [["analyze", NSYS], ["analyze", NSYS, "--json"], ["scrub"], ["doctor"], ["doctor", "--json"]],
)
def test_a_full_disk_is_one_line(tmp_path: Path, arguments: list[object]) -> None:
    if arguments == ["scrub"]:
        arguments = ["scrub", NSYS, "-o", tmp_path / "copy.sqlite"]
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = shell(*arguments, output=full)
    finally:
        os.close(full)
    assert done.returncode == 1
    assert done.stderr == b"llmprobe: standard output: cannot be written: No space left on device\n"
