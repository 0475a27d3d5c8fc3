"""Numbers that never fall, a ring that says what it lost, and listeners that nobody waits for."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmprobe.agent.event_log import EventLog, Listener, TooManyListeners
from llmprobe.collect import checkpoint


class Wall:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_an_event_is_one_line_of_json_with_number_time_server_and_kind() -> None:
    events = EventLog(wall=Wall(12.3456))
    number = events.add("verdict", "s", {"phase": "decode", "reason": "two\nlines"})
    ((event,), lost) = events.after(0)
    assert (number, lost) == (12345, 0)
    assert "\n" not in event.text
    assert json.loads(event.text) == {
        "id": 12345,
        "time": 12.346,
        "server": "s",
        "kind": "verdict",
        "phase": "decode",
        "reason": "two\nlines",
    }


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.sampled_from(["add", "restart"])), max_size=30))
def test_numbers_never_fall_whatever_the_clock_does(
    tmp_path_factory: pytest.TempPathFactory, happened: list[tuple[float, str]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "events.json"
    wall, last = Wall(), 0
    events = EventLog(path, wall=wall)
    for seconds, what in happened:
        wall.now += seconds
        if what == "add":
            number = events.add("verdict", "s", {})
            assert number > last
            last = number
            events.save({})
        else:
            events = EventLog(path, wall=wall)
            assert events.newest == last


def test_events_lost_with_a_killed_agent_do_not_lend_their_numbers(tmp_path: Path) -> None:
    wall = Wall()
    events = EventLog(tmp_path / "events.json", wall=wall)
    events.add("a", "s", {})
    events.save({})
    lost = [events.add("b", "s", {}) for _ in range(3)]
    wall.now += 0.5  # killed, and followed by another at once
    after = EventLog(tmp_path / "events.json", wall=wall)
    assert after.add("c", "s", {}) > max(lost)


def test_the_ring_keeps_the_newest_and_says_what_it_lost() -> None:
    events = EventLog(most=3)
    numbers = [events.add("k", "s", {"at": at}) for at in range(5)]
    kept, lost = events.after(0)
    assert [event.id for event in kept] == numbers[2:]
    assert lost == numbers[1]
    assert events.after(numbers[1]) == (kept, 0)
    assert events.after(numbers[3])[0] == kept[2:]


def test_a_file_that_is_damaged_is_said_and_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.json"
    path.write_text('{"schema": 1, "newest": "many", "events": 3}')
    events = EventLog(path)
    assert events.newest == 0
    events.add("k", "s", {})
    events.save({"x": {}})
    assert EventLog(path).state == {"x": {}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(
    JSON
    | st.fixed_dictionaries(
        {},
        optional={
            "newest": JSON | st.just(5),
            "dropped": JSON,
            "state": JSON,
            "events": JSON | st.lists(st.tuples(JSON, JSON), max_size=3),
        },
    )
)
@example({"newest": float("inf")})
@example({"newest": 2**60})
@example({"newest": 5, "events": [[9, '{"id":9}']]})
@example({"newest": 5, "events": [[5, "\ud800"]]})
@example({"newest": 5, "events": [[5, "two\nlines"]]})
@example({"newest": 5, "events": [[5, '{"id":6}']]})
@example({"newest": 5, "dropped": 9})
def test_whatever_the_file_holds_an_agent_begins(
    tmp_path_factory: pytest.TempPathFactory, saved: object
) -> None:
    path = tmp_path_factory.mktemp("log") / "events.json"
    header = json.loads(checkpoint.dump())
    path.write_text(json.dumps({**header, **saved} if isinstance(saved, dict) else saved))
    events = EventLog(path)
    before = events.newest
    number = events.add("k", "s", {})
    assert before < number <= 2**53
    assert events.after(number) == ([], 0)
    for event in events.after(0)[0]:
        assert json.loads(event.text)["id"] == event.id <= number
        assert "\n" not in event.text
        event.text.encode()
    assert events.after(before)[0][-1].id == number
    events.save({})


def test_a_file_that_is_nested_without_end_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.json"
    path.write_text("[" * 100_000)
    assert EventLog(path).newest == 0


def test_what_is_saved_once_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "events.json"
    events = EventLog(path)
    events.save({})
    assert not path.exists()
    events.add("k", "s", {})
    events.save({})
    path.unlink()
    events.save({})
    assert not path.exists()


def test_what_could_not_be_written_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "none" / "events.json"
    events = EventLog(path)
    events.add("k", "s", {})
    with pytest.raises(OSError, match="none"):
        events.save({})
    path.parent.mkdir()
    events.save({})
    assert path.exists()


def test_a_listener_is_woken_from_another_thread() -> None:
    async def listen(events: EventLog) -> bool:
        with events.listening() as listener:
            thread = threading.Thread(target=events.add, args=("k", "s", {}))
            thread.start()
            woken = await listener.wait(60)
            thread.join()
            return woken and not await listener.wait(0.01)

    assert asyncio.run(listen(EventLog()))


def test_only_so_many_listen_and_places_are_given_back() -> None:
    async def listen(events: EventLog) -> None:
        with events.listening(), pytest.raises(TooManyListeners), events.listening():
            pass
        with events.listening():
            pass

    asyncio.run(listen(EventLog(most_listeners=1)))


def test_a_listener_whose_loop_has_ended_is_in_nobodys_way() -> None:
    async def make() -> Listener:
        return Listener()

    listener = asyncio.run(make())
    listener.wake()


def test_closing_wakes_everybody() -> None:
    async def listen(events: EventLog) -> bool:
        with events.listening() as listener:
            events.close()
            return await listener.wait(60)

    events = EventLog()
    assert asyncio.run(listen(events))
    assert events.closed
