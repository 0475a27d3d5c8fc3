"""The agent over HTTP: metrics, health, status, steps, the switch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import llmprobe
from llmprobe.agent import captures, events, files, sessions
from llmprobe.agent.door import Door, DoorKeeper
from llmprobe.agent.event_log import EventLog
from llmprobe.agent.head import Head
from llmprobe.agent.limits import Audit, Limits
from llmprobe.agent.problems import RESPONSES, Problem
from llmprobe.capture.manager import Manager
from llmprobe.collect.views import ServerView
from llmprobe.export.prometheus import ViewCollector
from llmprobe.export.summary import SCHEMA_VERSION, plain, summarize

log = logging.getLogger("llmprobe.agent")

_MOST_STEPS = 4096
_STALE_SECONDS = 5.0
#: Engines look for a switch every quarter second, and see only the newest.
_FOLLOWED_SECONDS = 1.0
_MOST_SHOWN = 64
_ENDPOINTS = """\
llmprobe {version} - what is your LLM server bound by?

GET  /metrics            Prometheus
GET  /healthz            is the agent at work
GET  /api/status         every server's figures, as JSON
GET  /api/steps?last=N   the newest steps
GET  /api/events         what changes, as it changes (server-sent events)
POST /api/probe          {{"armed": true|false, "servers": [...]}}; needs the token
POST /api/captures       {{"seconds": 5, ...}}: look deeper into a running server; needs the token
GET  /api/captures       captures, and what can be captured; needs the token
POST /api/session        exchanges the token for a cookie: for a page in a browser
GET  /openapi.json       the exact description
"""


class Reader(Protocol):
    """What the service asks of `llmprobe.collect.collector.Collector`."""

    def views(self) -> list[ServerView]:
        """Every live server."""

    def alive(self) -> int:
        """How many live processes are read."""

    def recent_steps(self, last: int) -> list[dict[str, Any]]:
        """The newest steps, newest last."""


@dataclass
class State:
    """What the service shows."""

    reader: Reader
    directory: Path
    #: As published in ``agent.json``.
    info: dict[str, Any] = field(default_factory=dict)
    #: Seconds since journals were last read successfully; None if never.
    since_read: Callable[[], float | None] = lambda: None
    #: The agent's own errors by job.
    errors: Callable[[], dict[str, int]] = dict
    #: What runs captures; None: no capture can be asked for.
    captures: Manager | None = None
    #: What changed.
    events: EventLog = field(default_factory=EventLog)
    #: Writes the switch, one call at a time.
    switch: Switching = field(default_factory=lambda: Switching())

    def status(self) -> dict[str, Any]:
        """What ``GET /api/status`` answers."""
        agent = {**self.info, "errors": self.errors(), "switch": files.read_switch(self.directory)}
        views = self.reader.views()
        if self.captures is not None:
            agent["captures"] = captures.overview(self.captures, views, self.directory)
        return {**summarize(views), "time": time.time(), "agent": agent}


class Switching:
    """Writes the switch for engines, and gives them the time to see one before the next takes its place."""

    def __init__(self, pause: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._pause = pause
        self._turn = asyncio.Lock()
        self._servers: set[str] | None = set()
        self._written = 0.0

    async def write(
        self, directory: Path, armed: bool, servers: list[str] | None, journals: list[Path] | None
    ) -> dict[str, Any]:
        """As `llmprobe.agent.files.switch`. Raises OSError."""
        async with self._turn:
            wait = self._written + _FOLLOWED_SECONDS - time.monotonic()
            if wait > 0 and not self._replaced_by(servers):
                await self._pause(wait)
            control = files.switch(directory, armed, servers, journals)
            self._servers = None if servers is None else set(servers)
            self._written = time.monotonic()
            return control

    def _replaced_by(self, servers: list[str] | None) -> bool:
        """Whether a switch for these is meant for everyone whom the one before was meant for."""
        return servers is None or (self._servers is not None and self._servers <= set(servers))


class Switch(BaseModel):
    """What ``POST /api/probe`` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    armed: bool = Field(description="Whether the probes shall record.")
    servers: list[Annotated[str, Field(max_length=128)]] | None = Field(
        None, max_length=1024, description="The servers it is meant for, by their label; all if left out."
    )


def create_app(state: State, door: Door) -> FastAPI:
    """The service behind one door (see `llmprobe.agent.door`)."""
    app = FastAPI(
        title="llmprobe agent",
        version=llmprobe.__version__,
        description="What each LLM server on this node is bound by, live.",
        docs_url=None,  # those pages load their scripts from elsewhere
        redoc_url=None,
        responses=RESPONSES,
    )
    # The last one added comes first: who asks is checked before anything of it is read.
    # Who comes through the Unix socket is the server's own user, whose machine it is.
    app.add_middleware(Head)
    app.add_middleware(Limits, bounded=door.kind != "unix")
    app.add_middleware(DoorKeeper, door=door)
    app.add_middleware(Audit, kind=door.kind)
    _add_error_handlers(app)
    _add_reading(app, state)
    _add_switch(app, state)
    events.add_routes(app, state.events)
    if door.sessions is not None:
        sessions.add_routes(app, door.sessions)
    if state.captures is not None:
        captures.add_routes(app, state.captures, state.reader, state.directory)
    return app


