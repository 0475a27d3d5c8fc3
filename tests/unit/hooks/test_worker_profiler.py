"""vLLM's own profiler is seen whether it runs or merely waits, in every version's words."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm.worker import _profiler_of
from llmprobe.settings import Settings


class Worker:
    def __init__(self, profiler: Any) -> None:
        self.profiler = profiler


@pytest.mark.parametrize(
    ("profiler", "runs"),
    [
        (None, False),
        (SimpleNamespace(_active=False, _running=False), False),
        (SimpleNamespace(_active=True, _running=False), True),  # started, and waits for its first step
        (SimpleNamespace(_running=True), True),
        (SimpleNamespace(is_running=True), True),
        (SimpleNamespace(is_running=lambda: False), False),
        (SimpleNamespace(), False),
    ],
)
def test_it_is_told_from_one_that_rests(profiler: Any, runs: bool) -> None:
    worker = Worker(profiler)
    assert (_profiler_of(weakref.ref(worker))() is not None) == runs


def test_a_worker_that_is_gone_has_none() -> None:
    said = _profiler_of(weakref.ref(Worker(SimpleNamespace(_active=True))))
    assert said() is None


def test_the_first_that_runs_is_named() -> None:
    probe = Probe(Settings.from_env({"LLMPROBE": "1"}))
    assert probe.running_profiler() is None
    probe.profilers += [lambda: None, lambda: "one", lambda: "two"]
    assert probe.running_profiler() == "one"
