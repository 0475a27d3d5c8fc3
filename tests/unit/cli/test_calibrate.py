"""Measuring this very machine; what is kept and what the table says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

from llmprobe.cli.output import scaled


def test_measures_keeps_and_prints(tmp_path):
    code = "import sys; sys.argv[0] = 'llmprobe'; from llmprobe.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "calibrate", "--seconds", "0.1", "--threads", "1", "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    kept = json.loads((tmp_path / "llmprobe" / "peaks.json").read_text())
    assert printed["path"] == str(tmp_path / "llmprobe" / "peaks.json")
    assert kept["devices"] == printed["devices"]
    cpu = printed["devices"][0]
    if importlib.util.find_spec("torch"):  # numpy's threads cannot be chosen from here, only counted
        assert cpu["threads"] == 1
    # No processor that runs Python 3.10 is slower or faster than these.
    assert 1e8 < cpu["bandwidth_bytes_per_second"] < 1e13
    assert 1e8 < cpu["flops_per_second"]["float32"] < 1e14
    assert cpu["versions"]


def test_a_cache_that_cannot_be_written_is_an_error_with_the_way_out(tmp_path):
    (tmp_path / "llmprobe").touch()  # a file where the directory should be
    code = "import sys; sys.argv[0] = 'llmprobe'; from llmprobe.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "calibrate", "--seconds", "0.1"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "XDG_CACHE_HOME" in done.stderr


def test_three_digits_and_a_prefix():
    assert scaled(16_785_414_625.0, "B/s") == "16.8 GB/s"
    assert scaled(168_181_682_314_198.0, "FLOP/s") == "168 TFLOP/s"
    assert scaled(12.0, "B") == "12 B"
