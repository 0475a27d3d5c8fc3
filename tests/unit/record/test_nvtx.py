"""NVTX ranges: silent without a profiler, and never in the way."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmprobe.record.nvtx import ranges


class Domain:
    """What nvtx offers once a profiler listens."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def get_event_attributes(self, message: str, payload: int) -> Any:
        self.calls.append(("register", message))
        attributes = ModuleType(message)
        attributes.payload = payload  # type: ignore[attr-defined]
        return attributes

    def push_range(self, attributes: Any) -> None:
        self.calls.append(("push", attributes.__name__, attributes.payload))

    def pop_range(self) -> None:
        self.calls.append("pop")


def with_nvtx(monkeypatch: pytest.MonkeyPatch, domain: Any) -> None:
    fake = ModuleType("nvtx")
    fake.get_domain = lambda name: domain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", fake)


def test_the_installed_nvtx_is_spoken_to_without_error() -> None:
    for enabled in (True, False):
        found = ranges(enabled)
        found.begin("decode", 3)
        found.part("forward")
        found.end()


def test_a_profiler_sees_phase_and_tokens_and_each_name_is_registered_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    domain = Domain()
    with_nvtx(monkeypatch, domain)
    found = ranges(True)
    domain.calls.clear()
    for tokens in (5, 6):
        found.begin("decode", tokens)
        found.end()
    assert domain.calls == [
        ("register", "decode"),
        ("push", "decode", 5),
        "pop",
        ("push", "decode", 6),
        "pop",
    ]


def test_parts_nest_in_steps_and_steps_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamer may call generate in the middle of a step."""
    domain = Domain()
    with_nvtx(monkeypatch, domain)
    found = ranges(True)
    found.begin("decode", 1)
    found.part("forward")
    found.part("sample")
    found.begin("prefill", 9)
    found.part("forward")
    found.end()
    found.part(None)
    found.end()
    depth = deepest = 0
    for call in domain.calls:
        depth += (call[0] == "push") - (call == "pop")
        deepest = max(deepest, depth)
    assert (depth, deepest) == (0, 4)
    names = [call[1] for call in domain.calls if call[0] == "push"]
    assert names == ["arming", "decode", "forward", "sample", "prefill", "forward"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["begin", "forward", "none", "end"]), max_size=30))
def test_whatever_the_order_nothing_is_closed_that_is_not_open(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    domain = Domain()
    with_nvtx(monkeypatch, domain)
    found = ranges(True)
    for call in calls:
        if call == "begin":
            found.begin("decode", 1)
        elif call == "end":
            found.end()
        else:
            found.part("forward" if call == "forward" else None)
    depth = 0
    for call in domain.calls:
        depth += (call[0] == "push") - (call == "pop")
        assert depth >= 0
    for _ in calls:
        found.end()
    depths = [(call[0] == "push") - (call == "pop") for call in domain.calls]
    assert sum(depths) == 0


def test_switched_off_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = Domain()
    with_nvtx(monkeypatch, domain)
    ranges(False).begin("decode", 1)
    assert domain.calls == []


@pytest.mark.parametrize("broken", [None, object()])
def test_a_missing_or_unknown_nvtx_gives_silent_ranges(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    if broken is None:
        monkeypatch.setitem(sys.modules, "nvtx", None)
    else:
        with_nvtx(monkeypatch, broken)
    found = ranges(True)
    found.begin("decode", 1)
    found.part("forward")
    found.part(None)
    found.end()


def test_a_part_that_cannot_be_opened_closes_no_range_around_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A draft model's step lies inside one of the model that it drafts for."""
    domain = Domain()
    with_nvtx(monkeypatch, domain)
    found = ranges(True)
    found.begin("decode", 1)
    found.begin("draft", 1)
    domain.calls.clear()

    def refuse(attributes: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(domain, "push_range", refuse)
    with pytest.raises(RuntimeError):
        found.part("forward")
    found.end()
    assert domain.calls.count("pop") == 1
    found.end()
    assert domain.calls.count("pop") == 2
