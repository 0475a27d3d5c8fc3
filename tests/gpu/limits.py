"""How long a test on a GPU may take: what hangs there would hold the machine."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

_T = TypeVar("_T")
_NAME = "limit_seconds"
#: A process that cannot be broken off at the limit ends this much later.
_GRACE_SECONDS = 15.0


def limited(seconds: int) -> Callable[[_T], _T]:
    """Decorates a test that may take so long, the setup of its fixtures included."""

    def note(test: _T) -> _T:
        setattr(test, _NAME, seconds)
        return test

    return note


@pytest.fixture(autouse=True)
def limit(request: pytest.FixtureRequest, stderr: int) -> Iterator[None]:
    """Break a test off at its limit, with the stack of every thread."""
    seconds = getattr(request.function, _NAME, None)
    if seconds is None:
        yield
        return

    def late(number: int, frame: Any) -> None:
        faulthandler.dump_traceback(stderr)
        pytest.fail(f"not over after {seconds} s; the stacks of all threads are on stderr")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    # A thread that keeps the interpreter lock keeps signals out too.
    faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, file=stderr, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def stderr(pytestconfig: pytest.Config) -> Iterator[int]:
    """The process's own, not what pytest keeps of a test."""
    manager = pytestconfig.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        held = os.dup(2)
    yield held
    os.close(held)
