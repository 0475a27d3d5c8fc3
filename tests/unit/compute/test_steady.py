"""No flapping; a changed load gives the new class or unknown, never a third."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.compute.steady import SHORT_SECONDS, WINDOW_SECONDS, Steady
from llmprobe.compute.verdict import BOTTLENECKS, Verdict

from .verdicts import verdict

JUDGED = [name for name in BOTTLENECKS if name not in ("idle", "unknown")]


def run(state: Steady, looks: list[tuple[float, Verdict, Verdict]]) -> list[tuple[float, str]]:
    shown = []
    for now, whole, short in looks:
        state = state.observe(now, whole, short)
        assert state.shown is not None
        shown.append((now, state.shown.bottleneck))
    return shown


def steady(name: str, seconds: float, since: float = 0.0) -> list[tuple[float, Verdict, Verdict]]:
    return [(since + second, verdict(name), verdict(name)) for second in range(int(seconds))]


def after(name: str) -> Steady:
    state = Steady()
    for now, whole, short in steady(name, 20):
        state = state.observe(now, whole, short)
    assert state.standing == name
    return state


def test_a_first_class_stands_after_three_seconds() -> None:
    shown = run(Steady(), steady("memory_bound", 5))
    assert [name for _, name in shown] == ["unknown"] * 3 + ["memory_bound"] * 2


def test_a_server_without_load_is_idle_at_once() -> None:
    assert run(Steady(), steady("idle", 1)) == [(0, "idle")]


def test_idle_follows_at_once_after_a_window_without_a_step_and_not_after_one_with_few() -> None:
    few = verdict("idle", steps_per_second=2.0)
    none = verdict("idle", steps_per_second=0.0)
    state = after("memory_bound")
    assert run(state, [(20, few, none)]) == [(20, "memory_bound")]
    assert run(state, [(20, none, none)]) == [(20, "idle")]


def test_a_short_disturbance_changes_nothing() -> None:
    looks = [
        (20 + second, verdict("sync_bound", "sampling"), verdict("sync_bound", "sampling"))
        for second in range(3)
    ]
    assert {name for _, name in run(after("memory_bound"), looks)} == {"memory_bound"}


def test_a_verdict_that_holds_says_for_how_long() -> None:
    state = after("memory_bound")
    assert state.shown is not None
    assert state.shown.held_seconds == 19 - SHORT_SECONDS


def test_another_cause_of_the_same_class_follows_without_a_break() -> None:
    state = Steady()
    for now in range(10):
        state = state.observe(now, verdict("sync_bound", "sampling"), verdict("sync_bound", "sampling"))
    causes = []
    for now in range(10, 15):
        new = verdict("sync_bound", "host_between_steps")
        state = state.observe(now, new, new)
        assert state.shown is not None
        assert state.shown.bottleneck == "sync_bound"
        causes.append(state.shown.cause)
    assert causes == ["sampling"] * 3 + ["host_between_steps"] * 2


def test_bursts_do_not_flap() -> None:
    """Five seconds of load, five of none: the whole window sees the load always, the short one at times."""
    looks = [
        (20 + second, verdict("memory_bound"), verdict("memory_bound" if second % 10 < 5 else "idle"))
        for second in range(60)
    ]
    assert {name for _, name in run(after("memory_bound"), looks)} == {"memory_bound"}


def test_what_cannot_be_told_any_more_is_unknown_and_says_why() -> None:
    state = after("memory_bound")
    gone = verdict("unknown", "no_kernel_windows", reason="kernel windows are off")
    for second in range(5):
        state = state.observe(20 + second, gone, gone)
    assert state.shown is not None
    assert (state.shown.bottleneck, state.shown.reason) == ("unknown", "kernel windows are off")


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[str], list[float], float, float]:
    """Classes that a mixture of two loads passes through, from the old one to the new one."""
    names = draw(st.lists(st.sampled_from([*JUDGED, "unknown"]), min_size=2, max_size=6))
    edges = sorted(draw(st.lists(st.floats(0.001, 0.999), min_size=len(names) - 1, max_size=len(names) - 1)))
    return names, edges, draw(st.floats(0.0, 1.0)), draw(st.floats(0.5, 1.5))


@settings(deadline=None)
@given(changes())
def test_during_a_change_of_load_no_third_class_is_shown(
    change: tuple[list[str], list[float], float, float],
) -> None:
    names, edges, offset, every = change
    old, new = names[0], names[-1]

    def mixed(share: float) -> Verdict:
        """The class at a share of the new load in the window: any path between the two pure loads."""
        name = old if share <= 0 else new if share >= 1 else names[sum(share >= edge for edge in edges)]
        return verdict(name, "no_kernel_windows" if name == "unknown" else None)

    state = Steady()
    for now in range(20):
        state = state.observe(now, mixed(0), mixed(0))
    assert state.standing == old
    now = 20 + offset
    settled = None
    while now < 50:
        since = now - 20
        state = state.observe(now, mixed(since / WINDOW_SECONDS), mixed(since / SHORT_SECONDS))
        assert state.standing in (old, new, "unknown")
        if state.standing == new and settled is None:
            settled = since
        now += every
    assert state.standing == new
    assert settled is not None
    # At a look a second this is 15 s.
    assert settled <= WINDOW_SECONDS + SHORT_SECONDS + 2 * every


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(JUDGED))
def test_a_steady_load_with_rare_outliers_never_flips(seed: int, name: str) -> None:
    chance = random.Random(seed)
    state = after(name)
    for second in range(60):
        outlier = chance.random() < 0.1 and second % 3 == 0
        seen = verdict(chance.choice(JUDGED) if outlier else name)
        state = state.observe(20 + second, seen, verdict(chance.choice(JUDGED)))
        assert state.standing == name


@given(st.integers(3, 8), st.integers(0, 7))
def test_a_light_load_with_pauses_gets_its_class(period: int, offset: int) -> None:
    """A second of steps in so many: the last three seconds are idle again and again."""
    looks = [
        (
            float(second),
            verdict("memory_bound"),
            verdict("memory_bound" if (second + offset) % period < SHORT_SECONDS else "idle"),
        )
        for second in range(40)
    ]
    assert run(Steady(), looks)[-1][1] == "memory_bound"


@given(st.floats(2.0, WINDOW_SECONDS - 1), st.floats(0.0, 10.0))
def test_steps_longer_than_the_short_window_get_their_class(step_seconds: float, offset: float) -> None:
    """The last three seconds hold the end of a step at times only: else one runs, and says nothing yet."""
    running = verdict("unknown", "step_running")
    looks = [
        (
            float(second),
            verdict("compute_bound"),
            verdict("compute_bound") if (second + offset) % step_seconds < SHORT_SECONDS else running,
        )
        for second in range(60)
    ]
    shown = run(Steady(), looks)
    assert shown[-1][1] == "compute_bound"
    assert len({name for _, name in shown[30:]}) == 1


def test_where_no_step_ends_in_the_window_it_is_said_so_at_once() -> None:
    running = verdict("unknown", "step_running", reason="0 steps in 10 s, and one has been running for 12 s")
    state = Steady().observe(0, running, running)
    state = state.observe(1, running, running)
    assert state.shown is not None
    assert state.shown.reason == running.reason
