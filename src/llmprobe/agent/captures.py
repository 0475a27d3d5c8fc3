"""Captures over HTTP. Everything here blocks, so FastAPI runs it on worker threads, off the event loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmprobe.agent.problems import Problem
from llmprobe.agent.sessions import by_session
from llmprobe.capture import session
from llmprobe.capture.condition import ENGINE_FIGURES, PHASE_FIGURES, Live
from llmprobe.capture.manager import Manager, Refused, choose_tool
from llmprobe.capture.session import Capture
from llmprobe.capture.store import REPORT_JSON, REPORT_TEXT, StoreError, is_public, is_raw
from llmprobe.capture.tool import Worker
from llmprobe.capture.tools import nsys_session, tools_of
from llmprobe.collect.views import EngineView, RankView, ServerView
from llmprobe.export.summary import SCHEMA_VERSION, summarize

log = logging.getLogger("llmprobe.audit")

_CHUNK_BYTES = 1 << 18
_DEFAULT_SECONDS = 5.0
_STATUS = {"busy": 409, "unavailable": 409, "rate": 429, "invalid": 422}
_MEDIA = {
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".sqlite": "application/vnd.sqlite3",
    ".gz": "application/gzip",
}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: {} for media in (*_MEDIA.values(), "application/octet-stream")}}
}
RAW_WARNING = "holds the environment of the captured processes: every token and key in it"
STACKS_WARNING = "holds paths, source lines, host and process names"


class Reader(Protocol):
    """What captures ask of `llmprobe.collect.collector.Collector`."""

    def views(self) -> list[ServerView]:
        """Every live server."""


class CaptureRequest(BaseModel):
    """What ``POST /api/captures`` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tool: Literal["auto", "nsys", "torch", "kernels"] = Field(
        "auto", description="`auto` is the deepest that is available."
    )
    server: str | None = Field(
        None, max_length=128, description="Its label; may be left out where there is one server."
    )
    seconds: float | None = Field(
        None,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="How long to record; 5 if `steps` is left out too.",
    )
    steps: int | None = Field(
        None, ge=1, le=1_000_000, description="How many steps to record, within the longest allowed time."
    )
    when: str = Field(
        "now",
        max_length=200,
        description="`now`, `next prefill`, `next decode`, or `sync_gap_ratio > 0.3 for 10s`.",
    )
    wait_seconds: float = Field(
        300.0, ge=0, le=86400, allow_inf_nan=False, description="How long `when` may take to come true."
    )
    ranks: list[Annotated[int, Field(ge=0, le=65535)]] | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="Of which workers, for torch and kernels; nsys records every rank.",
    )
    torch_cpu: bool = Field(False, description="torch: operators on the host too; on a CPU device always so.")
    torch_stacks: bool = Field(
        False, description="torch: also the Python calls around them. Stops the engine for seconds."
    )
    label: str = Field(
        "", max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$", description="For you to recognise it by."
    )
    queue: bool = Field(False, description="Wait for the capture that runs instead of being refused.")

    @model_validator(mode="after")
    def _one_length(self) -> CaptureRequest:
        if self.seconds is not None and self.steps is not None:
            raise ValueError("seconds and steps exclude each other")
        if self.torch_cpu or self.torch_stacks:
            if self.tool not in ("auto", "torch"):
                raise ValueError(f"torch_cpu and torch_stacks are for tool torch, not {self.tool}")
            self.tool = "torch"
        return self


class Watched:
    """Servers as captures see them."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def live(self, capture: Capture) -> Live | None:
        """What conditions look at; None if there is no such server."""
        view = self._view(capture)
        if view is None:
            return None
        steps: dict[str, dict[str, int]] = {}
        figures: dict[str, list[dict[str, float]]] = {}
        for rank in view.ranks:
            steps[rank.journal.stem if rank.journal else f"{rank.engine}-{rank.rank}"] = dict(rank.steps)
            for phase, known in _figures(rank).items():
                figures.setdefault(phase, []).append(known)
        return Live(
            steps,
            {phase: tuple(known) for phase, known in figures.items()},
            tuple(_known(engine, ENGINE_FIGURES) for engine in view.engines),
            working=any(rank.step_running_seconds is not None for rank in view.ranks)
            or any(engine.requests_running for engine in view.engines),
            stalls=tuple((rank.rank, rank.stall) for rank in view.ranks if rank.stall is not None),
        )

    def figures(self, capture: Capture) -> dict[str, Any] | None:
        """The server's entry in ``/api/status``."""
        view = self._view(capture)
        return None if view is None else dict(summarize([view])["servers"][0])

    def workers(self, capture: Capture) -> list[Worker]:
        """Its living engine processes."""
        view = self._view(capture)
        return [] if view is None else workers_of(view)

    def _view(self, capture: Capture) -> ServerView | None:
        """The server it is of: a group may have several, and another group one of that label later on."""
        asked = capture.server, capture.group
        return next((view for view in self._reader.views() if (view.server, view.group) == asked), None)


