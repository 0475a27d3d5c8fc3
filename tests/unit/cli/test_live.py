"""A server as a panel in the terminal."""

from __future__ import annotations

from typing import Any

from export.views_for_tests import gpu, rank, server
from rich.console import Console

from llmprobe.cli.live import server_panel
from llmprobe.compute.attribution import PARTS, Attribution
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


def test_where_a_steps_time_went_is_told_for_each_phase() -> None:
    seconds = dict.fromkeys(PARTS, 0.0)
    seconds |= {
        "memory.linear": 2.4,
        "memory.attention": 0.6,
        "host": 1.0,
        "sample": 0.004,
        "remainder": 5.996,
    }
    text = shown(ranks=[rank(attribution={"decode": Attribution(1000, 10.0, seconds, None)})])
    assert (
        "decode step of 10.00 ms: memory floor 30% (linear 24%, attention 6%), host between steps 10%, "
        "not told apart 60%"
    ) in text
    assert "sampling" not in text, "0 % is not worth a word"
    assert " step of " not in shown(ranks=[rank(attribution={})])
    assert " step of " not in shown(ranks=[rank(attribution={"decode": Attribution(0, 0.0, seconds, None)})])
