"""Captures with the real nsys of which somebody dies: the agent, nsys, the server, or the capture itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from captured import Gates, Wrapped, gated
from waiting import PATIENCE_SECONDS, until

from llmprobe.record.agent_launch import agent_info

pytestmark = pytest.mark.integration


#: Holds all the time, and so comes true after those seconds.
LATER = "steps_per_second > 0 for 8s"
FILES = {"report.json", "report.txt", "capture.sqlite", "live.json", "capture.nsys-rep"}


@pytest.fixture(scope="module")
def survivor(nsys: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gates, Wrapped]]:
    """A program that outlives all that dies of its captures, for tests one after another."""
    with gated(nsys, tmp_path_factory.mktemp("survivor")) as gates:
        yield gates, gates.start()


@pytest.fixture
def lasting(survivor: tuple[Gates, Wrapped]) -> Iterator[tuple[Gates, Wrapped]]:
    """The same; it gets on after the test too."""
    yield survivor
    gates, one = survivor
    gates.open()
    gets_on(one)


def gets_on(one: Wrapped) -> None:
    """Return once the server has made further steps."""
    steps = one.rank()["steps"]["decode"]
    until(lambda: one.rank()["steps"]["decode"] > steps, "further steps")


def whole(one: Wrapped, url: str) -> dict[str, Any]:
    """The capture, once it is done with everything that belongs to it."""
    done = one.state(url, "done")
    assert {file["name"] for file in done["files"]} == FILES
    kept = {path.name for path in (one.captures / done["id"]).iterdir()}
    assert kept == FILES | {"capture.json"}
    assert one.ask("GET", f"{url}/report")[1]["schema_version"] == 1
    return done


def failed(one: Wrapped, url: str) -> str:
    """Why the capture failed; nothing else is left of it, and the server gets on."""
    found = one.state(url, "failed")
    assert {path.name for path in (one.captures / found["id"]).iterdir()} == {"capture.json"}
    gets_on(one)
    return str(found["reason"])


def another(one: Wrapped) -> None:
    """Take one more capture."""
    whole(one, one.begin(seconds=0.5))


def begin_and_hold(one: Wrapped, gates: Gates, state: str) -> str:
    """A capture that stays in this state; returns its URL."""
    if state == "pending":
        url = one.begin(seconds=0.5, when=LATER)
    else:
        {"importing": gates.importing, "analysing": gates.analysing}[state].close()
        url = one.begin(seconds=0.5)
    one.state(url, state)
    if state != "pending":
        workers = {"importing": gates.importers, "analysing": gates.analysers}[state]
        until(workers, f"process of {state}")
    return url


@pytest.mark.parametrize("state", ["pending", "importing", "analysing"])
def test_a_killed_agent_is_followed_by_one_that_takes_it_to_its_end(
    lasting: tuple[Gates, Wrapped], state: str
) -> None:
    gates, one = lasting
    url = begin_and_hold(one, gates, state)
    before = one.ask("GET", url)[1]
    killed = one.kill_agent()
    until(lambda: (agent_info(one.directory) or {"pid": killed})["pid"] != killed, "another agent")
    one.state(url, state)
    if state == "analysing":  # what the first agent had begun ended with it
        until(lambda: len(gates.analysers()) == 1, "one analysis")
    gates.importing.open()
    gates.analysing.open()
    done = whole(one, url)
    assert {name: done["times"][name] for name in before["times"]} == before["times"]
    assert list(done["times"]) == ["pending", "recording", "importing", "analysing", "done"]
    another(one)


@pytest.mark.parametrize("state", ["importing", "analysing"])
def test_deleting_one_ends_what_works_on_it_and_leaves_nothing(
    lasting: tuple[Gates, Wrapped], state: str
) -> None:
    gates, one = lasting
    before = set(one.captures.glob("*"))
    url = begin_and_hold(one, gates, state)
    assert set(one.captures.iterdir()) > before
    assert one.ask("DELETE", url)[0] in (200, 202)
    until(lambda: one.ask("GET", url)[0] == 404, "end of it")
    assert set(one.captures.iterdir()) == before
    until(lambda: not gates.importers() and not gates.analysers(), "end of what worked on it")
    gets_on(one)
    gates.importing.open()
    gates.analysing.open()
    another(one)


def test_one_that_is_deleted_as_nsys_begins_is_not_the_last(lasting: tuple[Gates, Wrapped]) -> None:
    _, one = lasting
    url = one.begin(seconds=60)
    one.state(url, "recording")
    assert one.ask("DELETE", url)[0] in (200, 202)
    until(lambda: one.ask("GET", url)[0] == 404, "end of it")
    another(one)


def test_an_nsys_that_dies_before_it_records_fails_the_capture(gates: Gates) -> None:
    one = gates.start()
    url = begin_and_hold(one, gates, "pending")
    one.nsys_daemon().kill()
    assert "nsys" in failed(one, url)


def refuses(one: Wrapped) -> bool:
    """Whether captures by nsys are refused because it is gone. Until that is noticed, they fail."""
    status, answer = one.ask("POST", "/api/captures", {"tool": "nsys"})
    if status == 202:
        assert "nsys" in failed(one, answer["url"])
        return False
    assert (status, "nsys" in answer["detail"]) == (409, True), answer
    return True


@pytest.mark.parametrize("state", ["importing", "analysing"])
def test_what_is_recorded_needs_no_nsys_that_still_records(gates: Gates, state: str) -> None:
    one = gates.start()
    url = begin_and_hold(one, gates, state)
    one.nsys_daemon().kill()
    gates.importing.open()
    gates.analysing.open()
    done = whole(one, url)
    gets_on(one)
    until(lambda: refuses(one), "refusal of what no nsys can record")
    assert one.ask("GET", url)[1]["state"] == done["state"]


@pytest.mark.parametrize("state", ["importing", "analysing"])
def test_one_whose_import_or_analysis_is_killed_fails_and_the_next_is_done(
    lasting: tuple[Gates, Wrapped], state: str
) -> None:
    gates, one = lasting
    url = begin_and_hold(one, gates, state)
    for process in {"importing": gates.importers, "analysing": gates.analysers}[state]():
        process.kill()
    assert {"importing": "nsys export", "analysing": "cannot be analysed"}[state] in failed(one, url)
    gates.importing.open()
    gates.analysing.open()
    another(one)


def test_a_recording_goes_on_after_its_agent_was_killed(lasting: tuple[Gates, Wrapped]) -> None:
    _, one = lasting
    url = one.begin(seconds=4)
    one.recording(url)
    killed = one.kill_agent()
    done = one.state(url, "done")
    assert agent_info(one.directory)["pid"] != killed  # type: ignore[index]
    assert done["times"]["importing"] - done["times"]["recording"] >= 4


def test_a_killed_nsys_fails_the_capture_with_its_words_and_leaves_the_server(
    wrapped: Callable[..., Wrapped],
) -> None:
    one = wrapped()
    target = one.target
    url = one.begin(seconds=3)
    one.recording(url)
    one.nsys_daemon().kill()
    failed = one.state(url, "failed")
    assert "nsys" in failed["reason"]
    assert {path.name for path in (one.captures / failed["id"]).iterdir()} == {"capture.json"}
    assert target.is_running()
    assert one.ask("GET", f"{url}/report")[0] == 409
    gets_on(one)
    assert one.process.poll() is None
    one.process.terminate()
    assert one.process.wait(PATIENCE_SECONDS) == 1
    assert "its exit status is not known" in one.said()
    assert not target.is_running()


def test_a_server_that_dies_fails_its_capture(wrapped: Callable[..., Wrapped]) -> None:
    one = wrapped()
    url = one.begin(seconds=60)
    one.recording(url)
    one.target.kill()
    assert one.process.wait(PATIENCE_SECONDS) == 137
    failed = one.state(url, "failed")
    assert "gone" in failed["reason"]
    assert {path.name for path in (one.captures / failed["id"]).iterdir()} == {"capture.json"}
