"""The agent's OpenAPI document, turned against it: schemathesis sends what it allows and what it does not.

No answer is a 5xx, each is as the document says, and nothing is written or run but what a capture needs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from capture.scripted_nsys import ScriptedNsys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmprobe.agent import limits
from llmprobe.agent.captures import Watched
from llmprobe.agent.door import door_for
from llmprobe.agent.files import Token
from llmprobe.agent.service import State, create_app
from llmprobe.capture import manager as managing
from llmprobe.capture.manager import Manager
from llmprobe.capture.session import Capture, Request
from llmprobe.capture.store import RAW, Store
from llmprobe.record.agent_launch import CONTROL_NAME

from .served import collected

schemathesis = pytest.importorskip("schemathesis")  # it needs Python 3.11
HOST = "127.0.0.1:9480"
EXAMPLES = 25
#: These never end, and have tests of their own.
STREAMS = ("/api/events",)


class Watcher:
    """What this process writes, and which programs it starts, while it is ``on``."""

    def __init__(self) -> None:
        self.on = False
        self.written: set[str] = set()
        self.started: list[list[str]] = []

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            nameless = arguments[0] == tempfile.gettempdir()  # how files without a name are made
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not nameless:
                self._note(arguments[0])
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            self._note(arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._note(arguments[0])
            self._note(arguments[1])
        elif event == "subprocess.Popen":
            self.started.append([os.fsdecode(word) for word in arguments[1]])
        elif event in ("os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self.started.append([event, *map(str, arguments)])

    def _note(self, path: Any) -> None:
        if not isinstance(path, int):  # a descriptor was opened before
            self.written.add(os.fsdecode(path))


WATCHER = Watcher()
sys.addaudithook(WATCHER.see)  # for good, as Python takes none back; off it does nothing


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """An agent with one server that the scripted nsys captures, and one capture that is done."""
    monkeypatch.setattr(managing, "_STARTS_PER_MINUTE", 1 << 30)  # or most answers would be 429
    monkeypatch.setattr(limits.Bucket, "take", lambda self: True)
    monkeypatch.setattr(limits.Bucket, "pay", lambda self, amount: None)
    with collected(tmp_path) as collector:
        store = Store(tmp_path / "captures", 1 << 20, least_free_bytes=0)
        manager = Manager(store, tmp_path, Watched(collector), max_seconds=60.0)
        yield State(collector, tmp_path, since_read=lambda: 0.1, captures=manager)
        WATCHER.on = False
        manager.close()


@pytest.fixture
def finished(state: State) -> str:
    """The id of a capture that is done."""
    assert state.captures is not None
    capture = Capture(
        id=state.captures.store.new_id(),
        owner="/gone",
        server="prog",
        group="g",
        request=Request("nsys", 1.0, None),
        times={"pending": 1.0},
    )
    for step in ("recording", "importing", "analysing", "done"):
        capture = capture.enter(step, 2.0)
    state.captures.store.create(capture)
    for name in ("report.json", "report.txt", RAW):
        (state.captures.store.folder(capture.id) / name).write_bytes(b"{}")
    return capture.id


def test_the_document_describes_every_call_and_the_agent_keeps_to_it(
    state: State, finished: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    nsys = ScriptedNsys(tmp_path / "scripted", tmp_path)
    token = Token.make(tmp_path)
    app = create_app(state, door_for("127.0.0.1", token, token_file_given=False))
    schema = schemathesis.openapi.from_dict(app.openapi())
    schema.app = app
    headers = {"Host": HOST, "Authorization": f"Bearer {token.value()}"}
    checks = schemathesis.checks.CHECKS
    # What the document cannot say, such as that `seconds` and `steps` exclude each other, is a 422 too.
    excluded = checks.get_by_names(["positive_data_acceptance"])
    # A body that is too large is refused before it is read; the check does not know that for a refusal.
    unread = checks.get_by_names(["positive_data_acceptance", "negative_data_rejection"])
    seen: dict[str, set[int]] = {}

    def call(case: Any) -> None:
        answer = case.call(base_url=f"http://{HOST}", headers=headers)
        seen.setdefault(case.operation.label, set()).add(answer.status_code)
        assert answer.status_code < 500, (case, answer.text)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == ["application/problem+json"]
        case.validate_response(answer, excluded_checks=unread if answer.status_code == 413 else excluded)

    WATCHER.written.clear()
    WATCHER.started.clear()
    WATCHER.on = True
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in STREAMS:
            continue
        for cases in _cases(operation, finished):
            settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )(given(cases)(call))()
    WATCHER.on = False

    print(seen)
    assert seen["POST /api/captures"] >= {202, 409, 422}  # or nothing was reached
    assert seen["GET /api/captures/{capture_id}"] >= {200, 404}
    assert 200 in seen["GET /api/captures/{capture_id}/report"]
    assert seen["GET /api/captures/{capture_id}/files/{name}"] >= {200, 403, 404}
    assert state.captures is not None
    # A finished capture reads the steps that ran meanwhile: asking for the lock of a journal takes a writable
    # descriptor.
    allowed = (str(state.captures.store.root), str(tmp_path / "nsys"), str(tmp_path / "journals"))
    # Names without a folder are relative to one that was opened before, or to `here`.
    others = {path for path in WATCHER.written if "/" in path and not path.startswith(allowed)}
    of_tools = (".hypothesis", "__pycache__", os.devnull)
    assert not [path for path in others if CONTROL_NAME not in path and not any(w in path for w in of_tools)]
    assert any(path.startswith(allowed[0]) for path in WATCHER.written)  # or this could not fail
    assert not list((tmp_path / "here").iterdir())
    programs = {words[0] for words in WATCHER.started}
    assert programs <= {nsys.session.nsys, sys.executable}
    for words in WATCHER.started:
        if words[0] == sys.executable:
            assert words[1] == "-m", words
            assert words[2] in ("llmprobe.capture.work", "llmprobe.capture.tether"), words
    assert (tmp_path / "captures" / finished).is_dir()


def _cases(operation: Any, finished: str) -> Iterator[st.SearchStrategy[Any]]:
    """What the document allows, also about a capture that is there, and what it does not."""
    mode = schemathesis.GenerationMode
    yield operation.as_strategy(generation_mode=mode.POSITIVE)
    if operation.body or operation.query:
        yield operation.as_strategy(generation_mode=mode.NEGATIVE)
    names = ["report.json", "report.txt", "capture.sqlite", "capture.json", RAW, "../token", "%2e%2e"]
    if "{name}" in operation.path:
        for name in names:
            yield operation.as_strategy(path_parameters={"capture_id": finished, "name": name})
    elif "{capture_id}" in operation.path and operation.method != "delete":
        yield operation.as_strategy(path_parameters={"capture_id": finished})
