"""llmprobe's families on vLLM's own /metrics."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from export.views_for_tests import engine, rank, server
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from llmprobe.agent.exposition import ExpositionFiles, encode
from llmprobe.agent.files import write_atomically
from llmprobe.collect.views import ServerView
from llmprobe.export.prometheus import ViewCollector
from llmprobe.hooks.naming import GROUP_VARIABLE
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import endpoint
from llmprobe.hooks.vllm.endpoint import FileCollector, decode
from llmprobe.record.agent_launch import exposition_path
from llmprobe.settings import Settings

VIEW = dataclasses.replace(
    server('a \\ "quoted"\nname é', engines=[engine(), engine(engine=1)], ranks=[rank(), rank(rank=1)]),
    own_label="vllm-here",
)


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    monkeypatch.setenv(GROUP_VARIABLE, VIEW.group)
    return Probe(
        Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path), "LLMPROBE_SERVER": "vllm-here"})
    )


@pytest.fixture
def path(probe: Probe) -> Path:
    found = exposition_path(probe.settings.directory, VIEW.group, "vllm-here")
    found.parent.mkdir(parents=True)
    return found


def registry(collector: Any) -> CollectorRegistry:
    made = CollectorRegistry(auto_describe=False)
    made.register(collector)
    return made


def of(view: ServerView) -> CollectorRegistry:
    return registry(ViewCollector(lambda: [view]))


def test_the_page_has_the_lines_of_the_agents_page(probe: Probe) -> None:
    files = ExpositionFiles(probe.settings.directory)
    files.start()
    files.write([VIEW])
    page = registry(FileCollector(probe))
    assert b"llmprobe_tokens_total{" in generate_latest(page)
    assert b"llmprobe_step_duration_seconds_bucket{" in generate_latest(page)
    assert generate_latest(page) == generate_latest(of(VIEW))
    assert generate_openmetrics(page) == generate_openmetrics(of(VIEW))
    assert not probe.guard.errors


def test_an_unchanged_file_is_read_once_and_a_new_one_again(
    probe: Probe, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(endpoint, "decode", lambda data: decoded.append(data) or decode(data))
    collector = FileCollector(probe)
    write_atomically(path, encode(VIEW))
    assert list(collector.collect()) == list(collector.collect())
    assert len(decoded) == 1
    changed = server("b")
    write_atomically(path, encode(changed))
    assert generate_latest(registry(collector)) == generate_latest(of(changed))
    assert len(decoded) == 2


def test_a_file_that_was_read_goes_stale(probe: Probe, path: Path) -> None:
    collector = FileCollector(probe)
    write_atomically(path, encode(VIEW))
    assert list(collector.collect())
    old = time.time() - 11
    os.utime(path, (old, old))
    assert list(collector.collect()) == []


def test_without_a_file_there_is_nothing_and_no_error(probe: Probe, path: Path) -> None:
    collector = FileCollector(probe)
    assert list(collector.collect()) == []
    write_atomically(path, encode(VIEW))
    assert list(collector.collect())
    path.unlink()
    assert list(collector.collect()) == []
    assert not probe.guard.errors


def family(**changes: Any) -> bytes:
    parts = {"name": "x", "type": "gauge", "help": "h", "labels": {"a": "b"}, "rows": [["x", None, 1.0]]}
    parts.update(changes)
    series = [[parts["labels"], parts["rows"]]]
    entry = [parts["name"], parts["type"], parts["help"], series]
    return json.dumps({"schema": 1, "families": [entry]}).encode()


def test_the_family_that_the_malformed_ones_vary_is_well_formed(probe: Probe, path: Path) -> None:
    path.write_bytes(family())
    assert b'x{a="b"} 1.0' in generate_latest(registry(FileCollector(probe)))


@pytest.mark.swallows
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"schema":1,"families":[["x"',
        family(name=1),
        family(type="nonsense"),
        family(help=None),
        family(labels=["a"]),
        family(labels={"a": 1}),
        family(rows=[["x", None, "much"]]),
        family(rows=[["x", None, None]]),
        family(rows=[["x", 0.5, 1.0]]),
        family(rows=[[None, None, 1.0]]),
        family(rows=[["x"]]),
    ],
)
def test_a_malformed_file_is_one_error_and_no_lines(probe: Probe, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    page = registry(FileCollector(probe))
    assert generate_latest(page) == b""
    assert generate_latest(page) == b""
    assert probe.guard.errors == {"vllm.metrics": 1}


def test_a_file_of_another_schema_is_left_alone(probe: Probe, path: Path) -> None:
    path.write_bytes(b'{"schema":2,"families":{}}')
    assert list(FileCollector(probe).collect()) == []
    assert not probe.guard.errors


def test_a_file_beyond_the_limit_is_not_read(
    probe: Probe, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(VIEW)
    path.write_bytes(data)
    monkeypatch.setattr(endpoint, "_LIMIT_BYTES", len(data) - 1)
    assert list(FileCollector(probe).collect()) == []
    monkeypatch.setattr(endpoint, "_LIMIT_BYTES", len(data))
    assert list(FileCollector(probe).collect())


def test_a_probe_that_is_off_shows_nothing(probe: Probe, path: Path) -> None:
    path.write_bytes(encode(VIEW))
    probe.enabled = False
    assert list(FileCollector(probe).collect()) == []
