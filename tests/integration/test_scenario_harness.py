"""Runs whose truth is known, made and labelled by benchmarks/scenarios.py, short ones: no verdict is wrong.

How soon it is right and whether it holds still depends on the machine: that is for the benchmark.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.integration

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scenarios.py"
_SECONDS = 17.0  # beyond the 15 s after which a wrong verdict is a fault
#: All on one server.
_SCENARIOS = ("decode", "host between steps", "prefill", "idle", "a clock that lies")
#: Their labels hold on any machine; those of the others where it leaves the engine enough of its cores.
_CERTAIN = {"host between steps", "idle"}

Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By name, as `support.outcomes` saves them."""
    folder = tmp_path_factory.mktemp("scenarios")
    saved = folder / "runs.jsonl"
    command = [sys.executable, str(_SCRIPT), "--folder", str(folder), "--json", str(saved)]
    command += ["--seconds", str(_SECONDS), "--patience", str(PATIENCE_SECONDS / 2), "--calibrate", "0.5"]
    command += [part for name in _SCENARIOS for part in ("--only", name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=6 * PATIENCE_SECONDS)
    # Its exit status tells of verdicts that were late or wavered, too.
    assert saved.exists(), done.stderr
    found = {run["name"]: run for run in map(json.loads, saved.read_text().splitlines())}
    assert set(found) == set(_SCENARIOS), done.stderr
    print(done.stderr)  # shown where a test fails
    return found


def scored(runs: Runs) -> Runs:
    return {name: run for name, run in runs.items() if run["label"]["holds"]}


def test_labels_hold(runs: Runs) -> None:
    assert set(scored(runs)) >= _CERTAIN, [run["label"] for run in runs.values()]


def test_no_verdict_is_wrong_and_sure_of_it(runs: Runs) -> None:
    wrong = {name: run["score"]["wrong"] for name, run in scored(runs).items()}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("name", _SCENARIOS)
def test_the_verdict_is_what_the_label_says(runs: Runs, name: str) -> None:
    run = runs[name]
    if not run["label"]["holds"]:
        pytest.skip(f"not scored on this machine now: {run['label']['rule']}")
    assert run["score"]["right_at_end"], (run["label"], run["score"])