def workers_of(view: ServerView) -> list[Worker]:
    """The engine processes of a server, each under a name of its own."""
    several = len({rank.engine for rank in view.ranks}) > 1
    found: list[Worker] = []
    for rank in view.ranks:
        if rank.journal is None:
            continue
        name = f"engine{rank.engine}-rank{rank.rank}" if several else f"rank{rank.rank}"
        taken = sum(one.name == name or one.name.startswith(f"{name}-") for one in found)
        refusals = rank.facts.get("captures")
        found.append(
            Worker(
                rank.journal,
                f"{name}-{taken + 1}" if taken else name,
                rank.rank,
                refusals if isinstance(refusals, dict) else {},
                rank.facts.get("device") or {},
                rank.facts.get("captures_unsafe") or {},
            )
        )
    return found


def _figures(rank: RankView) -> dict[str, dict[str, float]]:
    return {phase: _known(found, PHASE_FIGURES) for phase, found in rank.figures.items()}


def _known(source: EngineView | Any, names: tuple[str, ...]) -> dict[str, float]:
    return {name: float(value) for name in names if (value := getattr(source, name)) is not None}


def add_routes(app: FastAPI, manager: Manager, reader: Reader, directory: Path) -> None:
    """Add the routes of captures to the agent's service."""
    _add_control(app, manager, reader, directory)
    _add_files(app, manager)


def overview(manager: Manager, views: list[ServerView], directory: Path) -> dict[str, Any]:
    """What ``/api/status`` says: what can capture each server, and how captures ended."""
    return {
        **_ways(views, directory),
        "ended": [
            {"tool": tool, "outcome": outcome, "count": count}
            for (tool, outcome), count in sorted(manager.ended.items())
            if count
        ],
    }


def _ways(views: list[ServerView], directory: Path) -> dict[str, Any]:
    """By server: its tools (null, or why not), and what nsys traces where it runs under nsys."""
    sessions = {view.server: nsys_session(directory, view.group) for view in views}
    return {
        "tools": {view.server: tools_of(directory, view.group, workers_of(view)) for view in views},
        "nsys": {server: session for server, session in sessions.items() if session is not None},
    }


def _add_control(app: FastAPI, manager: Manager, reader: Reader, directory: Path) -> None:
    @app.post("/api/captures", status_code=202, summary="Begin a capture; 202 with its URL")
    def begin(wanted: CaptureRequest, response: Response) -> dict[str, Any]:
        view = _server(reader, wanted.server)
        try:
            # What is wrong whatever runs comes before what runs; both before nsys is asked.
            manager.check_wanted(wanted.when, wanted.seconds)
            manager.check_room(view.group, queue=wanted.queue)
            tool = choose_tool(directory, view.group, wanted.tool, workers_of(view), wanted.ranks)
            seconds = None if wanted.steps else wanted.seconds
            if seconds is None and wanted.steps is None:
                seconds = min(_DEFAULT_SECONDS, manager.max_seconds)
            capture = manager.request(
                view.group,
                view.server,
                session.Request(
                    tool,
                    seconds,
                    wanted.steps,
                    wanted.when,
                    wanted.wait_seconds,
                    wanted.label,
                    None if wanted.ranks is None or tool == "nsys" else tuple(wanted.ranks),
                    wanted.torch_cpu,
                    wanted.torch_stacks,
                ),
                queue=wanted.queue,
            )
        except Refused as refused:
            raise _problem(refused) from None
        response.headers["Location"] = f"/api/captures/{capture.id}"
        log.info("capture %s of %s begun: %s", capture.id, capture.server, capture.request)
        return _described(manager, capture)

    @app.get("/api/captures", summary="Every capture, newest first, and what can be captured")
    def captures() -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "captures": [_described(manager, capture) for capture in manager.all()],
            **_ways(reader.views(), directory),
            "directory": str(manager.store.root),
            "max_seconds": manager.max_seconds,
            "max_bytes": manager.store.max_bytes,
        }

    @app.get("/api/captures/{capture_id}", summary="One capture: its state, and its files")
    def capture(capture_id: str) -> dict[str, Any]:
        return _described(manager, _get(manager, capture_id))

    @app.delete("/api/captures/{capture_id}", summary="Stop a capture, and remove it with its files")
    def delete(capture_id: str, response: Response) -> dict[str, Any]:
        try:
            removed = manager.delete(capture_id)
        except KeyError:
            raise _no_capture(capture_id) from None
        except StoreError as error:
            raise Problem(409, f"{error}.", "Ask again once that is mended.") from None
        response.status_code = 200 if removed else 202
        return {"schema_version": SCHEMA_VERSION, "id": capture_id, "removed": removed}


