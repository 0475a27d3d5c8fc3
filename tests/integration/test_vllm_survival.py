"""Agents that die, engines that die, switches, several front ends: the server goes on serving."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from engine import (
    Load,
    PendingOf,
    complete,
    crowd,
    get,
    get_json,
    metrics,
    readers,
    tokens,
    until,
    value,
)
from waiting import PATIENCE_SECONDS

from llmprobe.demo.server import VllmServer
from llmprobe.record.agent_launch import agent_info, agent_running
from llmprobe.record.journal_reader import JournalReader

pytestmark = pytest.mark.integration


def generated(url: str) -> float:
    return value(metrics(f"{url}/metrics"), "llmprobe_tokens_total", kind="generated")


def device_time(url: str) -> float:
    return value(metrics(f"{url}/metrics"), "llmprobe_device_time_seconds_total")


def settled(worker: JournalReader) -> dict[str, int]:
    """Its counters, once nothing that went before is still on its way into the journal."""
    seen: list[dict[str, int]] = []

    def same() -> bool:
        time.sleep(1.5)  # six times as long as steps wait to be written
        worker.read()
        seen.append(worker.counters())
        return seen[-2:-1] == seen[-1:]

    until(same, "rest in the journal")
    return seen[-1]


def cli(server: VllmServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLMPROBE_DIR": str(server.directory)}
    command = [str(Path(sys.executable).with_name("llmprobe")), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def killed_crowd_leaves_nothing_pending(server: VllmServer, directory: Path | None = None) -> None:
    """Every front end that was asked something says that nothing is pending, once the client was killed."""
    pending = PendingOf(server, directory)
    client = crowd(server)
    try:
        until(lambda: all(pending.all()), "requests at every front end")
    finally:
        client.kill()
        client.wait()
    until(lambda: not any(pending.all()), "the end of what is pending")


def idle_parts(server: VllmServer) -> dict[str, float]:
    """Seconds of each component of the server's one rank so far."""
    name = f"vllm-{server.port}"
    (shown,) = (s for s in get_json(f"{server.agent_url}/api/status")["servers"] if s["server"] == name)
    parts: dict[str, float] = {}
    for of_phase in shown["ranks"][0]["device_time"].values():
        for component, seconds in of_phase.items():
            parts[component] = parts.get(component, 0.0) + seconds
    return parts


