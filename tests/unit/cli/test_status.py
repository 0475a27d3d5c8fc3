"""What ``llmprobe status`` adds below the servers."""

from __future__ import annotations

from llmprobe.cli.status import _capture_lines


def test_only_what_can_be_captured_now_is_named() -> None:
    tools = {"vllm-8001": {"nsys": "not launched by it"}, "vllm-8000": {"nsys": None, "torch": "not yet"}}
    assert _capture_lines(tools) == ["Captures of vllm-8000: nsys (llmprobe capture --help)"]
