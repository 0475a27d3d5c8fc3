"""The files for vLLM's own /metrics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from llmprobe.agent.exposition import ExpositionFiles
from llmprobe.collect.views import ServerView
from llmprobe.record.agent_launch import exposition_path

VIEW = ServerView(
    server="s",
    model_name="m",
    group="g/../1",
    framework="vllm",
    framework_version="0",
    started=0.0,
    armed=True,
    inert=False,
    flags={},
    engines=[],
    ranks=[],
    missing={},
    notes=[],
    own_label="s",
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def made(tmp_path: Path) -> tuple[ExpositionFiles, Clock]:
    clock = Clock()
    files = ExpositionFiles(tmp_path, clock)
    files.start()
    return files, clock


def test_a_group_id_never_leaves_the_folder(tmp_path: Path) -> None:
    assert exposition_path(tmp_path, "../../etc/x", "../y").parent == tmp_path / "exposition"


def test_each_vllm_server_has_its_own_file(tmp_path: Path) -> None:
    files, _ = made(tmp_path)
    other = dataclasses.replace(VIEW, server="t", group="h")
    # Started from one environment: the same group, another port.
    sibling = dataclasses.replace(VIEW, server="u", own_label="u")
    program = dataclasses.replace(VIEW, server="p", group="i", framework="transformers")
    files.write([VIEW, other, sibling, program])
    document = json.loads(exposition_path(tmp_path, "g/../1", "s").read_text())
    servers = {
        labels["server"] for *_, series in document["families"] for labels, _ in series if "server" in labels
    }
    assert servers == {"s"}
    assert len(list((tmp_path / "exposition").iterdir())) == 3


def test_a_server_that_is_gone_takes_its_file_along(tmp_path: Path) -> None:
    files, clock = made(tmp_path)
    files.write([VIEW])
    clock.now += 60
    files.write([])
    assert list((tmp_path / "exposition").iterdir()) == []


def test_slow_writing_is_done_less_often(tmp_path: Path) -> None:
    files, clock = made(tmp_path)
    path = exposition_path(tmp_path, VIEW.group, "s")
    slow = iter([0.0, 0.01])  # begun, ended
    files._clock = lambda: next(slow)  # type: ignore[assignment]
    files.write([VIEW])
    path.unlink()
    files._clock = clock
    clock.now = 1.9
    files.write([VIEW])
    assert not path.exists()
    clock.now = 2.1
    files.write([VIEW])
    assert path.exists()


def test_leftovers_of_an_agent_before_are_removed(tmp_path: Path) -> None:
    files, _ = made(tmp_path)
    files.write([VIEW])
    again, _ = made(tmp_path)
    assert list((tmp_path / "exposition").iterdir()) == []
    again.remove()
    assert not (tmp_path / "exposition").exists()
