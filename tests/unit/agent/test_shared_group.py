"""Servers that share a group id, as `llmprobe run` gives it to all that a script or torchrun starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llmprobe.agent.captures import Watched
from llmprobe.agent.door import Door
from llmprobe.agent.service import State, create_app
from llmprobe.capture.session import Capture, Request
from llmprobe.collect.collector import Collector
from llmprobe.collect.views import ServerView
from llmprobe.record.recorder import Recorder

Make = Callable[[list[dict[str, Any]]], State]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    recorders: list[Recorder] = []
    collectors: list[Collector] = []

    def state(processes: list[dict[str, Any]]) -> State:
        for said in processes:
            recorders.append(Recorder.open(tmp_path, said["role"], {"group": "shared", **said}))
        writers = {recorder.writer.path: recorder.writer for recorder in recorders}
        collectors.append(Collector(tmp_path, own_writers=lambda: writers))
        for _ in range(2):  # at the second look it is known that they are two
            collectors[-1].tick(final=True)
        return State(collectors[-1], tmp_path)

    yield state
    for collector in collectors:
        collector.close()
    for recorder in recorders:
        recorder.close(remove=True)


SERVERS = [
    {"role": role, "server": server, "framework": "vllm", "engine": 0, "rank": 0}
    for server in ("vllm-8000", "vllm-8001")
    for role in ("worker", "frontend")
]
PROGRAMS = [
    {"role": "program", "server": "generate", "framework": "transformers", "rank": rank} for rank in range(3)
]


def journals(view: ServerView) -> list[str]:
    return [rank.journal.name for rank in view.ranks if rank.journal is not None]


@pytest.mark.parametrize("processes", [SERVERS, PROGRAMS])
def test_a_capture_is_of_the_server_that_was_asked_for(make: Make, processes: list[dict[str, Any]]) -> None:
    state = make(processes)
    watched = Watched(state.reader)
    views = state.reader.views()
    assert {view.group for view in views} == {"shared"} and len(views) > 1
    for view in views:
        capture = Capture("1", "/", view.server, view.group, Request("torch", 1.0, None))
        assert [worker.journal.name for worker in watched.workers(capture)] == journals(view)
        figures = watched.figures(capture)
        assert figures is not None and figures["server"] == view.server
        assert watched.live(capture) is not None
    gone = Capture("1", "/", views[0].server, "another", Request("torch", 1.0, None))
    assert (watched.workers(gone), watched.figures(gone), watched.live(gone)) == ([], None, None)


@pytest.mark.parametrize("processes", [SERVERS, PROGRAMS])
def test_a_switch_names_the_processes_of_its_servers_alone(
    make: Make, processes: list[dict[str, Any]]
) -> None:
    state = make(processes)
    client = TestClient(create_app(state, Door("unix", None)))
    views = state.reader.views()
    everything = [path.name for view in views for path in view.journals]
    assert len(set(everything)) == len(everything) == len(processes)
    for view in views:
        answer = client.post("/api/probe", json={"armed": False, "servers": [view.server]}).json()
        assert answer["journals"] == sorted(path.name for path in view.journals)
        assert set(journals(view)) <= set(answer["journals"])
