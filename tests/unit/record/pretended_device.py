"""A CUDA device that does not exist, for tests of the step clock: what it uses of ``torch.cuda``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llmprobe.record import cuda_clock


class Device:
    """A device that runs ``speed`` times as fast as the host's clock says and is some way behind it."""

    def __init__(self, speed: float = 1.0) -> None:
        self.host_ns = 1_000_000_000
        self.busy_until = 0.0  # device time, host nanoseconds
        self.capturing = False
        self.speed = speed
        self.queries = 0
        self.refused = 0  # times asked for of what is not done
        self.stream = "main"  # the current one
        self.current: Any = "cuda:0"
        # By (in another thread, device):
        self.asked_on: list[tuple[bool, Any]] = []  # whose current stream was asked about
        self.visited: list[tuple[bool, Any]] = []  # made current for a while

    def monotonic_ns(self) -> int:
        return self.host_ns

    def work(self, nanoseconds: int) -> None:
        self.busy_until = max(self.busy_until, self.host_ns) + nanoseconds

    # What CudaClock uses of torch.cuda:

    def Event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)

    def current_stream(self, device: Any) -> str:
        return self.stream

    def is_current_stream_capturing(self) -> bool:
        self.asked_on.append((_elsewhere(), self.current))
        return self.capturing

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        self.visited.append((_elsewhere(), device))
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before


def _elsewhere() -> bool:
    return threading.current_thread() is not threading.main_thread()


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at: float | None = None
        self.captured = False
        self.stream = ""  # it was recorded on last

    def record(self, stream: str) -> None:
        self.stream = stream
        self.at = max(self.device.busy_until, self.device.host_ns)

    def query(self) -> bool:
        self.device.queries += 1
        if self.captured:
            raise RuntimeError("operation not permitted on an event last recorded in a capturing stream")
        return self.at is not None and self.at <= self.device.host_ns

    def elapsed_time(self, other: Event) -> float:
        assert self.at is not None and other.at is not None
        if self.captured or other.captured:
            raise RuntimeError("operation not permitted on an event last recorded in a capturing stream")
        if max(self.at, other.at) > self.device.host_ns:
            self.device.refused += 1
            raise RuntimeError("CUDA error: device not ready")
        return (other.at - self.at) * self.device.speed / 1e6


def attach(monkeypatch: pytest.MonkeyPatch, device: Device) -> Device:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "cuda", device)
    monkeypatch.setattr(cuda_clock, "_monotonic_ns", device.monotonic_ns)
    return device
