"""``llmprobe run``: where its report goes, and what becomes of the command's exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("llmprobe")), "run", *arguments],
        env={**os.environ, "LLMPROBE_DIR": str(tmp_path / "shared"), "LLMPROBE_AGENT": "off", **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("none/x.json", "there is no directory none"),
        (".", "it is a directory"),
        ("file/x.json", "no directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_report_that_cannot_be_saved_is_said_before_the_command_starts(
    tmp_path: Path, output: str, said: str
) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path, "--output", output, "--", "touch", "started")
    assert done.returncode == 2
    assert f"cannot save {output}" in done.stderr
    assert said in done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("json_too", [False, True])
def test_what_cannot_be_saved_in_the_end_is_printed_and_the_status_is_the_commands(
    tmp_path: Path, json_too: bool
) -> None:
    (tmp_path / "out").mkdir()
    command = ("--output", "out/x.json", *(["--json"] if json_too else []))
    done = run(tmp_path, *command, "--", "sh", "-c", "rm -r out; exit 7")
    assert done.returncode == 7
    assert "cannot save out/x.json: No such file or directory" in done.stderr
    if json_too:
        assert json.loads(done.stdout)["exit_code"] == 7
    else:
        assert "nothing was measured" in done.stderr


#: A program with one step, recorded as the hooks record it.
PROGRAM = """
import os, time
from pathlib import Path
from llmprobe.record.layout import Phase
from llmprobe.record.recorder import Recorder

said = {"role": "program", "group": os.environ["LLMPROBE_GROUP"], "server": "s", "framework": "transformers"}
recorder = Recorder.open(Path(os.environ["LLMPROBE_DIR"]), "program", said)
now = time.monotonic_ns()
recorder.pending(now, 1)
number = recorder.begin(Phase.DECODE, 1, now)
times = (now, now + 10, now + 10, now + 1000)
recorder.step(
    number, now, Phase.DECODE, 0, 0, times, requests=1, prefill_requests=0, prompt_tokens=0, decode_tokens=1,
    sampled=1, context_decode=(1, 0, 0, 0), pairs_decode=(1, 0, 0, 0),
)
recorder.pending(now + 1000, 0)
recorder.close()
"""


def test_thresholds_that_did_not_count_are_told_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("no_such_threshold = 1\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run(
        tmp_path, "--", sys.executable, "program.py", LLMPROBE_THRESHOLDS=str(tmp_path / "limits.toml")
    )
    assert done.returncode == 0
    (server,) = json.loads((tmp_path / "run.json").read_text())["servers"]
    (note,) = server["notes"]
    assert "no_such_threshold" in note
    assert done.stderr.count("no_such_threshold") == 2  # before the command, and in the summary


def program(tmp_path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """``program.py`` by itself, not under `llmprobe run`."""
    place = {"LLMPROBE_DIR": str(tmp_path / "shared"), "LLMPROBE_AGENT": "off", "LLMPROBE_GROUP": "g"}
    return subprocess.run(
        [sys.executable, "program.py"],
        env={**os.environ, **place, **more},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_measured_block_tells_them_too(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("no_such_threshold = 1\n")
    (tmp_path / "program.py").write_text(
        "import llmprobe\nwith llmprobe.measure() as m:\n"
        + "".join(f"    {line}\n" for line in PROGRAM.splitlines())
        + "print(m.report['servers'][0]['notes'])\n"
    )
    done = program(tmp_path, LLMPROBE_THRESHOLDS=str(tmp_path / "limits.toml"))
    assert "no_such_threshold" in done.stdout, done.stderr


def test_a_probe_that_is_switched_off_in_a_measured_block_says_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import time, llmprobe\nfrom llmprobe.hooks import session\n"
        "with llmprobe.measure() as m:\n"
        "    said = {'role': 'program', 'group': 'g', 'server': 'mine', 'model_name': 'm', 'rank': 0}\n"
        "    assert session.current().arm('program', lambda: said) is not None\n"
        "    time.sleep(1.5)\n"
        "    llmprobe.disable()\n"
        "    time.sleep(2.5)\n"
        "print([server['server'] for server in m.report['servers']])\n"
    )
    done = program(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['mine']\n", "")