def _add_files(app: FastAPI, manager: Manager) -> None:
    @app.get(
        "/api/captures/{capture_id}/report",
        summary="What the capture showed, as JSON or text",
        responses=_FILE,
    )
    def report(capture_id: str, request: Request) -> Response:
        text = request.headers.get("accept", "").startswith("text/plain")
        return _file(manager, capture_id, REPORT_TEXT if text else REPORT_JSON)

    @app.get("/api/captures/{capture_id}/files/{name}", summary="One file of a capture", responses=_FILE)
    def file(
        capture_id: str,
        name: str,
        request: Request,
        raw: Annotated[int, Query(ge=0, le=1, description="1: also what holds the environment.")] = 0,
    ) -> Response:
        if is_raw(name) and not raw:
            raise Problem(403, f"{name} {_warning(name)}.", "Add ?raw=1 if you want it nevertheless.")
        if is_raw(name) and by_session(request):
            raise Problem(
                403,
                f"{name} {_warning(name)}: the cookie of a session does not open it.",
                "Send the token itself.",
            )
        return _file(manager, capture_id, name)


def _file(manager: Manager, capture_id: str, name: str) -> Response:
    capture = _get(manager, capture_id)
    if not is_public(name) and not is_raw(name):
        raise Problem(404, f"No file {name[:64]!r}.", "GET the capture for its files.")
    if capture.state != "done":
        hint = "Ask again once it is done." if capture.live else "Begin another one."
        why = f": {capture.reason}" if capture.reason else ""
        raise Problem(409, f"Capture {capture_id} is {capture.state}{why}.", hint)
    try:
        with manager.store.open(capture_id, name) as held:
            size = os.fstat(held).st_size
            descriptor = os.dup(held)
    except (KeyError, OSError):
        raise Problem(404, f"Capture {capture_id} has no {name}.", "GET the capture for its files.") from None
    headers = {
        "Content-Length": str(size),
        "Content-Disposition": f'attachment; filename="{capture_id}-{name}"',
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    if is_raw(name):
        headers["X-Llmprobe-Warning"] = _warning(name)
    media = _MEDIA.get(Path(name).suffix, "application/octet-stream")
    return StreamingResponse(_chunks(descriptor, size), headers=headers, media_type=media)


def _warning(name: str) -> str:
    return RAW_WARNING if name.endswith(".nsys-rep") else STACKS_WARNING


def _chunks(descriptor: int, size: int) -> Iterator[bytes]:
    # Opened here and not in the generator, so that it is closed also if nobody ever reads.
    source = os.fdopen(descriptor, "rb", buffering=0)

    def read() -> Iterator[bytes]:
        left = size
        with source:
            while left > 0 and (chunk := source.read(min(_CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk

    return read()


def _server(reader: Reader, name: str | None) -> ServerView:
    views = reader.views()
    names = ", ".join(sorted(view.server for view in views)) or "none"
    if name is None and len(views) == 1:
        return views[0]
    if name is None:
        raise Problem(
            409 if not views else 422,
            f"`server` is left out, and there are {len(views)} servers.",
            f"Servers now: {names}." if views else "Start one with LLMPROBE=1.",
        )
    for view in views:
        if view.server == name:
            return view
    raise Problem(404, f"No such server: {name!r}.", f"Servers now: {names}.")


def _get(manager: Manager, capture_id: str) -> Capture:
    try:
        return manager.get(capture_id)
    except KeyError:
        raise _no_capture(capture_id) from None


def _no_capture(capture_id: str) -> Problem:
    return Problem(404, f"No capture {capture_id[:64]!r}.", "GET /api/captures lists them.")


def _problem(refused: Refused) -> Problem:
    headers = {}
    if refused.other is not None:
        headers["Link"] = f'</api/captures/{refused.other}>; rel="related"'
    if refused.kind == "rate":
        headers["Retry-After"] = "60"
    return Problem(_STATUS[refused.kind], refused.detail, refused.hint, headers)


def _described(manager: Manager, capture: Capture) -> dict[str, Any]:
    """A capture as callers see it. Times are Unix seconds, progress 0 to 1 of the present state."""
    url = f"/api/captures/{capture.id}"
    described = capture.to_json()
    for ours in ("schema", "owner", "clocks", "boot"):
        del described[ours]
    described.update(schema_version=SCHEMA_VERSION, url=url)
    if capture.state == "done":
        described["report"] = f"{url}/report"
        described["files"] = [
            {
                "name": name,
                "bytes": size,
                "url": f"{url}/files/{name}" + ("?raw=1" if is_raw(name) else ""),
                **({"warning": _warning(name)} if is_raw(name) else {}),
            }
            for name, size in manager.store.files(capture.id).items()
        ]
    return described
