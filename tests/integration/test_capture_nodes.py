"""``llmprobe capture`` of several nodes at the same moment: real agents, each with a program under nsys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from captured import Wrapped, capture_verb
from waiting import until

from llmprobe.record.agent_launch import agent_info

pytestmark = pytest.mark.integration


def test_two_nodes_are_captured_at_once_each_with_its_token(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    both = [wrapped(), wrapped()]
    targets = []
    for one in both:
        until(lambda one=one: one.ask("GET", "/api/status")[1]["servers"], "server")  # type: ignore[misc]
        info = agent_info(one.directory)
        assert info is not None
        targets.append(f"{info['address']}:{info['port']}")
    assert len({(one.directory / "token").read_text() for one in both}) == 2
    first = ("--target", targets[0], "--token-file", str(both[0].directory / "token"))
    second = ("--target", f"{both[1].directory}/token@{targets[1]}")
    shell = capture_verb(both[0], tmp_path, "--seconds", "2", *first, *second)
    assert shell.returncode == 0, shell.stderr
    found = json.loads(shell.stdout)
    assert [one["node"] for one in found] == targets
    recorded = [(one["capture"]["times"]["recording"], one["capture"]["times"]["importing"]) for one in found]
    assert max(begun for begun, _ in recorded) < min(ended for _, ended in recorded)  # the same moment
    for node, one in zip(targets, found, strict=True):
        folder = tmp_path / "fetched" / node.replace(":", "-") / one["capture"]["id"]
        assert one["folder"] == str(folder)
        assert one["report"] == json.loads((folder / "report.json").read_text())
        assert one["summary"]["trust"] == "untrusted"  # there is no GPU here
        assert one["summary"]["bound_by"].keys() >= {"decode"}
    servers = [{entry["server"] for entry in one.ask("GET", "/api/status")[1]["servers"]} for one in both]
    assert [{one["capture"]["server"]} for one in found] == servers
