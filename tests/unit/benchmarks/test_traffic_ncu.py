"""A recording of ncu's is judged by the bar; a step that was not measured is never one that held."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llmprobe.record.layout import STEP, Phase

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))

PRINTED = (ROOT / "tests/data/ncu/raw_page.csv").read_text()
#: 1000 bytes of weights a step, 10 bytes a token of context and one written.
MODEL = {
    "weights_bytes": 1200,
    "operators": {"linear": {"bytes": 900, "params": 450}, "head": {"bytes": 100, "params": 50}},
    "embedding_bytes": 200,
    "tied": False,
    "compute_dtype": "bfloat16",
    "kv": {"capacity_bytes": 1 << 20, "groups": [{"kind": "full", "window": None, "layers": 1}]},
    "unmodelled": [],
}
MODEL["kv"]["groups"][0].update(bytes_per_token=10, flops_per_pair=1, bytes_per_request=0)  # type: ignore[index]
ASKED = {
    "batch": [1, 4],
    "context": 16,
    "model": "small",
    "layers": 1,
    "cache_control": "none",
    "nvtx": False,
}
MARK = "at::cuda::<unnamed>::spin_kernel(long)"


@pytest.fixture
def script() -> ModuleType:
    import traffic_ncu

    return traffic_ncu


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(**ASKED, ncu="ncu", data=tmp_path, json=tmp_path / "out.json", markdown=True)


def recorded(folder: Path, batches: list[int], *launches: tuple[str, float]) -> dict[str, Any]:
    """A folder as a run leaves it, with so many steps of llmprobe's and the launches in ncu's lines."""
    steps = np.zeros(len(batches), dtype=STEP)
    for step, batch in zip(steps, batches, strict=True):
        step["phase"], step["requests"], step["decode_tokens"], step["sampled"] = Phase.DECODE, *[batch] * 3
        step["context_decode"][0] = 16 * batch
    np.save(folder / "steps.npy", steps)
    (folder / "facts.json").write_text(json.dumps({"model": MODEL}))
    head, units, like = list(csv.reader(PRINTED.splitlines()))[:3]
    written = io.StringIO()
    rows = [
        [str(number), *like[1:4], name, *like[5:-2], f"{read:.0f}", "7"]
        for number, (name, read) in enumerate(launches)
    ]
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([head, units, *rows])
    (folder / "ncu.csv").write_text(f"==PROF== Connected to process 1\n{written.getvalue()}")
    kept = {"asked": ASKED, "machine": "a GPU", "seconds": 60.0, "failed": ""}
    (folder / "asked.json").write_text(json.dumps(kept))
    return kept


def judged(
    script: ModuleType, options: argparse.Namespace, kept: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    status = script._show(kept, options.data, options)
    return status, json.loads(options.json.read_text())


def test_steps_within_the_bar(
    script: ModuleType, options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = recorded(options.data, [1, 4], (MARK, 9e9), ("a", 600), ("b", 560), (MARK, 9e9), ("c", 1700))
    assert script._record(options, options.data) == kept  # nothing is run where a recording lies
    status, saved = judged(script, options, kept)
    # 1000 of weights, 160 read and 10 written; 1000, 640 and 40.
    assert [step["estimated_bytes"] for step in saved["steps"]] == [1170, 1680]
    assert [[kernel["name"] for kernel in step["kernels"]] for step in saved["steps"]] == [["a", "b"], ["c"]]
    assert (status, saved["failed"]) == (0, [])
    assert "| 4 x 16 | 1 |" in capsys.readouterr().out


def test_a_step_beyond_the_bar(script: ModuleType, options: argparse.Namespace) -> None:
    kept = recorded(options.data, [1, 4], (MARK, 0), ("a", 1170), (MARK, 0), ("c", 2000))
    status, saved = judged(script, options, kept)
    assert (status, saved["failed"]) == (1, [])


def test_a_run_that_broke_off_in_a_step_keeps_the_one_before(
    script: ModuleType, options: argparse.Namespace
) -> None:
    kept = recorded(options.data, [1], (MARK, 0), ("a", 1170), (MARK, 0), ("c", 1))
    status, saved = judged(script, options, {**kept, "failed": "ncu ended with 1"})
    assert [step["batch"] for step in saved["steps"]] == [1]
    assert (status, saved["failed"]) == (1, ["ncu ended with 1"])


def test_a_batch_that_is_missing_is_said(script: ModuleType, options: argparse.Namespace) -> None:
    status, saved = judged(script, options, recorded(options.data, [1], (MARK, 0), ("a", 1170)))
    assert (status, saved["failed"]) == (1, ["asked for steps of [1, 4] requests, got them of [1]"])


def test_a_step_without_bytes_is_a_failure(script: ModuleType, options: argparse.Namespace) -> None:
    kept = recorded(options.data, [1, 4], (MARK, 0), ("a", 0), (MARK, 0), ("c", 1700))
    status, saved = judged(script, options, kept)
    assert (status, len(saved["failed"])) == (1, 1)


def test_a_recording_of_other_settings_is_refused(script: ModuleType, options: argparse.Namespace) -> None:
    recorded(options.data, [1, 4], (MARK, 0), ("a", 1170))
    options.context = 32
    with pytest.raises(SystemExit, match="other settings"):
        script._record(options, options.data)
