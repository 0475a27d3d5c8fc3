"""Launch bubbles from a counter of the GPU's activity: runs seen on an H100, and that it is a lower bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.counted_idle import bubble_seconds, idle_ratio

from .verdicts import counters, figures

RATIOS = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "share", "gap", "active", "bubbles"),
    # vLLM on an H100: share of the window, the step clock's gap ratio, the counter; docs/verdicts.md
    [
        ("decode, batch 1, graphs", 0.97, 0.007, 0.992, None),
        ("decode, batch 128, graphs", 0.91, 0.006, 0.947, None),
        ("prefill, 8000 tokens", 0.97, 0.064, 0.909, None),
        ("host between steps, async", 0.98, 0.511, 0.491, None),
        ("no async", 0.99, 0.174, 0.818, None),
        ("host between steps, 3 ms", 0.99, 0.421, 0.576, None),
        ("one busy core", 0.98, 0.181, 0.802, None),
        ("eager", 0.98, 0.067, 0.390, 0.53),
        ("tiny, graphs", 0.97, 0.578, 0.082, 0.33),
    ],
)
def test_runs_that_were_seen(
    name: str, share: float, gap: float, active: float, bubbles: float | None
) -> None:
    seconds = share * 10
    found = figures(span=seconds * (1 - gap), gap=seconds * gap)
    ratio = bubble_seconds(found, 10.0, counters(0.5, 0.1, graphics_active_ratio=active)) / seconds
    assert ratio == (0.0 if bubbles is None else pytest.approx(bubbles, abs=0.02))


def test_without_the_counter_nothing_is_said() -> None:
    assert bubble_seconds(figures(), 10.0, None) == 0
    assert idle_ratio(figures(), 10.0, counters(0.5, 0.1)) is None


@given(span=st.floats(0.01, 10.0), gap=st.floats(0.0, 10.0), active=RATIOS, window=st.floats(0.5, 10.0))
def test_never_more_than_there_is(span: float, gap: float, active: float, window: float) -> None:
    found = figures(span=span, gap=gap)
    seen = counters(0.5, 0.1, graphics_active_ratio=active)
    inside = bubble_seconds(found, window, seen)
    assert 0 <= inside <= span
    idle = idle_ratio(found, window, seen)
    assert idle is None or 0 <= idle <= 1
    # What the GPU was active for fits into what is left of the window.
    if inside:
        assert active * window <= window - inside - gap + 1e-6
