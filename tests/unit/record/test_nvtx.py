"""NVTX ranges: silent without a profiler, and never in the way."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

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
        found.push("decode", 3)
        found.pop()


def test_a_profiler_sees_phase_and_tokens_and_each_name_is_registered_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    domain = Domain()
    with_nvtx(monkeypatch, domain)
    found = ranges(True)
    domain.calls.clear()
    for tokens in (5, 6):
        found.push("decode", tokens)
        found.pop()
    assert domain.calls == [
        ("register", "decode"),
        ("push", "decode", 5),
        "pop",
        ("push", "decode", 6),
        "pop",
    ]


def test_switched_off_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = Domain()
    with_nvtx(monkeypatch, domain)
    ranges(False).push("decode", 1)
    assert domain.calls == []


@pytest.mark.parametrize("broken", [None, object()])
def test_a_missing_or_unknown_nvtx_gives_silent_ranges(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    if broken is None:
        monkeypatch.setitem(sys.modules, "nvtx", None)
    else:
        with_nvtx(monkeypatch, broken)
    found = ranges(True)
    found.push("decode", 1)
    found.pop()