def _add_reading(app: FastAPI, state: State) -> None:
    registry = CollectorRegistry(auto_describe=False)
    ended = state.captures.ended if state.captures is not None else {}
    registry.register(ViewCollector(state.reader.views, llmprobe.__version__, lambda: ended))
    ProcessCollector(registry=registry)

    @app.get("/", response_class=PlainTextResponse, include_in_schema=False)
    async def root() -> str:
        return _ENDPOINTS.format(version=llmprobe.__version__)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Every server's metrics for Prometheus")
    async def metrics(request: Request) -> Response:
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # of versions that are none
            encode, content_type = choose_encoder("")
        return Response(encode(registry), media_type=content_type)

    @app.get("/healthz", summary="Whether the agent reads journals")
    async def healthz() -> dict[str, Any]:
        age = state.since_read()
        if age is None or age > _STALE_SECONDS:
            raise Problem(503, "The agent does not get to read journals.", "See agent.log in its directory.")
        return {
            "status": "ok",
            "version": llmprobe.__version__,
            "processes": state.reader.alive(),
            "last_read_seconds": round(age, 3),
        }

    @app.get("/api/status", summary="Every server's figures")
    async def status() -> dict[str, Any]:
        return state.status()

    @app.get("/api/steps", summary="The newest steps of all ranks, newest last")
    async def steps(last: Annotated[int, Query(ge=1, le=_MOST_STEPS)] = 100) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "steps": plain(state.reader.recent_steps(last))}


def _add_switch(app: FastAPI, state: State) -> None:
    @app.post("/api/probe", summary="Switch probes on or off, without a restart of the engine")
    async def probe(switch: Switch) -> dict[str, Any]:
        journals = {view.server: view.journals for view in state.reader.views()}
        if unknown := sorted(set(switch.servers or ()) - set(journals)):
            raise Problem(
                404,
                f"No such server: {', '.join(unknown)}.",
                f"Servers now: {', '.join(sorted(journals)) or 'none'}; leave `servers` out to switch all.",
            )
        chosen = (
            None
            if switch.servers is None
            else [journal for name in switch.servers for journal in journals[name]]
        )
        try:
            control = await state.switch.write(state.directory, switch.armed, switch.servers, chosen)
        except OSError as error:
            raise Problem(
                507, f"The switch cannot be written: {error.strerror}.", f"Make room in {state.directory}."
            ) from None
        whom = "all servers" if control["servers"] is None else control["servers"]
        log.info("probes switched %s for %s", "on" if switch.armed else "off", whom)
        return {"schema_version": SCHEMA_VERSION, **control}


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail = f"{request.method} {request.url.path}: {error.detail}."
        hint = "See GET / for what there is."
        return Problem(error.status_code, detail, hint, dict(error.headers or {})).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        media = request.headers.get("content-type", "")
        said = "; ".join(
            _no_object(item, media) or f"{_place(item['loc'])}: {_wrong(item)}" for item in error.errors()
        )
        return Problem(422, f"{said}.", "See GET /openapi.json for what is allowed.").response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return Problem(
            500, f"{type(error).__name__} in the agent.", "See agent.log in its directory."
        ).response()


def _no_object(item: Mapping[str, Any], media: str) -> str | None:
    """What to say where the body as a whole is not what can be looked at; pydantic speaks of itself there."""
    if item["type"] == "json_invalid":
        return f"The body is no JSON, at character {item['loc'][-1]}: {item.get('ctx', {}).get('error')}"
    if tuple(item["loc"]) != ("body",):
        return None
    if item["type"] == "missing":
        return "The body is empty, and a JSON object is wanted; {} will do where nothing is to be said"
    if item["type"] not in ("model_attributes_type", "model_type", "dict_type"):
        return None
    if isinstance(item.get("input"), bytes):  # curl -d says that it sends a form
        sent = repr(media[:_MOST_SHOWN]) if media else "none"
        return f"The body is JSON only with the header Content-Type: application/json, and there is {sent}"
    return "The body is JSON, but no object"


def _wrong(item: Mapping[str, Any]) -> str:
    """What is wrong with a value, and the value itself where it is short enough to be one of ours."""
    if item["type"] == "extra_forbidden":
        return "there is no such member"
    message, given = str(item["msg"]).removeprefix("Value error, "), item.get("input")
    if isinstance(given, (str, int, float)) and len(shown := repr(given)) <= _MOST_SHOWN:
        return f"{message}, not {shown}"
    return message


def _place(location: Sequence[str | int]) -> str:
    return ".".join(map(str, location)) or "request"
