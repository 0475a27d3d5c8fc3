"""Two engines of a dense model behind one front end: each has its own work."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import get_json
from servers import shared_directory
from waiting import PATIENCE_SECONDS, until

from llmprobe.demo.server import VllmServer
from llmprobe.record.journal_reader import JournalReader

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    flags = [
        *("--data-parallel-size", "2", "--api-server-count", "1", "--served-model-name", "tiny"),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    ]
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    server = VllmServer.start(tiny_model, shared_directory(), log, flags)
    try:
        server.wait_ready(2 * PATIENCE_SECONDS)
        server.wait_agent(PATIENCE_SECONDS)
        yield server
    finally:
        server.stop()


def ask(server: VllmServer, engine: int, max_tokens: int) -> None:
    """A completion by one of the engines."""
    body = {"model": "tiny", "prompt": [17, 18, 19], "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(engine)}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        answer.read()


def fronts(server: VllmServer) -> dict[int, JournalReader]:
    """The front end's journal of each engine."""
    readers = [JournalReader(path) for path in (server.directory / "journals").glob("*.journal")]
    return {
        int(reader.facts()["engine"]): reader for reader in readers if reader.facts()["role"] == "frontend"
    }


def ranks(server: VllmServer) -> dict[int, dict[str, Any]]:
    (entry,) = get_json(f"{server.agent_url}/api/status")["servers"]
    return {rank["engine"]: rank for rank in entry["ranks"]}


def test_an_engine_without_a_request_has_no_work_while_the_other_one_works(pair: VllmServer) -> None:
    for engine in (0, 1):
        ask(pair, engine, 20)
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            ask(pair, 0, 1000)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        until(lambda: ranks(pair)[0]["steps"].get("decode", 0) > 100, "work of engine 0")
        ask(pair, 1, 20)
        journals = fronts(pair)
        told = {engine: reader.read().pending["unfinished"].tolist() for engine, reader in journals.items()}
        # Whatever else came and went at engine 0: twice it was asked, and its last word is nothing.
        assert [count > 0 for count in told[1]] == [True, False] * 2
        before = ranks(pair)[1]["device_time"]["none"]["no_work"]
        until(lambda: ranks(pair)[1]["device_time"]["none"]["no_work"] > before + 2, "idle time of engine 1")
        assert not len(journals[1].read().pending)
    finally:
        ended.set()
        thread.join()
    for reader in journals.values():
        reader.close()
