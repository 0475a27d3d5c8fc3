"""NVTX ranges around steps, so that they show by phase in nsys and other profilers.

Domain ``llmprobe``. A step is a range named like its phase, its payload the step's query tokens; inside lie
``forward`` and ``sample``. Without a profiler that listens, nothing is called at all.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, Protocol

DOMAIN = "llmprobe"
FORWARD, SAMPLE = "forward", "sample"


class Ranges(Protocol):
    """The steps of the calling thread, which may nest."""

    listening: bool  #: whether a profiler is there; without one, nothing need be called

    @property
    def open(self) -> bool:
        """Whether a step of the calling thread is open: no other thread can end it."""

    def begin(self, phase: str, tokens: int) -> None:
        """A step begins."""

    def part(self, name: str | None) -> None:
        """Its part ``name`` begins and the one before ends; None: the part ends."""

    def end(self) -> None:
        """The step that began last ends, and so does its part."""

    def of_one_thread(self) -> Ranges:
        """The same for a caller that begins and ends steps in one thread only: at less cost."""


class _NoRanges:
    listening = False
    open = False

    def begin(self, phase: str, tokens: int) -> None:
        pass

    def part(self, name: str | None) -> None:
        pass

    def end(self) -> None:
        pass

    def of_one_thread(self) -> Ranges:
        return self


class _OneThread:
    """What one thread has open. Attributes are its own too: a payload is set anew at each push."""

    listening = True

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self._attributes: dict[str, Any] = {}
        self._in_part: list[bool] = []  # one a step that is open
        self._thread = 0  # in which the last one began

    @property
    def open(self) -> bool:
        return bool(self._in_part) and self._thread == threading.get_ident()

    def begin(self, phase: str, tokens: int) -> None:
        self._push(phase, tokens)
        if not self._in_part:
            self._thread = threading.get_ident()
        self._in_part.append(False)

    def part(self, name: str | None) -> None:
        in_part = self._in_part
        if not in_part:
            return
        if in_part[-1]:
            in_part[-1] = False
            self._domain.pop_range()
        if name is not None:
            self._push(name, 0)
            in_part[-1] = True  # only now: `end` pops what was pushed, no range around it

    def end(self) -> None:
        in_part = self._in_part
        if not in_part:
            return
        if in_part.pop():
            self._domain.pop_range()
        self._domain.pop_range()

    def of_one_thread(self) -> Ranges:
        return _OneThread(self._domain)

    def _push(self, name: str, payload: int) -> None:
        try:
            attributes = self._attributes[name]
        except KeyError:
            # The message is registered with the tool here, once, not at each push.
            attributes = self._domain.get_event_attributes(message=name, payload=payload)
            self._attributes[name] = attributes
        attributes.payload = payload
        self._domain.push_range(attributes)


class _EachThread(threading.local):
    """Of any number of threads: each has its own."""

    listening = True

    def __init__(self, domain: Any) -> None:
        own = _OneThread(domain)
        self._own, self.begin, self.part, self.end = own, own.begin, own.part, own.end

    @property
    def open(self) -> bool:
        return self._own.open

    def of_one_thread(self) -> Ranges:
        return self._own.of_one_thread()


class _EarlyDomain:
    """The domain as nvtx before 0.2.12 offers it: through functions that look everything up at each call."""

    def __init__(self, nvtx: Any) -> None:
        self._nvtx = nvtx

    def get_event_attributes(self, message: str, payload: int) -> Any:
        return SimpleNamespace(message=message, payload=payload)

    def push_range(self, attributes: Any) -> None:
        self._nvtx.push_range(attributes.message, domain=DOMAIN, payload=attributes.payload)

    def pop_range(self) -> None:
        self._nvtx.pop_range(domain=DOMAIN)


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
        found = _EachThread(domain if hasattr(domain, "push_range") else _EarlyDomain(nvtx))
        found.begin("arming", 0)  # whatever an unknown version of nvtx lacks shows here, not in a step
        found.end()
    except (ImportError, AttributeError, TypeError, ValueError, OSError):
        return _NoRanges()
    return found
