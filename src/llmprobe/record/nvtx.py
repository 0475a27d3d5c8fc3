"""NVTX ranges around steps, so that they show by phase in nsys and other profilers.

Domain ``llmprobe``; the range's name is the phase, its payload the step's query tokens. Without a profiler
that listens, nothing is called at all.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

DOMAIN = "llmprobe"


class Ranges(Protocol):
    """Nested ranges of the calling thread."""

    listening: bool  #: whether a profiler is there; without one, nothing need be called

    def push(self, name: str, payload: int) -> None:
        """Open a range."""

    def pop(self) -> None:
        """Close the range opened last in this thread."""


class _NoRanges:
    listening = False

    def push(self, name: str, payload: int) -> None:
        pass

    def pop(self) -> None:
        pass


class _NvtxRanges:
    listening = True

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        # The payload is set anew at each push, so threads must not share the attributes.
        self._attributes = threading.local()

    def push(self, name: str, payload: int) -> None:
        known = self._attributes.__dict__
        attributes = known.get(name)
        if attributes is None:
            # The message is registered with the tool here, once, not at each push.
            attributes = known[name] = self._domain.get_event_attributes(message=name, payload=payload)
        attributes.payload = payload
        self._domain.push_range(attributes)

    def pop(self) -> None:
        self._domain.pop_range()


def ranges(enabled: bool) -> Ranges:
    """Ranges for this process; they do nothing unless ``enabled`` and a profiler listens.

    A profiler is attached before the first NVTX call of a process or not at all, so one look suffices.
    """
    if not enabled:
        return _NoRanges()
    try:
        import nvtx

        domain = nvtx.get_domain(DOMAIN)
        if type(domain).__name__ == "DummyDomain":
            return _NoRanges()
        found = _NvtxRanges(domain)
        found.push("arming", 0)  # whatever an unknown version of nvtx lacks shows here, not in a step
        found.pop()
    except (ImportError, AttributeError, TypeError, ValueError, OSError):
        return _NoRanges()
    return found
