"""A front end says whether its process holds an engine's core too, and a worker which process does."""

from __future__ import annotations

import ast
import importlib.util
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import engine_core
from llmprobe.settings import Settings


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(engine_core, "_inside", None)
    made = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    yield made
    made.remove_patches()
    made.disarm()


def module() -> Any:
    class InprocClient:
        def __init__(self, config: Any) -> None:
            self.config = config

    return SimpleNamespace(InprocClient=InprocClient)


def test_a_core_in_the_process_is_noted_before_its_front_end_is_there(probe: Probe) -> None:
    vllm = module()
    engine_core.install(probe, vllm)
    assert engine_core.inside() is False
    assert vllm.InprocClient("config").config == "config"
    assert engine_core.inside() is True


def test_a_program_whose_second_engine_is_inside_says_so_of_the_first_ones_front_end_too(
    probe: Probe,
) -> None:
    vllm = module()
    engine_core.install(probe, vllm)
    recorder = probe.arm("frontend", lambda: {"role": "frontend", engine_core.FACT: engine_core.inside()})
    assert recorder is not None
    assert recorder.facts[engine_core.FACT] is False
    vllm.InprocClient("config")
    assert recorder.facts[engine_core.FACT] is True


def test_a_vllm_that_names_it_otherwise_says_nothing(probe: Probe) -> None:
    engine_core.install(probe, SimpleNamespace())
    assert engine_core.inside() is None


def tell(answers: Any, backend: object) -> None:
    answers.put(engine_core.pid_of_parent(SimpleNamespace(distributed_executor_backend=backend)))


@pytest.mark.parametrize(
    ("method", "backend", "told"),
    [
        ("fork", "mp", True),
        ("spawn", "mp", True),
        # Its parent is the server of forks, which schedules nothing.
        ("forkserver", "mp", False),
        # The core's own process, started by the front end; and workers of Ray's.
        ("fork", "uni", False),
        ("fork", "ray", False),
        ("fork", SimpleNamespace, False),
    ],
)
def test_a_worker_tells_which_process_started_it(method: Any, backend: object, told: bool) -> None:
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    worker = context.Process(target=tell, args=(answers, backend))
    worker.start()
    assert answers.get() == (os.getpid() if told else None)
    worker.join()


def test_a_worker_that_nobody_started_tells_of_no_core() -> None:
    assert engine_core.pid_of_parent(SimpleNamespace(distributed_executor_backend="mp")) is None
    assert engine_core.pid_of_parent(SimpleNamespace()) is None


def test_it_is_a_class_of_vllm() -> None:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((Path(vllm.origin).parent / "v1/engine/core_client.py").read_text())
    (client,) = (node for node in tree.body if getattr(node, "name", "") == "InprocClient")
    assert isinstance(client, ast.ClassDef)
    assert any(getattr(node, "name", "") == "__init__" for node in client.body)
