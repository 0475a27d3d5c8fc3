"""What is told of servers, and what is not told twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.collect.views import RankView, ServerView
from llmprobe.compute.stall import Bound, Stall, StepSeen
from llmprobe.export.changes import QUIET_SECONDS, SETTLED_SECONDS, Change, Changes

from .views_for_tests import engine, pressure, rank, server, verdict

STALL = Stall(
    where="step",
    since_ns=1,
    seconds=12.0,
    bound=Bound(10.0, "at least 10 s"),
    step=41,
    phase="decode",
    tokens=8,
    last_steps=(StepSeen(40, "decode", 8, 0.01),),
)


def worker(journal: str = "worker-1.journal", **changes: Any) -> RankView:
    return dataclasses.replace(rank(journal=Path("/dev/shm") / journal), **changes)


def view(**changes: Any) -> ServerView:
    """A server that is calm and judged in decode only."""
    calm: dict[str, Any] = {"ranks": [worker()], "pressure": {}, "verdicts": {"decode": verdict()}}
    return server(**{**calm, **changes})


def kinds(found: list[Change]) -> list[str]:
    return [change.kind for change in found]


def seen(*views: ServerView, now: float = 100.0) -> Changes:
    """Somebody who has looked at these already."""
    changes = Changes()
    changes.look(views, now)
    return changes


def test_the_first_look_tells_of_each_engine_and_verdict() -> None:
    found = Changes().look([view(ranks=[worker(), worker("w2", rank=1), worker("w3", engine=1)])], 1.0)
    assert sorted(kinds(found)) == ["engine_came", "engine_came", "verdict"]
    assert {change.data.get("engine") for change in found if change.kind == "engine_came"} == {0, 1}
    (told,) = (change for change in found if change.kind == "verdict")
    assert told.server == "vllm-8000"
    assert (told.data["was"], told.data["bottleneck"]) == (None, "memory_bound")
    json.dumps([change.data for change in found], allow_nan=False)


def test_what_has_not_changed_is_not_told_again() -> None:
    pressed = view(pressure={"queue": pressure()}, ranks=[worker(stall=STALL)])
    changes = seen(pressed)
    later = dataclasses.replace(pressed, ranks=[worker(stall=dataclasses.replace(STALL, seconds=99.0))])
    assert changes.look([later], 200.0) == []


def test_a_verdict_that_changes_says_what_it_was() -> None:
    now_bound = verdict(bottleneck="sync_bound", cause="host_between_steps", held_seconds=0.0)
    (found,) = seen(view()).look([view(verdicts={"decode": now_bound})], 101.0)
    assert found.data["was"] == {"bottleneck": "memory_bound", "cause": None}
    assert (found.data["bottleneck"], found.data["cause"]) == ("sync_bound", "host_between_steps")


def test_idle_and_unknown_are_told_once_they_have_stood() -> None:
    changes = seen(view())
    for bottleneck, cause in (("idle", None), ("unknown", "changing")):
        brief = verdict(bottleneck=bottleneck, cause=cause, held_seconds=SETTLED_SECONDS - 1)
        assert changes.look([view(verdicts={"decode": brief})], 101.0) == []
    assert changes.look([view()], 102.0) == []  # as if it had never wavered
    stood = verdict(bottleneck="idle", held_seconds=SETTLED_SECONDS)
    assert kinds(changes.look([view(verdicts={"decode": stood})], 112.0)) == ["verdict"]


def test_pressure_that_flickers_is_one() -> None:
    pressed, calm = view(pressure={"queue": pressure()}), view()
    changes = seen(view())
    (begun,) = changes.look([pressed], 100.0)
    assert (begun.kind, begun.data["pressure"], begun.data["value"]) == ("pressure_begun", "queue", 0.4)
    for second in range(1, 60):
        assert changes.look([pressed if second % 5 == 0 else calm], 100.0 + second) == []
    (ended,) = changes.look([calm], 155.0 + QUIET_SECONDS)
    assert ended.kind == "pressure_ended"
    assert ended.data == {"pressure": "queue", "engine": 0, "seconds": 55.0, "outcome": "eased"}


def test_pressure_that_is_known_but_not_felt_is_none() -> None:
    assert seen(view()).look([view(pressure={"queue": pressure(active=False)})], 101.0) == []


def test_a_stall_says_what_the_engine_last_did_and_how_it_ended() -> None:
    changes = seen(view())
    hanging = view(ranks=[worker(stall=STALL)], engines=[engine(requests_running=3, requests_waiting=7)])
    (begun,) = changes.look([hanging], 112.0)
    assert begun.kind == "stall_begun"
    assert begun.data["last_steps"] == [{"step": 40, "phase": "decode", "tokens": 8, "seconds": 0.01}]
    assert (begun.data["requests_running"], begun.data["requests_waiting"]) == (3, 7)
    assert "in step 41" in begun.data["text"]
    (ended,) = changes.look([view()], 130.0)
    assert ended.data == {"engine": 0, "rank": 0, "step": 41, "seconds": 30.0, "outcome": "recovered"}


def test_one_stall_after_another_is_two() -> None:
    changes = seen(view(ranks=[worker(stall=STALL)]))
    found = changes.look([view(ranks=[worker(stall=dataclasses.replace(STALL, step=44))])], 130.0)
    assert kinds(found) == ["stall_ended", "stall_begun"]


def test_a_stall_that_nobody_watches_any_more_has_not_recovered() -> None:
    changes = seen(view(ranks=[worker(stall=STALL)]))
    (ended,) = changes.look([view(armed=False, ranks=[worker(armed=False)], verdicts={})], 130.0)
    assert ended.data["outcome"] == "not_watched"


def test_with_a_server_all_that_stood_ends() -> None:
    changes = seen(view(ranks=[worker(stall=STALL)], pressure={"queue": pressure()}), server("other"))
    found = changes.look([server("other")], 130.0)
    assert kinds(found) == ["stall_ended", "pressure_ended", "engine_went"]
    assert {change.data.get("outcome", "gone") for change in found} == {"gone"}
    assert {change.server for change in found} == {"vllm-8000"}


def test_an_engine_that_was_replaced_between_two_looks_went_and_came() -> None:
    found = seen(view()).look([view(ranks=[worker("worker-2.journal")])], 101.0)
    assert kinds(found) == ["engine_went", "engine_came", "verdict"]
    assert found[-1].data["was"] is None  # of the engine that is there now, this is the first


def test_with_an_engine_that_was_replaced_all_that_stood_of_it_is_gone() -> None:
    stood = view(ranks=[worker(stall=STALL)], pressure={"queue": pressure()})
    again = view(ranks=[worker("worker-2.journal", stall=STALL)], pressure={"queue": pressure()})
    for new, begun in (
        (view(ranks=[worker("worker-2.journal")]), []),
        (again, ["pressure_begun", "stall_begun"]),
    ):
        found = seen(stood).look([new], 130.0)
        assert kinds(found)[:4] == ["stall_ended", "pressure_ended", "engine_went", "engine_came"]
        assert [change.data["outcome"] for change in found[:2]] == ["gone", "gone"]
        assert [kind for kind in kinds(found)[4:] if kind != "verdict"] == begun


def test_what_stood_of_another_engine_stays() -> None:
    both = [worker("w0", stall=STALL), worker("w1", engine=1)]
    changes = seen(view(ranks=both, pressure={"queue": pressure()}))
    found = changes.look([view(ranks=both[:1], pressure={"queue": pressure()})], 130.0)
    assert [(change.kind, change.data) for change in found] == [("engine_went", {"engine": 1})]


def test_a_stall_of_a_worker_that_was_replaced_has_not_recovered() -> None:
    """Its engine is there all the time: another of its workers stayed."""
    stayed = worker("w1", rank=1)
    changes = seen(view(ranks=[worker("w0", stall=STALL), stayed]))
    (ended,) = changes.look([view(ranks=[worker("w2"), stayed])], 130.0)
    assert (ended.kind, ended.data["outcome"]) == ("stall_ended", "gone")


def test_a_stall_that_an_agent_before_this_version_saved_goes_on() -> None:
    stalled = view(ranks=[worker(stall=STALL)])
    saved = json.loads(json.dumps(seen(stalled).save()))
    del saved["vllm-8000"]["stalls"]["0/0"]["journal"]
    anew = Changes()
    anew.restore(saved)
    assert anew.look([stalled], 103.0) == []


def test_a_worker_more_or_less_is_still_the_same_engine() -> None:
    both = view(ranks=[worker("w0"), worker("w1", rank=1)])
    changes = seen(both)
    assert changes.look([view(ranks=[worker("w0")])], 101.0) == []
    assert changes.look([both], 102.0) == []


def test_switched_off_nothing_is_concluded() -> None:
    pressed = view(pressure={"queue": pressure()})
    changes = seen(pressed)
    off = view(armed=False, verdicts={}, pressure={}, ranks=[worker(armed=False)])
    assert changes.look([off], 200.0) == []
    assert changes.look([pressed], 201.0) == []


def test_whoever_starts_anew_goes_on_where_it_was_left() -> None:
    before = view(ranks=[worker(stall=STALL)], pressure={"queue": pressure()})
    saved = json.loads(json.dumps(seen(before).save()))
    anew = Changes()
    anew.restore(saved)
    assert anew.look([before], 103.0) == []
    assert kinds(anew.look([], 110.0)) == ["stall_ended", "pressure_ended", "engine_went"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
#: A path into what is saved; what lies there is replaced.
PLACES = st.sampled_from(
    [
        "",
        "vllm-8000",
        *(f"vllm-8000 {part}" for part in ("engines", "verdicts", "pressure", "stalls")),
        *(f"vllm-8000 engines {name}" for name in ("0", "x", "²")),
        "vllm-8000 verdicts decode",
        *(f"vllm-8000 pressure queue {name}".strip() for name in ("", "engine", "since", "seen")),
        *(
            f"vllm-8000 stalls 0/0 {name}".strip()
            for name in ("", "engine", "rank", "step", "since", "journal")
        ),
    ]
)


def taken_up(saved: Any) -> Changes:
    """Somebody who starts anew, with what is saved if it is any good."""
    changes = Changes()
    with contextlib.suppress(ValueError):
        changes.restore(saved)
    return changes


@given(JSON, PLACES)
def test_whatever_was_saved_can_be_begun_with(junk: Any, place: str) -> None:
    stood = view(ranks=[worker(stall=STALL)], pressure={"queue": pressure()})
    saved = {"": json.loads(json.dumps(seen(stood).save()))}
    *way, last = ["", *place.split()]
    at: Any = saved
    for name in way:
        at = at[name]
    at[last] = junk
    for looks in ([stood], [view()], []):
        changes = taken_up(json.loads(json.dumps(saved[""])))
        for change in [*changes.look(looks, 130.0), *changes.look([], 200.0)]:
            json.dumps(change.data, allow_nan=False)


@pytest.mark.parametrize("part", ["engines", "verdicts", "pressure", "stalls"])
def test_a_part_that_is_missing_is_empty(part: str) -> None:
    saved = json.loads(json.dumps(seen(view()).save()))
    del saved["vllm-8000"][part]
    Changes().restore(saved)


#: What a look may find: nothing, or a server, stalled or not, pressed or not, on or off, in some class.
LOOKS = st.lists(
    st.none()
    | st.fixed_dictionaries(
        {
            "stalled": st.none() | st.integers(1, 2),
            "pressed": st.booleans(),
            "armed": st.sampled_from([True, True, False]),
            "bottleneck": st.sampled_from(["memory_bound", "idle"]),
            "journal": st.sampled_from(["w1", "w1", "w2"]),
            "held": st.sampled_from([0.0, 60.0]),
        }
    ),
    max_size=30,
)


def looked_at(found: dict[str, Any] | None) -> list[ServerView]:
    if found is None:
        return []
    on = found["armed"]
    stall = dataclasses.replace(STALL, step=found["stalled"]) if found["stalled"] and on else None
    bound = verdict(bottleneck=found["bottleneck"], held_seconds=found["held"])
    return [
        view(
            armed=on,
            ranks=[worker(found["journal"], stall=stall, armed=on)],
            pressure={"queue": pressure(active=found["pressed"])} if on else {},
            verdicts={"decode": bound} if on else {},
        )
    ]


@given(LOOKS, st.sets(st.integers(0, 29)))
def test_what_begins_ends_once_and_a_restart_at_any_moment_changes_nothing(
    looks: list[dict[str, Any] | None], restarts: set[int]
) -> None:
    steady, restarted = Changes(), Changes()
    open_now: dict[str, bool] = {}
    for at, found in enumerate([*looks, None]):
        if at in restarts:
            saved, restarted = restarted.save(), Changes()
            restarted.restore(json.loads(json.dumps(saved)))
        told = steady.look(looked_at(found), 100.0 + 4 * at)
        assert restarted.look(looked_at(found), 100.0 + 4 * at) == told
        for change in told:
            for begin, end in (
                ("engine_came", "engine_went"),
                ("stall_begun", "stall_ended"),
                ("pressure_begun", "pressure_ended"),
            ):
                if change.kind in (begin, end):
                    assert open_now.get(begin, False) == (change.kind == end)
                    open_now[begin] = change.kind == begin
    assert not any(open_now.values())
