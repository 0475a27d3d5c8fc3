"""A server as a panel in the terminal."""

from __future__ import annotations

from typing import Any

from export.views_for_tests import gpu, rank, server
from rich.console import Console

from llmprobe.cli.live import server_panel
from llmprobe.export.summary import summarize


def shown(**changes: Any) -> str:
    (entry,) = summarize([server(**changes)])["servers"]
    console = Console(width=200, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(server_panel(entry))
    return captured.get()


def test_a_gpu_has_a_line_with_what_is_known_about_it() -> None:
    text = shown(ranks=[rank(gpu=gpu(temperature_celsius=None))])
    assert "GPU of rank 0: DRAM 60.0%   tensor 10.0%   SM 70.0%   400 W   1980 MHz   memory 81.9%" in text
    assert "°C" not in text
    assert "GPU of rank" not in shown(ranks=[rank(gpu=None)])


def test_figures_that_are_missing_for_one_reason_share_a_line() -> None:
    text = shown(missing={"a": "no NVML", "b": "another", "c": "no NVML"})
    assert "not measured: a, c: no NVML" in text
    assert "not measured: b: another" in text
