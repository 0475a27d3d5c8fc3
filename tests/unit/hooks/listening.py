"""A profiler that listens, as nvtx shows it: it counts the ranges that are open."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class Domain:
    """What nvtx offers once a profiler is attached."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, int]] = []  #: name and payload of every range

    def get_event_attributes(self, message: str, payload: int) -> Any:
        attributes = ModuleType(message)
        attributes.payload = payload  # type: ignore[attr-defined]
        return attributes

    def push_range(self, attributes: Any) -> None:
        self.open.append(attributes.__name__)
        self.seen.append((attributes.__name__, attributes.payload))

    def pop_range(self) -> None:
        self.open.pop()


def listen(monkeypatch: pytest.MonkeyPatch) -> Domain:
    """From now on ranges go to the domain that is returned."""
    domain, nvtx = Domain(), ModuleType("nvtx")
    nvtx.get_domain = lambda name: domain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    return domain
