"""The wrappers round a worker's methods: whatever worker vLLM has, its calls go through as they were made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import worker as hooks
from llmprobe.settings import Settings


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Probe]:
    made = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    yield made
    made.remove_patches()


def installed(probe: Probe) -> tuple[type, list[Any]]:
    """A class of workers with our wrappers, and what its methods were called with."""
    calls: list[Any] = []

    class WorkerBase:
        def __init__(self) -> None:
            pass

        def execute_model(self, scheduler_output: Any) -> str:
            calls.append(scheduler_output)
            if scheduler_output == "too large":
                raise MemoryError
            return "output"

        def sample_tokens(self, grammar_output: Any, *, later: bool = False) -> bool:  # as none is yet
            calls.append(grammar_output)
            return later

    module = ModuleType("vllm.v1.worker.worker_base")
    vars(module)["WorkerBase"] = WorkerBase
    hooks.install(probe, module)
    return WorkerBase, calls


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hooks of `execute_model` and `sample_tokens` are told."""
    seen: list[Any] = []

    def around(where: str, parameter: str) -> Any:
        return hooks._around(
            where,
            parameter,
            lambda state, argument: seen.append(argument),
            lambda state, output: seen.append(output),
        )

    monkeypatch.setitem(hooks._WRAPPERS, "execute_model", around("execute", "scheduler_output"))
    monkeypatch.setitem(hooks._WRAPPERS, "sample_tokens", around("sample", "grammar_output"))
    return seen


@pytest.mark.parametrize("named", [False, True])
def test_arguments_may_come_by_place_or_by_name(probe: Probe, watched: list[Any], named: bool) -> None:
    made, calls = installed(probe)
    worker = made()
    worker._llmprobe_steps.armed = True
    output = worker.execute_model(scheduler_output="batch") if named else worker.execute_model("batch")
    assert output == "output"
    assert calls == ["batch"]
    assert watched == ["batch", "output"]


@pytest.mark.parametrize("named", [False, True])
def test_a_method_with_more_parameters_than_known_keeps_them(
    probe: Probe, watched: list[Any], named: bool
) -> None:
    made, calls = installed(probe)
    worker = made()
    worker._llmprobe_steps.armed = True
    if named:
        assert worker.sample_tokens(grammar_output="grammar", later=True) is True
    else:
        assert worker.sample_tokens("grammar", later=True) is True
    assert calls == ["grammar"]
    assert watched == ["grammar", True]


def test_a_worker_that_was_there_before_goes_unwatched(probe: Probe, watched: list[Any]) -> None:
    made, calls = installed(probe)
    earlier = object.__new__(made)
    made()  # only now are the methods wrapped
    assert earlier.execute_model("batch") == "output"
    assert calls == ["batch"]
    assert watched == []


def test_an_inert_probe_only_passes_calls_on(probe: Probe, watched: list[Any]) -> None:
    made, _ = installed(probe)
    worker = made()
    worker._llmprobe_steps.armed = True
    probe.guard.inert = True
    assert worker.execute_model("batch") == "output"
    assert watched == []


def test_what_the_worker_raises_reaches_vllm(probe: Probe, watched: list[Any]) -> None:
    made, _ = installed(probe)
    worker = made()
    worker._llmprobe_steps.armed = True
    with pytest.raises(MemoryError) as raised:
        worker.execute_model("too large")
    assert raised.value.__context__ is None
    assert worker.execute_model("batch") == "output"
    assert watched == ["too large", "batch", "output"]


def test_nothing_is_left_on_workers_when_the_probe_is_taken_out(probe: Probe) -> None:
    made, _ = installed(probe)
    worker, gone = made(), made()
    steps = worker._llmprobe_steps
    steps.armed = True
    del gone
    gc.collect()
    for cleanup in probe.cleanups:
        cleanup()
    assert vars(worker) == {}
    assert not steps.armed
    assert probe.on_resumed == []
