"""Asking a manager for captures, and waiting for what becomes of them."""

from __future__ import annotations

import time

from llmprobe.capture.manager import Manager
from llmprobe.capture.session import FINAL, Capture, Request
from llmprobe.capture.store import Store

#: A condition that does not come.
NEVER = "sync_gap_ratio > 9"


def ask(
    when: str = "now", seconds: float | None = 0.1, steps: int | None = None, wait: float = 60.0
) -> Request:
    return Request("nsys", seconds, steps, when, wait)


def until(manager: Manager, capture: Capture, *states: str) -> Capture:
    deadline = time.monotonic() + 120
    while (now := manager.get(capture.id)).state not in states:
        assert now.state not in FINAL, now
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    while now.state in FINAL and manager.busy():  # the end is noted a moment later
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    return now


def left(store: Store, capture: Capture) -> set[str]:
    return {path.name for path in store.folder(capture.id).iterdir()}
