"""For every test: what production swallows is raised here, and nothing may be left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from llmprobe.hooks.guard import Guard

try:
    from hypothesis import settings
except ImportError:  # the tests in tests/gpu do without it
    pass
else:
    # A busy machine may take any time over an example; how fast things are is for benchmarks.
    settings.register_profile("llmprobe", deadline=None)
    settings.load_profile("llmprobe")


@pytest.fixture(autouse=True)
def raise_what_production_swallows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Guard` re-raises, unless the test is about what it swallows (marker ``swallows``)."""
    if request.node.get_closest_marker("swallows"):
        return
    original = Guard.failed

    def failed(self: Guard, where: str, error: Exception) -> None:
        original(self, where, error)
        raise error

    monkeypatch.setattr(Guard, "failed", failed)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """No test leaves one of llmprobe's threads running."""
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("llmprobe")]
    for thread in left:
        thread.join(2)
    assert not [t.name for t in left if t.is_alive()]
