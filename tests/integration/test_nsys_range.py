"""A phase as nsys's own capture range: the real nsys round a program, as docs/captures.md has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from llmprobe.cli.checks import packages
from nsys_ranges import exported, ranges

pytest.importorskip("transformers")
pytestmark = pytest.mark.integration

TIMES, TOKENS = 3, 6
PROGRAM = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
))
for _ in range(2):
    model.generate(
        torch.ones(1, 4, dtype=torch.long), max_new_tokens={TOKENS}, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )
print("ended in order", flush=True)
"""
Record = Callable[[Path | None], list[Path]]


@pytest.fixture
def record(nsys: str, tmp_path: Path) -> Record:
    """Runs the program under nsys, with the nvtx in a folder or the installed one; returns the recordings."""

    def run(nvtx: Path | None) -> list[Path]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
        environment = {
            **kept,
            "LLMPROBE": "1",
            "LLMPROBE_DIR": str(tmp_path / "probe"),
            "LLMPROBE_AGENT": "off",
            "TMPDIR": str(tmp_path),
        }
        if nvtx is not None:
            environment["PYTHONPATH"] = str(nvtx)
        command = [
            nsys, "profile", "--trace", "nvtx", "--sample", "none", "--cpuctxsw", "none",
            "-c", "nvtx", "-p", "decode@llmprobe", f"--capture-range-end=repeat:{TIMES}",
            "--output", str(tmp_path / "range"), sys.executable, "-c", PROGRAM,
        ]  # fmt: skip
        for _ in range(2):
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            # nsys by itself, now and then, before the program has run; "most likely a bug", it says.
            if "Connection to Agent lost" not in done.stderr:
                break
        assert "ended in order" in done.stdout, done.stdout + done.stderr
        return sorted(tmp_path.glob("range*.nsys-rep"))

    return run


def drops_ranges(nsys: str, nvtx: str) -> bool:
    """What the doctor says of this nsys beside such an nvtx."""
    check = packages.nsys(nsys, version=lambda name: nvtx)
    return check.state == "not ok" and "drops the ranges" in check.why


@pytest.fixture
def nvtx(nsys: str, tmp_path: Path) -> Path | None:
    """An nvtx whose ranges this nsys shows: None for the installed one, else a folder with an older one."""
    if not drops_ranges(nsys, version("nvtx")):
        return None
    folder = tmp_path / "nvtx"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, "nvtx<0.2.12"], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"this nsys needs an older nvtx than is installed, and none can be had: {done.stderr}")
    return folder


def test_so_many_decode_steps_are_recorded_whole_and_the_program_runs_on(
    nsys: str, record: Record, nvtx: Path | None
) -> None:
    recordings = record(nvtx)
    assert len(recordings) == TIMES
    for recording in recordings:
        assert ranges(exported(nsys, recording)) == [("decode", 1), ("forward", 0), ("sample", 0)]


def test_where_the_doctor_says_that_ranges_are_dropped_nothing_is_recorded(nsys: str, record: Record) -> None:
    if not drops_ranges(nsys, version("nvtx")):
        said = subprocess.run([nsys, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"\d{4}[\d.]*", said)
        pytest.skip(f"nsys {found[0] if found else '?'} shows the ranges of nvtx {version('nvtx')}")
    assert record(None) == []
