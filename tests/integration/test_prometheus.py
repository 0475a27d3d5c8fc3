"""A real Prometheus scrapes the agent of a real vLLM, and every panel of the dashboard has data."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import complete
from waiting import until

from llmprobe.demo.server import VllmServer
from llmprobe.export.catalogue import SECTIONS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "integrations/grafana/dashboards/llmprobe.json"
PROMETHEUS_CONFIG = ROOT / "integrations/prometheus/prometheus.yml"
#: Families that only a rank on a GPU has.
ON_GPU = {
    family.name for section in SECTIONS if section.title in ("GPU", "Kernels") for family in section.families
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


@contextlib.contextmanager
def process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is gone when the block ends."""
    child = subprocess.Popen(command, **options)
    try:
        yield child
    finally:
        if child.stdin is not None:
            child.stdin.close()
        else:
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@pytest.fixture(scope="module")
def engine(server: VllmServer) -> Iterator[str]:
    """A real vLLM under a mixed load; its ``server`` label."""
    ended = threading.Event()

    def load(number: int) -> None:
        while not ended.is_set():
            complete(server, [10 + number] * (20 + 40 * number), 30)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    yield f"vllm-{server.port}"
    ended.set()
    for thread in threads:
        thread.join()


@pytest.fixture(scope="module")
def target(server: VllmServer) -> str:
    """``host:port`` to scrape."""
    return server.agent_url.removeprefix("http://")


@pytest.fixture(scope="module")
def prometheus(target: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a Prometheus with our own scrape example, its target and interval exchanged."""
    binary = shutil.which("prometheus")
    assert binary, "this test needs Prometheus: `apt-get install prometheus`, or put its binary on PATH"
    folder = tmp_path_factory.mktemp("prometheus")
    config = PROMETHEUS_CONFIG.read_text()
    for ours, here in (
        ('"127.0.0.1:9480"', f'"{target}"'),
        ("scrape_interval: 5s", "scrape_interval: 1s"),
        ("scrape_timeout: 4s", "scrape_timeout: 1s"),
    ):
        assert ours in config
        config = config.replace(ours, here)
    (folder / "prometheus.yml").write_text(config)
    port = free_port()
    command = [
        binary,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with process(command):
        base = f"http://127.0.0.1:{port}"
        until(lambda: urllib.request.urlopen(f"{base}/-/ready", timeout=5), "Prometheus")
        yield base


def query(base: str, expression: str) -> list[dict[str, Any]]:
    answer = get_json(f"{base}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
    assert answer["status"] == "success"
    return [row for row in answer["data"]["result"] if row["value"][1] != "NaN"]


def panel_queries(server: str) -> list[tuple[str, str]]:
    """(panel title, expression), with the dashboard's variables filled in as Grafana would."""
    filled = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for aim in panel.get("targets", ()):
            expression = aim["expr"]
            for variable, value in {
                "$server": re.escape(server).replace("\\", "\\\\"),
                "$model_name": ".*",
                "$__rate_interval": "10s",
            }.items():
                expression = expression.replace(variable, value)
            assert "$" not in expression
            filled.append((panel["title"], expression))
    return filled


def asks_for_a_gpu(expression: str) -> bool:
    return not ON_GPU.isdisjoint(re.findall(r"\bllmprobe_\w+", expression))


def test_prometheus_scrapes_the_agent_without_complaint(prometheus: str) -> None:
    def scraped() -> dict[str, Any] | None:
        targets = get_json(f"{prometheus}/api/v1/targets")["data"]["activeTargets"]
        return next((target for target in targets if target["health"] != "unknown"), None)

    assert until(scraped, "scrape")["lastError"] == ""


def test_every_panel_has_data(prometheus: str, engine: str) -> None:
    queries = panel_queries(engine)
    assert len(queries) > 30
    (found, *_) = until(lambda: query(prometheus, "llmprobe_hook_info"), "engine")
    if found["metric"]["clock"] != "cuda":
        queries = [item for item in queries if not asks_for_a_gpu(item[1])]
    waiting = dict.fromkeys(queries)

    def all_answered() -> bool:
        for item in list(waiting):
            if query(prometheus, item[1]):
                del waiting[item]
        return not waiting

    try:
        until(all_answered, "data behind every panel")
    except pytest.fail.Exception:
        pytest.fail("no data behind: " + "; ".join(f"{title}: {expr}" for title, expr in waiting))


def test_on_a_cpu_nothing_is_said_about_a_gpu(prometheus: str, engine: str) -> None:
    (found, *_) = until(lambda: query(prometheus, "llmprobe_hook_info"), "engine")
    if found["metric"]["clock"] == "cuda":
        pytest.skip("this engine runs on a GPU")
    assert any(asks_for_a_gpu(expression) for _, expression in panel_queries(engine))
    assert query(prometheus, '{__name__=~"llmprobe_gpu_.*"}') == []


def test_template_variables_find_the_server(prometheus: str, engine: str) -> None:
    def values() -> list[str]:
        url = f"{prometheus}/api/v1/label/server/values?match[]=llmprobe_figure_available"
        return list(get_json(url)["data"])

    assert engine in until(values, "server label")


def test_components_add_up_to_wall_time(prometheus: str, engine: str) -> None:
    expression = f'sum(rate(llmprobe_device_time_seconds_total{{server="{engine}"}}[15s]))'

    def share() -> bool:
        rows = query(prometheus, expression)
        return bool(rows) and float(rows[0]["value"][1]) == pytest.approx(1, abs=0.1)

    until(share, "whole second accounted for in every second")
