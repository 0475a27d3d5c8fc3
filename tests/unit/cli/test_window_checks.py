"""What the doctor says of kernel windows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from collect.scripted_nvml import ScriptedGpu, ScriptedNvml

from llmprobe.cli.checks import Check, gpus, windows
from llmprobe.record.latch import Latch
from llmprobe.record.window_file import FOLDER
from llmprobe.settings import Settings


def check(directory: Path, said: str = "version 26\n", gpu: bool = True, **environ: str) -> Check:
    environ = {"LLMPROBE": "1", "LLMPROBE_DIR": str(directory), **environ}
    seen = gpus.look(ScriptedNvml(*([ScriptedGpu()] if gpu else [])))
    return windows.kernel_windows(Settings.from_env(environ), seen, environ, lambda: said)


def test_where_cupti_records_it_is_said_with_the_setting(tmp_path: Path) -> None:
    found = check(tmp_path, LLMPROBE_KERNEL_WINDOWS="0.1/10")
    assert (found.state, found.found) == (
        "ok",
        "CUPTI (API version 26) records; LLMPROBE_KERNEL_WINDOWS is 0.1/10",
    )
    assert "is off" in check(tmp_path).found


def test_without_a_gpu_nothing_is_tried(tmp_path: Path) -> None:
    assert check(tmp_path, "error tried all the same", gpu=False).state == "absent"


@pytest.mark.parametrize("gpu", [True, False])
def test_a_death_in_a_window_is_told_and_how_to_open_them_again(tmp_path: Path, gpu: bool) -> None:
    tmp_path /= "a b"  # what to do is for a shell
    tmp_path.mkdir()
    program = (
        "import os, sys; from pathlib import Path; from llmprobe.record.latch import Latch\n"
        "latch = Latch(Path(sys.argv[1]), sys.argv[2]); latch.open_window(); os._exit(1)\n"
    )
    files = []
    for name in ("worker-1", "worker-2"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / FOLDER), name], check=False)
        files.append(tmp_path / FOLDER / f"{name}.open")
    living = Latch(tmp_path / FOLDER, "worker-3")
    living.open_window()
    try:
        found = check(tmp_path, gpu=gpu)
        assert found.state == "not ok"
        assert found.fix.startswith(f"rm '{files[0]}' '{files[1]}', ")
        assert "worker-3" not in found.fix
        for file in files:
            file.unlink()
        assert check(tmp_path, gpu=True).state == "ok"
    finally:
        living.close_window()


@pytest.mark.parametrize(
    ("said", "found", "fix"),
    [
        ("error cuptiActivityEnable refused: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES", "refused", "profile"),
        (
            "error no libcupti is loaded in this process: its torch was built without it",
            "no libcupti",
            "torch",
        ),
        ("a warning\nerror No module named 'torch'", "No module named 'torch'", "environment of the engine"),
        ("", "without a word", "docs/operating.md"),
    ],
)
def test_what_libcupti_refuses_is_said_with_what_to_do(
    tmp_path: Path, said: str, found: str, fix: str
) -> None:
    told = check(tmp_path, said)
    assert told.state == "not ok"
    assert not told.broken  # everything else works without
    assert found in told.found
    assert fix in told.fix


def test_a_profiler_in_the_engines_environment_is_named(tmp_path: Path) -> None:
    told = check(tmp_path, CUDA_INJECTION64_PATH="/opt/nsys/libToolsInjection64.so")
    assert told.state == "not ok"
    assert "CUDA_INJECTION64_PATH" in told.found


def test_it_is_tried_in_a_process_of_its_own() -> None:
    pytest.importorskip("torch")
    said = windows._tried().strip()
    assert said.startswith(("version ", "error no libcupti is loaded")), said
    assert "LLMPROBE" not in os.environ or os.environ["LLMPROBE"] != "0"


def test_one_that_does_not_end_is_said_without_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_TRY", "import time; time.sleep(60)")
    monkeypatch.setattr(windows, "_TRY_SECONDS", 0.1)
    told = check(tmp_path, windows._tried())
    assert told.found == "trying it did not end within 0.1 s"
