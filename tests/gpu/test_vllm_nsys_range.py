"""A phase as nsys's own capture range, round a real ``vllm.LLM`` on a GPU: as docs/captures.md has it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from llmprobe.demo.model import make_model
from nsys_ranges import exported, ranges

from .limits import limited

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(shutil.which("nsys") is None, reason="needs nsys"),
]
PROGRAM = Path(__file__).parents[1] / "integration" / "offline.py"
TIMES, REQUESTS = 3, 3  # the program has so many requests, which decode together


@limited(280)
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_decode_steps_are_recorded_whole_with_their_kernels_and_the_program_runs_on(
    runner: str, tmp_path: Path
) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
    environment = {
        **kept,
        "LLMPROBE": "1",
        "LLMPROBE_DIR": str(tmp_path / "probe"),
        "LLMPROBE_AGENT": "off",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
    }
    model = make_model(tmp_path / "model")
    command = [
        "nsys", "profile", "--trace", "cuda,nvtx", "--sample", "none", "--cpuctxsw", "none",
        "-c", "nvtx", "-p", "decode@llmprobe", f"--capture-range-end=repeat:{TIMES}",
        "--output", str(tmp_path / "range"), sys.executable, str(PROGRAM), str(model), "bfloat16",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert "tokens [12, 12, 12]" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    recordings = sorted(tmp_path.glob("range*.nsys-rep"))
    assert len(recordings) == TIMES
    for recording in recordings:
        database = exported("nsys", recording)
        found = ranges(database)
        print(recording.name, found, kernels(database))
        assert [name for name, _ in found] == ["decode", "forward", "sample"]
        assert found[0][1] == REQUESTS
        assert kernels(database) > 0


def kernels(database: Path) -> int:
    """How many of them a recording holds."""
    with closing(sqlite3.connect(database)) as data:
        (found,) = data.execute("select count(*) from CUPTI_ACTIVITY_KIND_KERNEL").fetchone()
    return int(found)
