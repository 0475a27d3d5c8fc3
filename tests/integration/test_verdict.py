"""A real vLLM under load is judged, with evidence, on every way that people read it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import complete, get_json, metrics
from waiting import PATIENCE_SECONDS

from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import BOTTLENECKS, IDLE, SYNC, UNKNOWN
from llmprobe.demo.server import VllmServer

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def judged(server: VllmServer) -> Iterator[dict[str, Any]]:
    """The server's entry in /api/status once decoding under load has a verdict."""
    ended = threading.Event()

    def load(number: int) -> None:
        while not ended.is_set():
            complete(server, [100 + number] * 40, 60)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    entry: dict[str, Any] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        (entry,) = get_json(f"{server.agent_url}/api/status")["servers"]
        if entry["verdicts"].get("decode", {}).get("bottleneck", IDLE) not in (IDLE, UNKNOWN):
            break
        time.sleep(0.5)
    yield entry
    ended.set()
    for thread in threads:
        thread.join()


def test_decoding_gets_a_class_with_evidence_and_confidence(judged: dict[str, Any]) -> None:
    decode = judged["verdicts"]["decode"]
    # Which one depends on the machine: the host between steps of a tiny model, or its operators.
    assert decode["bottleneck"] in set(BOTTLENECKS) - {IDLE, UNKNOWN}, decode
    assert decode["clock"] == "host"
    assert 0 < decode["confidence"] <= 0.6
    quantities = {item["quantity"]: item for item in decode["evidence"]}
    assert {"sync_gap_ratio", "mbu_busy", "mfu_busy"} <= set(quantities)
    assert decode["reason"] in judged["headline"]


def test_its_figures_bear_the_class_out(judged: dict[str, Any]) -> None:
    decode = judged["verdicts"]["decode"]
    seen = {item["quantity"]: item["value"] for item in decode["evidence"]}
    edge, band = Thresholds().sync_gap_ratio, Thresholds().band_ratio  # what stands is favoured
    if decode["bottleneck"] == SYNC:
        assert seen["sync_gap_ratio"] >= edge * (1 - band)
    else:
        assert seen["sync_gap_ratio"] < edge * (1 + band)
    parts = judged["ranks"][0]["attribution"]["decode"]
    assert sum(parts["seconds"].values()) == pytest.approx(parts["total_seconds"])
    assert parts["seconds"]["memory.linear"] + parts["seconds"]["compute.linear"] > 0


def test_the_engines_process_is_watched(judged: dict[str, Any]) -> None:
    host = judged["ranks"][0]["host"]
    assert host["threads"][0]["cpu_ratio"] > 0.01
    assert host["cpus_allowed"] >= 1


def test_the_front_ends_process_is_watched_and_has_time_left(judged: dict[str, Any]) -> None:
    """Unlike the engine's, its threads do not spin while they wait."""
    (engine,) = judged["engines"]
    busiest = engine["front_end"]["threads"][0]
    assert 0 < busiest["cpu_ratio"] < judged["ranks"][0]["host"]["threads"][0]["cpu_ratio"]
    front = judged["pressure"]["front_end"]
    assert busiest["cpu_ratio"] <= front["value"] <= 1
    assert front["text"].startswith("the front end's thread ")
    assert judged["flags"]["api_server_count"] == judged["flags"]["stream_interval"] == 1


def test_advice_names_the_next_look(judged: dict[str, Any]) -> None:
    assert judged["advice"]["decode"][0]["look"]


def test_exactly_one_class_is_exposed_and_its_seconds_grow(
    server: VllmServer, judged: dict[str, Any]
) -> None:
    shown = metrics(f"{server.agent_url}/metrics")
    decode = {
        dict(labels)["bottleneck"]: value
        for (name, labels), value in shown.items()
        if name == "llmprobe_bottleneck" and dict(labels)["phase"] == "decode"
    }
    assert set(decode) == set(BOTTLENECKS)
    assert sorted(decode.values())[-2:] == [0, 1]
    seconds = sum(
        value
        for (name, labels), value in shown.items()
        if name == "llmprobe_bottleneck_seconds_total" and dict(labels)["phase"] == "decode"
    )
    assert seconds > 1


def test_status_shows_the_headline_first(server: VllmServer, judged: dict[str, Any]) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("llmprobe")), "status"],
        env={**os.environ, "LLMPROBE_DIR": str(server.directory), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    # With a colon where nothing can be said at this moment.
    assert done.stdout.partition(" ")[0].rstrip(":") in ("Decode", "Mixed", "Prefill", "SLOW")
    assert "decode " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
