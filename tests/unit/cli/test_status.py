"""What ``llmprobe status`` adds below the servers."""

from __future__ import annotations

import pytest

from llmprobe.cli.status import _capture_lines


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
    assert lines == [f"Captures of a: {words}, torch (llmprobe capture --help)"]


def test_an_nsys_that_is_no_more_is_told() -> None:
    session = {"trace": ["nvtx"], "cuda_graph_trace": None}
    lines = _capture_lines({"tools": {"a": {"nsys": "it died", "torch": "busy"}}, "nsys": {"a": session}})
    assert lines == ["No nsys capture of a: it died"]
