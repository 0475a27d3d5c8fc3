"""The encoder of a multimodal model is timed apart from the steps before which it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from engine import offline_environment, phases, readers
from waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.integration


def test_what_an_encoder_takes_is_its_own_and_no_gap(tmp_path: Path) -> None:
    environment = offline_environment(tmp_path / "probe")
    program = [sys.executable, str(Path(__file__).with_name("encoding_program.py")), str(tmp_path / "model")]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (worker,) = readers(tmp_path / "probe", "worker")
    steps = worker.read().steps
    assert phases(steps) == ["prefill", *["decode"] * 4] * 2
    took = steps["encode_ns"].tolist()
    assert took[0] > 100_000, "two layers over 1500 positions"
    assert took[1:] == [0] * 9, "vLLM comes by its encoder at every step, with nothing to encode"
    # It ran in the step, before the forward.
    first = steps[0]
    assert first["time"] < first["e0"] - first["encode_ns"]
