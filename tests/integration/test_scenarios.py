"""A run whose truth is known: the host is made slow, and the verdict says that it is the host."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine import complete, get_json
from servers import tell_delay
from waiting import until

from llmprobe.demo.server import VllmServer

pytestmark = pytest.mark.integration

_SLEEP_SECONDS = 0.02  # between steps of a few milliseconds
_TOKENS = 40


@pytest.fixture(scope="module")
def seconds_per_token(slow_server: VllmServer) -> Iterator[list[float]]:
    """Of each request of a load that goes on meanwhile, as its client has it."""
    tell_delay(slow_server, _SLEEP_SECONDS)
    taken: list[float] = []
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            begin = time.monotonic()
            complete(slow_server, [100] * 20, _TOKENS)
            taken.append((time.monotonic() - begin) / _TOKENS)

    thread = threading.Thread(target=load)
    thread.start()
    yield taken
    ended.set()
    thread.join()
    tell_delay(slow_server, 0)


def test_a_host_that_sleeps_between_steps_is_what_the_verdict_names(
    slow_server: VllmServer, seconds_per_token: list[float]
) -> None:
    def host_bound() -> Any:
        servers = get_json(f"{slow_server.agent_url}/api/status")["servers"]
        (entry,) = (one for one in servers if one["server"] == f"vllm-{slow_server.port}")
        decode = entry["verdicts"].get("decode", {})
        named = decode.get("bottleneck") == "sync_bound" and decode["cause"] == "host_between_steps"
        # A figure of a window that the load fills.
        return entry if named and decode["share_ratio"] > 0.9 and decode["held_seconds"] > 0 else None

    entry = until(host_bound, "the verdict on a slow host")
    decode = entry["verdicts"]["decode"]
    assert decode["confidence"] > 0.5
    waited = {item["quantity"]: item["value"] for item in decode["evidence"]}["sync_gap_ratio"]
    # A sleep is never shorter than asked for, and no step takes longer than its client saw: this share of
    # the time is waiting at the least, whatever the machine does.
    assert waited > 0.95 * _SLEEP_SECONDS / max(seconds_per_token)
    assert entry["headline"].startswith("Decode sync-bound")
    # This vLLM's worker has a process of its own: what schedules is seen all the same, as part of the rank's
    # host, and its CPU time is told beside that of the front end.
    (rank,) = entry["ranks"]
    assert rank["host"]["core_apart"]
    of_core = [thread["name"] for thread in rank["host"]["threads"] if thread["of_core"]]
    assert of_core[0].startswith("VLLM::EngineCor"), rank["host"]
    assert set(entry["host_cpu_seconds"]) == {"frontend", "engine_core"}
    assert all(entry["host_cpu_seconds"].values())
    assert entry["advice"]["decode"]
