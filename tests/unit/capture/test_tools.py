"""Which tools can capture a server, which is chosen, and what its nsys session is known to do."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest

from llmprobe.capture.manager import Manager, Refused, choose_tool
from llmprobe.capture.nsys_tool import ask_why_not_nsys
from llmprobe.capture.tool import Worker
from llmprobe.capture.tools import nsys_session, tools_of

from .managed import ask, until
from .scripted_nsys import ScriptedNsys


def worker(rank: int, **refusals: str | None) -> Worker:
    return Worker(Path(f"/journals/worker-{rank}.journal"), f"rank{rank}", rank, refusals)


def test_tools_say_what_they_lack(directory: Path, nsys: ScriptedNsys) -> None:
    workers = [worker(0, torch=None, kernels="no GPU"), worker(1, torch="busy", kernels="no GPU")]
    said = tools_of(directory, "g", workers)
    assert said == {"nsys": None, "torch": "rank1: busy", "kernels": "rank0: no GPU"}
    assert tools_of(directory, "g", workers[:1])["kernels"] == "no GPU"
    assert "no process" in (tools_of(directory, "g", [])["torch"] or "")
    assert "not said" in (tools_of(directory, "g", [worker(0)])["torch"] or "")


def test_the_deepest_tool_that_is_available_is_taken(directory: Path, nsys: ScriptedNsys) -> None:
    both, light = worker(0, torch=None, kernels=None), worker(0, torch="busy", kernels=None)
    assert choose_tool(directory, "g", "auto", [both]) == "nsys"
    assert choose_tool(directory, "g", "kernels", [both]) == "kernels"
    assert choose_tool(directory, "another", "auto", [both]) == "torch"
    assert choose_tool(directory, "another", "auto", [light]) == "kernels"
    careful = dataclasses.replace(both, unsafe={"torch": "it would stop the engine"})
    assert choose_tool(directory, "another", "auto", [both, careful]) == "kernels"
    assert choose_tool(directory, "another", "torch", [careful]) == "torch"
    alone = dataclasses.replace(careful, refusals={"torch": None, "kernels": "no GPU"})
    assert choose_tool(directory, "another", "auto", [alone]) == "torch"
    with pytest.raises(Refused, match="llmprobe run --nsys"):
        choose_tool(directory, "another", "nsys", [both])
    with pytest.raises(Refused, match=r"nsys: .*llmprobe run --nsys.*; torch: busy; kernels: no GPU"):
        choose_tool(directory, "another", "auto", [worker(0, torch="busy", kernels="no GPU")])


@pytest.mark.parametrize(("broken", "said"), [("gone", "session is gone"), ("Shutdown", "has failed")])
def test_an_nsys_that_is_no_more_is_refused_and_shown_until_it_is_back(
    directory: Path, nsys: ScriptedNsys, manager: Manager, broken: str, said: str
) -> None:
    one = worker(0, torch=None, kernels=None)
    nsys.does(broken) if broken == "gone" else nsys.set_state(broken)
    with pytest.raises(Refused, match=said) as caught:
        choose_tool(directory, "g", "nsys", [one])
    assert caught.value.kind == "unavailable"
    assert said in (tools_of(directory, "g", [one])["nsys"] or "")
    assert choose_tool(directory, "g", "auto", [one]) == "torch"
    assert said in (until(manager, manager.request("g", "s", ask()), "failed").reason or "")
    nsys.undo("gone")
    nsys.set_state("Launched")
    assert choose_tool(directory, "g", "nsys", [one]) == "nsys"
    assert tools_of(directory, "g", [one])["nsys"] is None
    nsys.session.lose(directory, "it broke")
    nsys.session.forget(directory)
    assert not list((directory / "nsys").iterdir())
    nsys.session.lose(directory, "it broke")  # by an agent that asked nsys while the server ended
    assert not list((directory / "nsys").iterdir())


def test_nsys_is_asked_about_a_session_once_at_a_time(directory: Path, nsys: ScriptedNsys) -> None:
    nsys.set_state("Shutdown")
    nsys.does("hang")
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(ask_why_not_nsys(directory, "g")))
    thread.start()
    deadline = time.monotonic() + 60
    while not nsys.asked():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ask_why_not_nsys(directory, "g") is None  # nothing is noted yet
    assert (nsys.asked(), found) == (1, [])
    nsys.undo("hang")
    thread.join(60)
    assert "has failed" in (found[0] or "")
    assert ask_why_not_nsys(directory, "g") == found[0]
    assert nsys.asked() == 2


@pytest.mark.parametrize(
    ("trace", "said", "known"),
    [
        (["cuda", "nvtx"], {}, "node"),  # older notes did not say it: it was always so
        (["nvtx"], {}, None),
        (["cuda"], {"cuda_graph_trace": "graph"}, "graph"),
    ],
)
def test_how_graphs_are_recorded_is_noted(
    directory: Path, nsys: ScriptedNsys, trace: list[str], said: dict[str, str], known: str | None
) -> None:
    path = nsys.session.note(directory)
    note = json.loads(path.read_text())
    del note["cuda_graph_trace"]
    path.write_text(json.dumps({**note, "trace": trace, **said}))
    assert nsys_session(directory, "g") == {"trace": trace, "cuda_graph_trace": known}
    assert nsys_session(directory, "another") is None


def test_some_ranks_are_not_for_nsys(directory: Path, nsys: ScriptedNsys) -> None:
    workers = [worker(0, torch=None, kernels=None), worker(1, torch="busy", kernels=None)]
    assert choose_tool(directory, "g", "auto", workers, [0, 1]) == "nsys"
    assert choose_tool(directory, "g", "auto", workers, [0]) == "torch"
    assert choose_tool(directory, "g", "auto", workers, [1]) == "kernels"
    for wanted, ranks, said in (
        ("nsys", [1], "every process"),
        ("torch", [2], "there are"),
        ("auto", [], "there"),
    ):
        with pytest.raises(Refused, match=said) as caught:
            choose_tool(directory, "g", wanted, workers, ranks)
        assert caught.value.kind == "invalid"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "x; reboot"),
        ("name", "--help"),
        ("nsys", "nsys"),
        ("temporary", "tmp"),
        ("group", "other"),
        ("trace", 1),
    ],
)
def test_a_note_that_is_not_ours_is_no_session(
    directory: Path, nsys: ScriptedNsys, key: str, value: object
) -> None:
    import json

    path = nsys.session.note(directory)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert tools_of(directory, "g", [])["nsys"] is not None
