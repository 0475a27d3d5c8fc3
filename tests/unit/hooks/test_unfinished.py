"""Several engines of one front end: work is pending at those that have some, and not at the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.hooks.vllm.unfinished import Engine, Unfinished, engine_index
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.recorder import Recorder

SECOND = 10**9


class Server:
    """A front end's account over two real journals, vLLM's client, and a clock."""

    def __init__(self, directory: Path, told: bool = True, engines: int = 2) -> None:
        self.now = 1000 * SECOND
        self.account = Unfinished(told=told, clock=lambda: self.now)
        self.processor = SimpleNamespace(request_states={})
        self.client = SimpleNamespace(reqs_in_flight={})
        self._told = told
        self._readers: list[JournalReader] = []
        self._records: list[list[tuple[int, bool]]] = []
        for index in range(engines):
            recorder = Recorder.open(directory, "frontend", {"role": "frontend", "engine": index})
            self.account.engines[index] = Engine(index, recorder)
            self._readers.append(JournalReader(recorder.writer.path, recorder.writer))
            self._records.append([])

    def after(self, seconds: float) -> int:
        self.now += round(seconds * SECOND)
        return self.now

    def arrive(self, name: str) -> None:
        self.processor.request_states[name] = object()
        self.account.arrived(self.processor, name, self.now)

    def send(self, name: str, engine: int) -> None:
        """vLLM chooses; it calls us where the version at hand lets us look on."""
        self.client.reqs_in_flight[name] = engine.to_bytes(2, "little")
        if self._told:
            self.account.sent(self.client, name, engine_index(self.client.reqs_in_flight[name]))

    def request(self, name: str, engine: int) -> None:
        self.arrive(name)
        self.send(name, engine)

    def say(self, engine: int, has: int) -> None:
        """Statistics of one step."""
        self.account.heard(self.account.engines[engine], has, self.now)
        self.account.settle(self.account.engines[engine])

    def finish(self, name: str, has: int = 0) -> None:
        """The engine is done with a request, and has so many others."""
        engine = engine_index(self.client.reqs_in_flight.pop(name))
        del self.processor.request_states[name]
        self.account.outputs(self.processor, [SimpleNamespace(request_id=name)])
        self.say(engine, has)

    def abort(self, *names: str) -> None:
        for name in names:
            del self.processor.request_states[name]
        self.account.aborted(self.processor, list(names))

    def look(self, times: int = 1, active: bool = True) -> None:
        for _ in range(times):
            self.after(0.25)
            self.account.look(active)

    def told(self, engine: int) -> list[tuple[int, bool]]:
        """(time, whether anything is pending) of every record of one engine so far."""
        rows = self._readers[engine].read().pending
        self._records[engine] += [(int(row["time"]), bool(row["unfinished"])) for row in rows]
        return self._records[engine]

    def pending(self) -> list[bool]:
        told = [self.told(engine) for engine in self.account.engines]
        return [bool(records) and records[-1][1] for records in told]

    def close(self) -> None:
        for reader, engine in zip(self._readers, self.account.engines.values(), strict=True):
            reader.close()
            assert engine.recorder is not None
            engine.recorder.close(remove=True)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def server(**more: Any) -> Server:
        made.append(Server(tmp_path, **more))
        return made[-1]

    yield server
    for one in made:
        one.close()


def test_work_is_pending_at_the_engine_that_a_request_was_sent_to(make: Callable[..., Server]) -> None:
    server = make()
    server.request("long", 0)
    began = server.now
    server.after(1)
    server.request("short", 1)
    server.say(0, 1)
    ended = server.after(1)
    server.finish("short")
    server.look(40)
    assert server.told(0) == [(began, True)]
    assert server.told(1) == [(began + SECOND, True), (ended, False)]


def test_a_request_is_pending_from_its_arrival_however_late_its_engine_is_chosen(
    make: Callable[..., Server],
) -> None:
    """Those of ``n > 1`` arrive together and are sent one after the other."""
    server = make()
    began = server.now
    for name in "ab":
        server.arrive(name)
    server.send("a", 0)
    server.after(0.1)
    server.send("b", 1)
    assert [server.told(engine) for engine in (0, 1)] == [[(began, True)]] * 2


def test_an_abort_ends_the_work_of_its_engine_alone(make: Callable[..., Server]) -> None:
    server = make()
    for name, engine in (("a", 0), ("b", 1), ("c", 1)):
        server.request(name, engine)
    server.abort("b")
    assert server.pending() == [True, True]
    server.abort("c")
    assert server.pending() == [True, False]
    server.abort("a")
    assert server.pending() == [False, False]


def test_the_word_of_one_engine_is_no_answer_for_another(make: Callable[..., Server]) -> None:
    """Engine 0 prefills for long and says nothing; engine 1 has done its work and says so."""
    server = make()
    server.request("long", 0)
    server.request("short", 1)
    server.after(0.5)
    server.finish("short")
    server.look(100)
    assert server.pending() == [True, False]


def test_a_request_that_vllm_forgot_ends_at_its_engine_though_another_works(
    make: Callable[..., Server],
) -> None:
    server = make()
    server.request("forgotten", 1)
    server.request("long", 0)
    server.after(0.5)
    server.say(0, 1)
    server.say(1, 0)
    said = server.now
    server.look(20)
    assert server.pending() == [True, False]
    assert server.told(1)[-1] == (said, False)
    server.say(1, 1)  # it knows of it after all
    assert server.pending() == [True, True]


def test_requests_that_came_while_the_probe_was_off_are_looked_up(make: Callable[..., Server]) -> None:
    server = make()
    server.request("first", 0)
    server.look(active=False)
    assert server.pending() == [False, False]
    server.processor.request_states["second"] = object()  # no hook is there
    server.client.reqs_in_flight["second"] = (1).to_bytes(2, "little")
    server.finish("first")
    server.look(active=False)
    server.look(2)
    assert server.pending() == [False, True]


def test_where_nobody_says_the_place_engines_tell_by_what_they_have(make: Callable[..., Server]) -> None:
    server = make(told=False)
    server.request("long", 0)
    assert server.pending() == [True, True]  # it may be anywhere
    server.look(4)
    assert server.pending() == [True, True]
    server.say(0, 1)
    server.look(4)
    assert server.pending() == [True, False]
    server.request("short", 1)
    server.after(0.1)
    server.say(1, 1)
    server.say(0, 1)
    server.look(4)
    assert server.pending() == [True, True]
    server.finish("short")
    server.look(4)
    assert server.pending() == [True, False]
    server.finish("long")
    assert server.pending() == [False, False]


def test_a_request_sent_by_an_unknown_way_counts_everywhere(make: Callable[..., Server]) -> None:
    server = make()
    server.arrive("a")
    server.look(2)
    assert server.pending() == [True, True]
    server.abort("a")
    server.look(2)
    assert server.pending() == [False, False]


@given(st.lists(st.tuples(st.sampled_from("asfbo"), st.integers(0, 2)), max_size=60))
def test_whatever_happened_a_second_later_pending_is_what_is_true(
    tmp_path_factory: pytest.TempPathFactory, happened: list[tuple[str, int]]
) -> None:
    server = Server(tmp_path_factory.mktemp("dir"), engines=3)
    place: dict[str, int] = {}
    active, number = True, 0

    def having(engine: int) -> int:
        return sum(at == engine for at in place.values())

    try:
        server.request("first", 0)  # by which vLLM's client is known
        server.finish("first")
        for what, engine in happened:
            number += 1
            name = next((name for name, at in place.items() if at == engine), "")
            if what == "a":
                place[str(number)] = engine
                if active:
                    server.request(str(number), engine)
                else:
                    server.processor.request_states[str(number)] = object()
                    server.client.reqs_in_flight[str(number)] = engine.to_bytes(2, "little")
            elif what == "o":
                active = not active
                server.look(active=active)
            elif what == "s" and active:
                server.say(engine, having(engine))
            elif what in "fb" and name:
                del place[name]
                if not active:
                    del server.processor.request_states[name]
                elif what == "f":
                    server.finish(name, having(engine))
                else:
                    server.abort(name)
        if not active:
            server.look()
        server.account.outputs(server.processor, [])  # the engines go on, and the probe is on
        server.look(4)
        assert server.pending() == [having(engine) > 0 for engine in range(3)]
    finally:
        server.close()


def test_what_comes_late_of_an_aborted_request_hides_no_end(make: Callable[..., Server]) -> None:
    server = make(engines=1)
    begun = server.now
    for name in ("aborted", "served"):
        server.request(name, 0)
    server.abort("aborted")
    ended = server.after(1)
    del server.processor.request_states["served"]
    those = [SimpleNamespace(request_id=name) for name in ("aborted", "served")]
    server.account.outputs(server.processor, those)  # the engine had not heard of the abort
    server.say(0, 0)
    assert server.told(0) == [(begun, True), (ended, False)]