def test_two_servers_on_a_node_show_side_by_side_with_a_tiny_cache_preempting(
    slow_server: VllmServer, neighbour: VllmServer
) -> None:
    name = f"vllm-{neighbour.port}"
    threads = [threading.Thread(target=complete, args=(neighbour, tokens(n, 60), 120)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def both() -> bool:
        shown = {s["server"]: s for s in get_json(f"{slow_server.agent_url}/api/status")["servers"]}
        return {name, f"vllm-{slow_server.port}"} <= set(shown) and shown[name]["engines"][0]["requests"] == 4

    until(both, "both servers in the status")
    samples = metrics(f"{slow_server.agent_url}/metrics")
    assert value(samples, "llmprobe_preemptions_total", server=name) > 0
    assert value(samples, "llmprobe_tokens_total", server=name, kind="generated") == 4 * 120
    assert value(samples, "llmprobe_tokens_total", server=name, kind="prompt") == 4 * 60
    worker = next(
        reader for reader in readers(slow_server.directory, "worker") if reader.facts()["server"] == name
    )
    steps = worker.read().steps
    # Preempted requests compute their prompt, and what they had generated, again: prefill, not decode.
    assert steps["prompt_tokens"].sum() > 4 * 60
    assert steps["decode_tokens"].max() <= 4
    # Both API servers answer a scrape with our families, each the same.
    for _ in range(4):
        until(lambda: f'server="{name}"' in get(f"{neighbour.url}/metrics"), "our families")
    # vLLM's own page shows only its own server.
    assert f'server="vllm-{slow_server.port}"' not in get(f"{neighbour.url}/metrics")
    killed_crowd_leaves_nothing_pending(neighbour, slow_server.directory)
    neighbour.stop_server_only()

    def gone() -> bool:
        return name not in {s["server"] for s in get_json(f"{slow_server.agent_url}/api/status")["servers"]}

    until(gone, "the stopped server's leaving")
    assert name not in get(f"{slow_server.agent_url}/metrics")


def test_an_agent_killed_under_load_is_replaced_and_counters_go_on(mortal: VllmServer) -> None:
    with Load(mortal) as load:
        until(lambda: generated(mortal.agent_url) > 0, "tokens in the metrics")
        time.sleep(6)  # a checkpoint is written every five seconds
        tokens_before, time_before = generated(mortal.agent_url), device_time(mortal.agent_url)
        killed = agent_info(mortal.directory)
        assert killed is not None
        os.kill(int(killed["pid"]), signal.SIGKILL)
        done = load.done
        assert "vllm:" in get(f"{mortal.url}/metrics")  # at once, with the agent dead
        until(lambda: load.done > done + 2, "requests after the agent's death")
        until(lambda: (info := agent_info(mortal.directory)) and info["pid"] != killed["pid"], "a new agent")
        mortal.wait_agent()
        until(lambda: "llmprobe_tokens_total" in get(f"{mortal.agent_url}/metrics"), "metrics again")
        assert generated(mortal.agent_url) >= tokens_before
        assert device_time(mortal.agent_url) >= time_before
    assert not load.failures


def test_metrics_of_a_server_whose_agent_is_dead_are_vllms_alone(mortal: VllmServer) -> None:
    info = agent_info(mortal.directory)
    assert info is not None
    os.kill(int(info["pid"]), signal.SIGSTOP)
    try:
        for file in (mortal.directory / "exposition").glob("*.json"):
            os.utime(file, (0, 0))  # as left by an agent that died long ago
        text = get(f"{mortal.url}/metrics")
        assert "vllm:num_requests_running" in text
        assert "llmprobe_device_time" not in text
    finally:
        os.kill(int(info["pid"]), signal.SIGCONT)


def test_off_restores_the_engines_methods_and_on_brings_them_back(mortal: VllmServer) -> None:
    worker = next(reader for reader in readers(mortal.directory, "worker") if reader.alive())
    complete(mortal, tokens(1, 10), 5)
    assert cli(mortal, "off").returncode == 0
    before = settled(worker)
    complete(mortal, tokens(2, 10), 20)
    assert settled(worker) == before
    status = json.loads(cli(mortal, "status", "--json").stdout)
    assert [s["armed"] for s in status["servers"]] == [False]
    switched = cli(mortal, "on")
    assert switched.returncode == 0, switched.stderr
    assert ": on" in switched.stdout
    complete(mortal, tokens(3, 10), 5)
    until(lambda: worker.read() and worker.counters()["steps_decode"] > before["steps_decode"], "steps again")


def test_idle_time_after_a_killed_client_is_no_wait(mortal: VllmServer) -> None:
    killed_crowd_leaves_nothing_pending(mortal)
    idle_is_no_work(mortal)


def test_requests_that_end_while_switched_off_are_no_reason_to_wait(mortal: VllmServer) -> None:
    pending = PendingOf(mortal)
    client = crowd(mortal, max_tokens=1500)
    try:
        until(lambda: all(pending.all()), "requests")
        assert cli(mortal, "off").returncode == 0
        until(lambda: not any(pending.all()), "the end of what was pending")
    finally:
        client.kill()
        client.wait()
    running = "vllm:num_requests_running"
    until(lambda: value(metrics(f"{mortal.url}/metrics"), running) == 0, "the aborts")
    assert cli(mortal, "on").returncode == 0
    until(lambda: readers_armed(mortal), "the hooks")
    idle_is_no_work(mortal)
    assert not any(pending.all())


def readers_armed(server: VllmServer) -> bool:
    (shown,) = get_json(f"{server.agent_url}/api/status")["servers"]
    return bool(shown["armed"])


def idle_is_no_work(server: VllmServer) -> None:
    """Of idle seconds that a request ends nearly all are without work."""
    before, idle = idle_parts(server), 5.0
    time.sleep(idle)
    complete(server, tokens(6, 10), 5)

    def grown(component: str) -> float:
        return idle_parts(server)[component] - before[component]

    until(lambda: grown("no_work") > idle * 0.7, "idle time on the account")
    assert grown("host_gap") < idle * 0.3


def test_switching_a_server_that_is_not_there_names_those_that_are(mortal: VllmServer) -> None:
    answer = cli(mortal, "off", "nonsense")
    assert answer.returncode == 1
    assert f"no server 'nonsense'; running: vllm-{mortal.port}" in answer.stderr


def test_status_shows_the_server_for_people_and_machines(mortal: VllmServer) -> None:
    complete(mortal, tokens(4, 10), 20)

    def shown() -> str | None:
        screen = cli(mortal, "status").stdout
        return screen if re.search(r"decode +[\d.]+ ", screen) else None

    screen = until(shown, "figures of decode")
    assert f"vllm-{mortal.port}" in screen
    assert mortal.agent_url in screen


def test_a_worker_killed_leaves_the_agent_and_takes_its_series(mortal: VllmServer) -> None:
    agent = agent_info(mortal.directory)
    assert agent is not None
    worker = next(reader for reader in readers(mortal.directory, "worker") if reader.alive())
    complete(mortal, tokens(5, 10), 5)
    until(lambda: worker.progress(), "a step")
    pid = worker.facts()["pid"]
    psutil.Process(pid).kill()
    until(lambda: not worker.alive(), "the worker's death")
    steps = worker.read().steps
    assert len(steps)  # the journal reads on
    until(
        lambda: "llmprobe_device_time_seconds_total{" not in get(f"{mortal.agent_url}/metrics"),
        "the leaving of the series",
    )
    assert agent_running(mortal.directory)
    assert agent_info(mortal.directory)["pid"] == agent["pid"]  # type: ignore[index]
