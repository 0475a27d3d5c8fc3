"""The encoder of a multimodal model on a GPU: events of its own say what it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.layout import Clock

from .limits import limited

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PROGRAM = Path(__file__).parent.parent / "integration" / "encoding_program.py"
MOST_SECONDS = 180.0


@limited(200)
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_what_an_encoder_takes_is_its_own_and_no_gap(tmp_path: Path, runner: str) -> None:
    environment = {
        **os.environ,
        "LLMPROBE": "1",
        "LLMPROBE_AGENT": "off",
        "LLMPROBE_DIR": str(tmp_path / "probe"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
    }
    program = [sys.executable, str(PROGRAM), str(tmp_path / "model"), "bfloat16"]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (path,) = (tmp_path / "probe" / "journals").glob("worker-*.journal")
    steps = JournalReader(path).read().steps
    print(steps[["phase", "time", "e0", "e3", "encode_ns"]])
    assert set(steps["clock"].tolist()) == {int(Clock.CUDA)}
    took = steps["encode_ns"].tolist()
    assert 10_000 < took[0] < steps["e0"][0] - steps["time"][0], "two layers over 1500 positions, in the step"
    assert took[1:] == [0] * 9, "vLLM comes by its encoder at every step, with nothing to encode"
