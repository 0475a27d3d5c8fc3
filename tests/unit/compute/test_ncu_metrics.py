"""Advice names metrics of Nsight Compute only as they are on the chip."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmprobe.compute.advice import ENTRIES, ncu_metrics

#: What ``ncu --query-metrics --chips gh100`` prints, one name a line.
KNOWN = Path(__file__).resolve().parents[2] / "data/ncu/gh100_metrics.txt"


def test_names_are_found_in_every_text_of_an_entry() -> None:
    entry = dataclasses.replace(
        ENTRIES[0],
        reason="Look at dram__bytes_read.sum, and at sm__throughput.avg.pct_of_peak_sustained_elapsed.",
        risk="None; LLMPROBE__NOT and __init__ are none.",
        look="ncu --metrics dram__bytes_read.sum,lts__t_sectors -- COMMAND",
    )
    assert ncu_metrics([entry]) == ["dram__bytes_read", "lts__t_sectors", "sm__throughput"]


def test_every_metric_in_advice_exists() -> None:
    named = ncu_metrics()
    if not named and not KNOWN.exists():
        pytest.skip("advice names no metric of ncu, and there is no list to hold it against")
    known = {line.split()[0].partition(".")[0] for line in KNOWN.read_text().splitlines() if line.strip()}
    assert set(named) <= known
