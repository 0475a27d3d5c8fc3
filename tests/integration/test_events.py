"""Events of a real agent: from journals that a feeder writes, and from a vLLM that is stopped under load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine import Load, get_json, post, tokens
from test_agent import engine, settings
from waiting import PATIENCE_SECONDS, until

from llmprobe.demo.server import VllmServer
from llmprobe.record.agent_launch import agent_info, agent_running, ensure_agent
from llmprobe.settings import Settings

pytestmark = pytest.mark.integration

__all__ = ["settings"]  # a fixture

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Listener(threading.Thread):
    """Reads ``/api/events`` on a thread of its own, as long as the connection lasts."""

    def __init__(self, url: str, last_event_id: int | None = None) -> None:
        super().__init__(daemon=True)
        headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
        self._answer = _OPENER.open(
            urllib.request.Request(f"{url}/api/events", headers=headers), timeout=PATIENCE_SECONDS
        )
        assert self._answer.headers["content-type"].startswith("text/event-stream")
        assert self._answer.readline() == b": llmprobe events\n"
        self.events: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        number = b""
        try:
            for line in self._answer:
                name, _, value = line.rstrip(b"\n").partition(b": ")
                if name == b"id":
                    number = value
                elif name == b"data":
                    event = json.loads(value)
                    assert str(event["id"]).encode() == number
                    self.events.append(event)
        except (OSError, ValueError, AttributeError):
            pass  # closed, or the agent is gone

    def first(self, kind: str, **of: Any) -> dict[str, Any]:
        """The first event of that kind; waits for it."""
        wanted = {"kind": kind, **of}
        return self.first_of(kind, lambda event: wanted.items() <= event.items())

    def first_of(self, name: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event that is wanted; waits for it."""

        def found() -> dict[str, Any] | None:
            return next((event for event in self.events if wanted(event)), None)

        return until(found, f"{name} event", lambda: f"had: {self.events}")

    def close(self) -> None:
        self._answer.close()


def _claims(event: dict[str, Any]) -> bool:
    return (event["kind"], event.get("phase")) == ("verdict", "decode") and event["bottleneck"] not in (
        "idle",
        "unknown",
    )


def agent_url(settings: Settings) -> str:
    def listening() -> dict[str, Any] | None:
        ensure_agent(settings)
        return agent_info(settings.directory)

    return f"http://127.0.0.1:{until(listening, 'agent')['port']}"


def order(child: subprocess.Popen[bytes], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line.encode() + b"\n")
    child.stdin.flush()


@pytest.fixture
def listener() -> Iterator[list[Listener]]:
    """Those in it are closed after the test."""
    listeners: list[Listener] = []
    yield listeners
    for one in listeners:
        one.close()


def test_what_an_engine_goes_through_is_told_and_taken_up_by_the_next_agent(
    settings: Settings, listener: list[Listener]
) -> None:
    directory = settings.directory
    with engine(directory, "frontend", "worker") as (front, worker):
        url = agent_url(settings)
        first = Listener(url, 0)
        listener.append(first)
        came = first.first("engine_came")
        assert (came["server"], came["engine"], came["framework"]) == ("fed-a", 0, "vllm")
        verdict = first.first_of("verdict", _claims)  # a slow machine may first say that it cannot know
        assert verdict["reason"]
        order(front, "press")
        assert first.first("pressure_begun", pressure="sequence_limit")["value"] == 1.0
        order(front, "ease")
        order(worker, "hang")
        stall = first.first("stall_begun")
        assert (stall["where"], stall["rank"]) == ("step", 0)
        assert stall["seconds"] >= stall["bound_seconds"] >= 10
        assert stall["last_steps"][-1]["step"] == stall["step"] - 1
        (hanging,) = get_json(f"{url}/api/status")["servers"]
        assert hanging["headline"].startswith("STALLED: ")
        assert hanging["verdicts"][stall["phase"]]["bottleneck"] != "idle"
        assert list(hanging["advice"]) == ["stall"]
        assert first.first("pressure_ended", pressure="sequence_limit")["outcome"] == "eased"

        killed = agent_info(directory)
        assert killed is not None
        last = first.events[-1]["id"]
        time.sleep(1.5)  # events are on disk after a second
        os.kill(int(killed["pid"]), signal.SIGKILL)
        until(lambda: not agent_running(directory), "end of the agent")
        order(worker, "go")
        second = Listener(agent_url(settings), stall["id"])
        listener.append(second)
        ended = second.first("stall_ended")
        assert ended["step"] == stall["step"]
        assert ended["outcome"] == "recovered"
        assert ended["id"] > last
        assert all(event["id"] > stall["id"] for event in second.events)
        told = [event["kind"] for event in second.events if event["id"] > last]
        assert "engine_came" not in told  # the new agent knows what the old one told
        assert "stall_begun" not in told
    assert second.first("engine_went")["server"] == "fed-a"
    numbers = [event["id"] for event in second.events]
    assert numbers == sorted(set(numbers))


def test_only_so_many_may_listen_and_one_that_leaves_makes_room(
    settings: Settings, listener: list[Listener]
) -> None:
    with engine(settings.directory, "worker"):
        url = agent_url(settings)
        listener += [Listener(url, 0) for _ in range(16)]
        with pytest.raises(urllib.error.HTTPError) as refused:
            Listener(url)
        assert refused.value.code == 503
        assert json.load(refused.value)["next"]
        for one in listener:
            one.first("engine_came")
        listener.pop().close()

        def another() -> dict[str, Any] | None:
            try:
                listener.append(Listener(url))
            except urllib.error.HTTPError:
                return None
            return {"in": True}

        until(another, "room for one more")
        # Listeners hold up neither the agent's other answers nor its end.
        assert get_json(f"{url}/api/status")["servers"]
        info = agent_info(settings.directory)
        assert info is not None
        os.kill(info["pid"], signal.SIGTERM)
        until(lambda: not agent_running(settings.directory), "end of the agent")


def test_a_vllm_that_is_stopped_under_load_is_a_stall_until_it_goes_on(
    mortal: VllmServer, listener: list[Listener]
) -> None:
    with Load(mortal, max_tokens=200):
        listening = Listener(mortal.agent_url)
        listener.append(listening)
        (shown,) = get_json(f"{mortal.agent_url}/api/status")["servers"]
        pid = shown["ranks"][0]["facts"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            stall = listening.first("stall_begun")
        finally:
            os.kill(pid, signal.SIGCONT)
        assert stall["seconds"] >= stall["bound_seconds"] >= 10
        assert 1 <= len(stall["last_steps"]) <= 5
        assert f"rank {stall['rank']}" in stall["text"]
        assert listening.first("stall_ended")["outcome"] == "recovered"
    assert post(mortal, {"model": "tiny", "prompt": tokens(7, 5), "max_tokens": 2}).status == 200
