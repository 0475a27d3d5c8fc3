"""Captures with the real nsys of a server that does not get on."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

import pytest
from captured import Wrapped
from waiting import until

pytestmark = pytest.mark.integration


def test_a_capture_that_hangs_its_server_says_so_and_ends_all_the_same(
    wrapped: Callable[..., Wrapped],
) -> None:
    one = wrapped(options="--trace cuda,nvtx --cuda-graph-trace node")
    url = one.begin(seconds=6)
    one.recording(url)
    assert "--cuda-graph-trace node: a capture can hang the server for good" in one.said()
    assert "--cuda-graph-trace=node" in one.launch_line()
    one.hang()
    one.target.suspend()  # nsys waits 30 s for a process that does not answer
    try:
        done = one.state(url, "done")
    finally:
        one.target.resume()
    (hung,) = [note for note in done["notes"] if "has not got on" in note]
    assert re.search(r"rank 0 has been in step \d+ \(.*\) for \d+ s\. .*records them by node", hung)
    assert "capture.nsys-rep" in {file["name"] for file in done["files"]}
    assert one.ask("GET", "/api/captures")[1]["tools"][done["server"]]["nsys"] is None
    one.target.send_signal(signal.SIGUSR2)
    steps = one.rank()["steps"]["decode"]
    until(lambda: one.rank()["steps"]["decode"] > steps, "further steps")


def test_a_capture_that_fails_beside_a_hung_server_says_so_and_there_is_no_other(
    wrapped: Callable[..., Wrapped],
) -> None:
    one = wrapped(options="--trace cuda,nvtx")
    url = one.begin(seconds=6)
    one.recording(url)
    assert "can hang" not in one.said()
    assert "--cuda-graph-trace=graph" in one.launch_line()
    one.hang()
    next(found for found in one.nsys_processes() if "--start-agent" in found.cmdline()).kill()
    failed = one.state(url, "failed")
    assert re.search(
        r"nsys.*\. Since it was recorded the server has not got on: rank 0 has been in step .*start it anew$",
        failed["reason"],
    )
    said = {"kind": "capture", "capture": failed["id"], "tool": "nsys", "state": "failed"}
    until(lambda: [event for event in one.events() if said.items() <= event.items()], "event of its end")
    until(lambda: [event for event in one.events() if event["kind"] == "stall_begun"], "event of the stall")
    status, answer = one.ask("POST", "/api/captures", {"tool": "nsys"})
    assert (status, "start" in answer["detail"]) == (409, True), answer
    captures = one.ask("GET", "/api/status")[1]["agent"]["captures"]
    assert captures["nsys"][failed["server"]] == {"trace": ["cuda", "nvtx"], "cuda_graph_trace": "graph"}
    assert captures["tools"][failed["server"]]["nsys"] in answer["detail"]
