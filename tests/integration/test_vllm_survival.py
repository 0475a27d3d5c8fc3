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

import numpy as np
import psutil
import pytest
from engine import complete, get, get_json, metrics, readers, until, value

from llmprobe.demo.server import VllmServer
from llmprobe.record.agent_launch import agent_info, agent_running

pytestmark = pytest.mark.integration


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 500, count).tolist()


@pytest.fixture(scope="module")
def server(vllm_server: object) -> VllmServer:
    assert callable(vllm_server)
    started: VllmServer = vllm_server()
    return started


class Load(threading.Thread):
    """Requests one after another until stopped; remembers what failed."""

    def __init__(self, server: VllmServer) -> None:
        super().__init__()
        self.server = server
        self.done = 0
        self.failures: list[Exception] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                complete(self.server, tokens(self.done, 12), 20)
                self.done += 1
            except Exception as error:
                self.failures.append(error)
                return

    def __enter__(self) -> Load:
        self.start()
        until(lambda: self.done >= 2, "the first requests")
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.join()


def generated(url: str) -> float:
    return value(metrics(f"{url}/metrics"), "llmprobe_tokens_total", kind="generated")


def device_time(url: str) -> float:
    return value(metrics(f"{url}/metrics"), "llmprobe_device_time_seconds_total")


def cli(server: VllmServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLMPROBE_DIR": str(server.directory)}
    command = [str(Path(sys.executable).with_name("llmprobe")), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_an_agent_killed_under_load_is_replaced_and_counters_go_on(server: VllmServer) -> None:
    with Load(server) as load:
        until(lambda: generated(server.agent_url) > 0, "tokens in the metrics")
        time.sleep(6)  # a checkpoint is written every five seconds
        tokens_before, time_before = generated(server.agent_url), device_time(server.agent_url)
        killed = agent_info(server.directory)
        assert killed is not None
        os.kill(int(killed["pid"]), signal.SIGKILL)
        done = load.done
        assert "vllm:" in get(f"{server.url}/metrics")  # at once, with the agent dead
        until(lambda: load.done > done + 2, "requests after the agent's death")
        until(
            lambda: (info := agent_info(server.directory)) and info["pid"] != killed["pid"], "a new agent", 30
        )
        server.wait_agent()
        until(lambda: "llmprobe_tokens_total" in get(f"{server.agent_url}/metrics"), "metrics again")
        assert generated(server.agent_url) >= tokens_before
        assert device_time(server.agent_url) >= time_before
    assert not load.failures


def test_metrics_of_a_server_whose_agent_is_dead_are_vllms_alone(server: VllmServer) -> None:
    info = agent_info(server.directory)
    assert info is not None
    path = server.directory / "exposition"
    for file in path.glob("*.json"):
        os.utime(file, (0, 0))  # as left by an agent that died long ago
    os.kill(int(info["pid"]), signal.SIGSTOP)
    try:
        text = get(f"{server.url}/metrics")
        assert "vllm:num_requests_running" in text
        assert "llmprobe_device_time" not in text
    finally:
        os.kill(int(info["pid"]), signal.SIGCONT)


def test_off_restores_the_engines_methods_and_on_brings_them_back(server: VllmServer) -> None:
    worker = next(reader for reader in readers(server.directory, "worker") if reader.alive())
    complete(server, tokens(1, 10), 5)
    assert cli(server, "off").returncode == 0
    time.sleep(0.5)
    worker.read()
    before = worker.counters()
    complete(server, tokens(2, 10), 20)
    time.sleep(0.6)
    worker.read()
    assert worker.counters() == before
    status = json.loads(cli(server, "status", "--json").stdout)
    assert [s["armed"] for s in status["servers"]] == [False]
    switched = cli(server, "on")
    assert switched.returncode == 0, switched.stderr
    assert ": on" in switched.stdout
    complete(server, tokens(3, 10), 5)
    until(lambda: worker.read() and worker.counters()["steps_decode"] > before["steps_decode"], "steps again")


def test_switching_a_server_that_is_not_there_names_those_that_are(server: VllmServer) -> None:
    answer = cli(server, "off", "nonsense")
    assert answer.returncode == 1
    assert f"no server 'nonsense'; running: vllm-{server.port}" in answer.stderr


def test_status_shows_the_server_for_people_and_machines(server: VllmServer) -> None:
    complete(server, tokens(4, 10), 20)
    time.sleep(1)
    screen = cli(server, "status").stdout
    assert f"vllm-{server.port}" in screen
    assert re.search(r"decode +[\d.]+ ", screen)
    assert server.agent_url in screen


def test_two_servers_on_a_node_show_side_by_side_with_a_tiny_cache_preempting(
    server: VllmServer, vllm_server: object
) -> None:
    assert callable(vllm_server)
    other: VllmServer = vllm_server(
        "--num-gpu-blocks-override", "14", "--api-server-count", "2", "--max-model-len", "384",
        "--block-size", "32", "--no-enable-prefix-caching",
        env={"LLMPROBE_DIR": str(server.directory)},
        agent=False,
    )  # fmt: skip
    name = f"vllm-{other.port}"
    threads = [threading.Thread(target=complete, args=(other, tokens(n, 60), 120)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def both() -> bool:
        shown = {s["server"]: s for s in get_json(f"{server.agent_url}/api/status")["servers"]}
        return {name, f"vllm-{server.port}"} <= set(shown) and shown[name]["engines"][0]["requests"] == 4

    until(both, "both servers in the status")
    samples = metrics(f"{server.agent_url}/metrics")
    assert value(samples, "llmprobe_preemptions_total", server=name) > 0
    assert value(samples, "llmprobe_tokens_total", server=name, kind="generated") == 4 * 120
    assert value(samples, "llmprobe_tokens_total", server=name, kind="prompt") == 4 * 60
    worker = next(
        reader for reader in readers(server.directory, "worker") if reader.facts()["server"] == name
    )
    steps = worker.read().steps
    # Preempted requests compute their prompt, and what they had generated, again: prefill, not decode.
    assert steps["prompt_tokens"].sum() > 4 * 60
    assert steps["decode_tokens"].max() <= 4
    # Both API servers answer a scrape with our families, each the same.
    for _ in range(4):
        until(lambda: f'server="{name}"' in get(f"{other.url}/metrics"), "our families")
    # vLLM's own page shows only its own server.
    assert f'server="vllm-{server.port}"' not in get(f"{other.url}/metrics")
    other.stop_server_only()

    def gone() -> bool:
        return name not in {s["server"] for s in get_json(f"{server.agent_url}/api/status")["servers"]}

    until(gone, "the stopped server's leaving")
    assert name not in get(f"{server.agent_url}/metrics")


def test_a_worker_killed_leaves_the_agent_and_takes_its_series(server: VllmServer) -> None:
    agent = agent_info(server.directory)
    assert agent is not None
    worker = next(reader for reader in readers(server.directory, "worker") if reader.alive())
    complete(server, tokens(5, 10), 5)
    until(lambda: worker.progress(), "a step")
    pid = worker.facts()["pid"]
    psutil.Process(pid).kill()
    until(lambda: not worker.alive(), "the worker's death")
    steps = worker.read().steps
    assert len(steps)  # the journal reads on
    until(
        lambda: "llmprobe_device_time_seconds_total{" not in get(f"{server.agent_url}/metrics"),
        "the leaving of the series",
    )
    assert agent_running(server.directory)
    assert agent_info(server.directory)["pid"] == agent["pid"]  # type: ignore[index]
