"""What is wrapped round vLLM's front end calls it as before, whatever becomes of our part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import frontend_hooks
from llmprobe.settings import Settings

REQUEST = SimpleNamespace(request_id="a")


class OutputProcessor:
    """As vLLM's."""

    request_states: Any = frozenset()

    def add_request(self, request: Any, prompt: Any) -> str:
        return f"added {request.request_id}"

    def process_outputs(self, outputs: Any, made: float, iteration: Any) -> str:
        return "processed"

    def abort_requests(self, ids: Any) -> Any:
        return ids


class StatLoggerManager:
    """As vLLM's."""

    def __init__(self) -> None:
        pass

    def record(self, scheduler_stats: Any, iteration_stats: Any, engine_idx: int = 0) -> str:
        return "recorded"


CALLS: dict[str, Callable[[], Any]] = {
    "arrived": lambda: OutputProcessor().add_request(REQUEST, "prompt"),
    "outputs": lambda: OutputProcessor().process_outputs([], 1.5, None),
    "aborted": lambda: OutputProcessor().abort_requests(["a"]),
    "record": lambda: StatLoggerManager.__new__(StatLoggerManager).record(None, None, engine_idx=0),
}
RESULTS = {"arrived": "added a", "outputs": "processed", "aborted": ["a"], "record": "recorded"}


class Told:
    """In the place of a `FrontEnd`: which of its methods were called."""

    def __init__(self, broken: bool = False) -> None:
        self.methods: list[str] = []
        self._broken = broken

    def __getattr__(self, name: str) -> Callable[..., None]:
        def called(*arguments: Any) -> None:
            self.methods.append(name)
            if self._broken:
                raise RuntimeError("broken on purpose")

        return called


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Probe]:
    made = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    made.armed = True
    frontend_hooks.install_output_processor(made, SimpleNamespace(OutputProcessor=OutputProcessor))  # type: ignore[arg-type]
    frontend_hooks.install_stat_loggers(made, SimpleNamespace(StatLoggerManager=StatLoggerManager))  # type: ignore[arg-type]
    yield made
    made.remove_patches()


@pytest.mark.parametrize("method", CALLS)
def test_each_call_is_told(probe: Probe, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr(frontend_hooks, "_front_end", told)
    assert CALLS[method]() == RESULTS[method]
    assert told.methods == [method]


@pytest.mark.swallows
@pytest.mark.parametrize("method", CALLS)
def test_an_error_of_ours_does_not_reach_the_caller(
    probe: Probe, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend_hooks, "_front_end", Told(broken=True))
    assert CALLS[method]() == RESULTS[method]
    assert sum(probe.guard.errors.values()) == 1


@pytest.mark.swallows
def test_a_request_that_vllm_keeps_otherwise_is_taken_in_all_the_same(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(frontend_hooks, "_front_end", told)
    monkeypatch.setattr(OutputProcessor, "request_states", None)
    assert CALLS["arrived"]() == "added a"
    assert sum(probe.guard.errors.values()) == 1


@pytest.mark.parametrize("state", ["off", "inert", "not armed", "no front end"])
@pytest.mark.parametrize("method", CALLS)
def test_nothing_is_told_while_the_probe_is_not_at_work(
    probe: Probe, method: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(frontend_hooks, "_front_end", None if state == "no front end" else told)
    if state == "off":
        probe.enabled = False
    elif state == "inert":
        probe.guard.inert = True
    elif state == "not armed":
        probe.armed = False
    assert CALLS[method]() == RESULTS[method]
    assert told.methods == []
