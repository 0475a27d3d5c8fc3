"""The verdict in a terminal of 80 columns, without colour."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest
from export.views_for_tests import ADVICE, pressure, server, verdict
from rich.console import Console

from llmprobe.cli.verdict_view import verdict_view
from llmprobe.export.report import advice_lines
from llmprobe.export.summary import summarize


def shown(width: int = 80, **changes: Any) -> list[str]:
    (entry,) = json.loads(json.dumps(summarize([server(**changes)])))["servers"]
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(verdict_view(entry))
    return out.getvalue().splitlines()


def test_the_headline_comes_first() -> None:
    assert shown()[0] == "Decode memory-bound, confidence 0.72: MBU 0.50 of busy time."


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits(width: int) -> None:
    assert max(len(line) for line in shown(width)) <= width


def test_each_phase_has_a_line_with_class_confidence_and_load() -> None:
    (line,) = [line for line in shown() if line.strip().startswith("decode ")]
    assert line.split() == ["decode", "memory_bound", "0.72", "12", "s", "60%", "2.00", "ms", "linear"]


def test_an_unknown_phase_says_why() -> None:
    why = "kernel windows are off"
    lines = shown(
        verdicts={
            "prefill": verdict(phase="prefill", bottleneck="unknown", cause="no_kernel_windows", reason=why)
        }
    )
    assert f"  prefill: {why}" in lines


def test_what_presses_is_said_once() -> None:
    lines = shown(
        pressure={"queue": pressure(), "kv_cache": pressure(kind="kv_cache", active=False, text="KV")}
    )
    assert "  under pressure: queueing is 40% of TTFT" in lines


def test_advice_says_change_gain_reason_risk_and_the_next_look() -> None:
    text = "\n".join(shown(width=200))
    assert "decode: try --max-num-seqs 32 (now: 16); at most 1.60 times the tokens per second" in text
    assert (
        "Weights are read once a step for however many requests. Risk: TPOT of single requests rises." in text
    )
    assert "next look: llmprobe status" in text


def test_advice_that_changes_no_setting_says_its_gain_and_risk_too() -> None:
    plain = dataclasses.replace(
        ADVICE, change="", reason="Others want its cores.", gain="at most 4.88 ms of a step"
    )
    text = "\n".join(shown(width=200, advice={"decode": (plain,)}))
    does = "decode: Others want its cores. To gain: at most 4.88 ms of a step."
    assert f"{does} Risk: TPOT of single requests rises." in text
    look = dataclasses.replace(plain, risk="None: only a look.")
    assert "Risk" not in "\n".join(shown(width=200, advice={"decode": (look,)}))


def test_the_same_change_is_advised_once() -> None:
    (entry,) = summarize([server(advice={"decode": (ADVICE,), "queue": (ADVICE,)})])["servers"]
    assert sum("--max-num-seqs" in line for line in advice_lines(entry["advice"])) == 1


def test_a_server_without_a_verdict_says_so() -> None:
    assert shown(headline="", verdicts={}, pressure={}, advice={}) == ["No verdict yet."]
