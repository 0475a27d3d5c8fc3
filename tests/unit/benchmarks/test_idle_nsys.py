"""A recording that tells nothing takes nothing from the stretch before it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.nsys_host import HostSteps

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))


@pytest.fixture
def script() -> ModuleType:
    import idle_nsys

    return idle_nsys


def steps(lost: float) -> HostSteps:
    times = np.array([8e6, 10e6])
    return HostSteps(
        times, times / 2, times / 10, np.array([False, True]), {"cudaLaunchKernel": (3.0, 9e3)}, lost
    )


@pytest.mark.parametrize(
    ("found", "why"), [(steps(0.86), "nsys lost 86% of the launches"), ("too few steps", "too few steps")]
)
def test_a_recording_that_cannot_be_told_says_why(
    script: ModuleType, found: HostSteps | str, why: str
) -> None:
    assert script.recorded(found) == (None, why)


def test_the_rate_before_such_a_recording_is_in_the_table(script: ModuleType) -> None:
    whole = steps(0.01)
    assert script.recorded(whole) == (whole, "")
    stretches = [
        script.Stretch(
            True, 9.0, 25.0, script.Kind(1, 8.0, 4.0, 0.8), script.Kind(1, 10.0, 5.0, 1.0), {}, 0.01
        ),
        script.Stretch(True, 11.0, 27.0, None, None, {}, None),
    ]
    options = argparse.Namespace(
        seconds=10.0,
        record_seconds=1.0,
        concurrency=128,
        prompt_tokens=8,
        output_tokens=8,
        spread_seconds=5.0,
    )
    rows = {row[0]: row[2] for row in script._table(stretches, [], options, "a GPU").rows}
    assert rows["a step, by the clients' rate, ms"] == "10.000 (9.000 … 11.000)"
    assert rows["llmprobe's own host time a step, µs"] == "26.0 (25.0 … 27.0)"
    assert rows["launches that nsys lost, %"] == "1.00 (1.00 … 1.00)"
    assert rows["recorded steps of few launches"] == "1 (1 … 1)"
