"""``llmprobe status``: the servers on one screen, and what it adds below them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compute.verdicts import host
from export.views_for_tests import rank, server, verdict
from typer.testing import CliRunner

from llmprobe.cli.app import app
from llmprobe.cli.status import _capture_lines
from llmprobe.compute.evidence import Evidence
from llmprobe.compute.host import ThreadLoad
from llmprobe.export.summary import summarize


def test_only_what_can_be_captured_now_is_named() -> None:
    tools = {"vllm-8001": {"nsys": "not launched by it"}, "vllm-8000": {"nsys": None, "torch": "not yet"}}
    assert _capture_lines({"tools": tools}) == ["Captures of vllm-8000: nsys (llmprobe capture --help)"]
    assert _capture_lines({}) == []


@pytest.mark.parametrize(
    ("graphs", "words"),
    [("graph", "nsys (CUDA graphs whole)"), ("node", "nsys (CUDA graphs by node)"), (None, "nsys")],
)
def test_how_nsys_records_graphs_is_named(graphs: str | None, words: str) -> None:
    session = {"trace": ["cuda"], "cuda_graph_trace": graphs}
    lines = _capture_lines({"tools": {"a": {"nsys": None, "torch": None}}, "nsys": {"a": session}})
    assert lines[0] == f"Captures of a: {words}, torch (llmprobe capture --help)"


def test_an_nsys_that_is_no_more_is_told() -> None:
    session = {"trace": ["nvtx"], "cuda_graph_trace": None}
    lines = _capture_lines({"tools": {"a": {"nsys": "it died", "torch": "busy"}}, "nsys": {"a": session}})
    assert lines[0] == "No nsys capture of a: it died"


def test_what_a_launch_by_nsys_excludes_and_costs_is_told() -> None:
    session = {"trace": ["nvtx"], "cuda_graph_trace": None}
    lines = _capture_lines({"tools": {"a": {"nsys": None}, "b": {"torch": None}}, "nsys": {"a": session}})
    (told,) = [line for line in lines if "runs under nsys" in line]
    assert told.startswith("a ")
    assert "no kernel windows, no captures by torch or kernels" in told
    assert "docs/captures.md" in told


def status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, **servers: Any) -> str:
    """What it prints of servers as an agent tells them."""
    found = {**summarize([server(name, **changes) for name, changes in servers.items()]), "agent": {}}
    monkeypatch.setenv("LLMPROBE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("llmprobe.cli.status.request", lambda *args: (200, json.loads(json.dumps(found))))
    done = CliRunner().invoke(app, ["status", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", ["a/[model]", "a[/b]", "[bold]x"])
def test_names_and_notes_are_no_markup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    text = status(monkeypatch, tmp_path, one={"model_name": name, "notes": [f"see {name}"]})
    assert f"one  {name}  vllm" in text
    assert f"note: see {name}" in text


def test_each_headline_names_its_server_where_there_are_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = status(monkeypatch, tmp_path, one={}, two={}).splitlines()
    assert [line[:11] for line in lines if "memory-bound" in line] == ["one: Decode", "two: Decode"]
    assert status(monkeypatch, tmp_path, one={}).startswith("Decode memory-bound")


def test_of_several_servers_one_can_be_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = status(monkeypatch, tmp_path, "two", one={}, two={})
    assert text.startswith("Decode memory-bound")  # the only one, so its name is not before it
    assert "two  " in text
    assert "one  " not in text
    (shown,) = json.loads(status(monkeypatch, tmp_path, "two", "--json", one={}, two={}))["servers"]
    assert shown["server"] == "two"
    done = CliRunner().invoke(app, ["status", "three"])
    assert done.exit_code == 1
    assert "no server 'three'; running: one, two" in done.output


def test_captures_are_told_of_the_servers_that_are_shown() -> None:
    captures = {"tools": {"one": {"torch": None}, "two": {"torch": None}}}
    assert [line.split(":")[0] for line in _capture_lines(captures, ["two"])] == ["Captures of two"]
    assert len(_capture_lines(captures)) == 2


def test_the_deciding_evidence_is_shown_and_all_of_it_on_demand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evidence = (
        Evidence("mbu_busy", 0.55, 0.5, "modelled"),
        Evidence("dram_active_ratio", 0.61, 0.7, "counter", 2.0),
        Evidence("sync_gap_ratio", 0.04, 0.2, "measured"),
    )
    one = {"verdicts": {"decode": verdict(evidence=evidence)}}
    told = (
        "decode, decided by: MBU of busy time 0.55 ≥ 0.50 (modelled); "
        "DRAM active 0.61 < 0.70 (counter, 2 s ago)"
    )
    short = status(monkeypatch, tmp_path, one=one)
    assert told in " ".join(short.split())
    assert "0.04" not in short
    rows = [line.split() for line in status(monkeypatch, tmp_path, "--evidence", one=one).splitlines()]
    assert ["sync", "gap", "0.04", "0.20", "measured"] in rows
    assert ["DRAM", "active", "0.61", "0.70", "counter", "2", "s", "ago"] in rows


def test_of_uneven_routing_the_share_of_experts_that_are_read_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evidence = (
        Evidence("mbu_busy", 0.27, 0.5, "counter"),
        Evidence("experts_read_ratio", 0.13, 0.96, "counter", 1.0),
    )
    one = {"verdicts": {"decode": verdict(bottleneck="inefficient_kernels", evidence=evidence)}}
    told = "MBU of busy time 0.27 < 0.50 (counter); experts read 0.13 < 0.96 (counter, 1 s ago)"
    assert told in " ".join(status(monkeypatch, tmp_path, one=one).split())


@pytest.mark.parametrize(("bottleneck", "told"), [("sync_bound", True), ("memory_bound", False)])
def test_the_host_decides_nothing_of_a_phase_that_the_device_binds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bottleneck: str, told: bool
) -> None:
    """On a CPU the thread that uses all of a core is the device at work."""
    evidence = (
        Evidence("sync_gap_ratio", 0.3, 0.2, "measured"),
        Evidence("mbu_busy", 0.9, 0.5, "modelled"),
        Evidence("host_thread_busy", 0.97, 0.9, "measured"),
    )
    one = {"verdicts": {"decode": verdict(bottleneck=bottleneck, evidence=evidence)}}
    assert ("host thread busy" in " ".join(status(monkeypatch, tmp_path, one=one).split())) is told
    shown = " ".join(status(monkeypatch, tmp_path, "--evidence", one=one).split())
    assert "host thread busy 0.97" in shown


def test_what_the_host_did_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    busy = host(threads=(ThreadLoad("python", 0.99, 0.0),), throttled_ratio=0.25, cpu_pressure_ratio=None)
    text = status(monkeypatch, tmp_path, one={"ranks": [rank(host=busy)]})
    assert "host of rank 0: 0.50 cores of 16, busiest thread python 99%" in text
    assert "throttled 25%" in " ".join(text.replace("│", " ").split())
    assert "CPU pressure" not in text
    assert "host of rank" not in status(monkeypatch, tmp_path, one={"ranks": [rank(host=None)]})
