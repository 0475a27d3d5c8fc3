"""``llmprobe analyze`` and ``llmprobe scrub`` as a shell sees them."""

from __future__ import annotations

import json
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
    assert "DO NOT TRUST" in done.stdout  # neither holds a GPU
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
