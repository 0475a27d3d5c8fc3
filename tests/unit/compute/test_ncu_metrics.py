"""Advice names metrics of Nsight Compute only as they are on the chip."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llmprobe.compute.advice import ENTRIES, ncu_metrics

#: Of what ``ncu --query-metrics --chips gh100`` prints, one name a line; see tests/data/PROVENANCE.md.
KNOWN = Path(__file__).resolve().parents[2] / "data/ncu/gh100_metrics.txt"


def test_names_are_found_in_every_text_of_an_entry() -> None:
    entry = dataclasses.replace(
        ENTRIES[0],
        reason="Look at dram__bytes_read.sum, and at sm__throughput.avg.pct_of_peak_sustained_elapsed.",
        risk="None; LLMPROBE__NOT and __init__ are none.",
        look="ncu --metrics dram__bytes_read.sum,lts__t_sectors -- COMMAND",
    )
    assert ncu_metrics([entry]) == ["dram__bytes_read", "lts__t_sectors", "sm__throughput"]


def known() -> set[str]:
    return set(KNOWN.read_text().split())


def test_the_list_tells_names_that_exist_from_one_that_does_not() -> None:
    assert {"dram__bytes_read", "smsp__warp_issue_stalled_long_scoreboard_per_warp_active"} <= known()
    assert "smsp__warp_stall_memory_dependency_per_warp_active" not in known()  # of an older chip


def test_every_metric_in_advice_exists() -> None:
    named = set(ncu_metrics())
    assert {"dram__throughput", "sm__throughput", "sm__warps_active"} <= named, "else nothing is tested here"
    assert named <= known()


def test_who_is_sent_to_ncu_is_told_what_to_measure() -> None:
    sent = [entry for entry in ENTRIES if entry.look.startswith("ncu ")]
    assert "inefficient_kernels" in {entry.bottleneck for entry in sent}
    for entry in sent:
        assert ncu_metrics([dataclasses.replace(entry, reason="", risk="")]), entry.finding
