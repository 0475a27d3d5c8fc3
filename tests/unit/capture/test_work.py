"""The process that scrubs and analyses a capture, started as the agent starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from analysis.nsys_file import NsysFile  # tests/unit is on the path of the tests in its folders

from llmprobe.capture.nsys import RAW_SQLITE
from llmprobe.capture.store import REPORT_JSON, REPORT_TEXT, SCRUBBED


def test_a_report_does_not_depend_on_the_locale(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / RAW_SQLITE)
    for number in range(100):  # enough for a finding, which is shown with a bullet
        file.kernel("nvjet", number * 1_000_000, number * 1_000_000 + 990_000, launched=number * 1_000_000)
    file.close()
    reading, writing = os.pipe()  # it ends with its standard input
    done = subprocess.run(
        [sys.executable, "-m", "llmprobe.capture.work", str(tmp_path)],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        stdin=reading,
        capture_output=True,
        timeout=60,
        check=False,
    )
    os.close(reading)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "•" in (tmp_path / REPORT_TEXT).read_text(encoding="utf-8")
    assert {REPORT_JSON, REPORT_TEXT, SCRUBBED} == {path.name for path in tmp_path.iterdir()}
