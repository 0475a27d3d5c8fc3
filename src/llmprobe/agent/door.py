"""Who may ask what: the checks between a listening socket and the service.

The loopback interface is no user boundary, and a web page that a user visits can reach it too. So the
Host header must name us (a page on another site that rebinds its name to 127.0.0.1 cannot fake that), a
request from a page must come from one of our own address, also if it only reads (it need not read the answer
to take a place among the listeners), and switches and captures need the token, or the cookie that such a
page was given for it. On the Unix socket the file system has already checked the user.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llmprobe.agent.bucket import HOLD_SECONDS, Bucket, hold
from llmprobe.agent.files import Token
from llmprobe.agent.problems import Problem
from llmprobe.agent.sessions import Sessions

#: What a scraper needs, and all that an open door without a token file serves.
PUBLIC_PATHS = frozenset({"/metrics", "/healthz"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
#: What lies here tells more than figures do: reading it needs the token too, even on loopback.
_GUARDED = "/api/captures"

Kind = Literal["unix", "loopback", "open"]


@dataclass(frozen=True)
class Door:
    """One way in.

    ``token`` is None on an open door without ``LLMPROBE_TOKEN_FILE``: then only `PUBLIC_PATHS` are served.
    """

    kind: Kind
    token: Token | None
    names: frozenset[str] = frozenset()
    #: None where no page can come in: there are no cookies then.
    sessions: Sessions | None = None

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> Problem | None:
        """Why a request may not pass; None if it may. ``headers`` has lower-case names."""
        if self.kind == "unix":
            return None
        public = path in PUBLIC_PATHS and method in _READING
        if self.kind == "open" and public:
            return self._check_site(method, path, headers)  # scrapers' names for us we cannot know
        if self.token is None:
            return Problem(
                403,
                f"{path} is not served here: the agent listens beyond loopback without a token file.",
                "Set LLMPROBE_TOKEN_FILE, or ask on the node itself with `llmprobe status`.",
            )
        return (
            self._check_host(headers)
            or self._check_origin(headers)
            or self._check_site(method, path, headers)
            or self._check_token(method, is_guarded(method, path), headers)
        )

    def by_session(self, headers: Mapping[str, str]) -> bool:
        """Whether a request that may pass has not shown the token itself."""
        return self.sessions is not None and not self._has_token(headers)

    def _check_host(self, headers: Mapping[str, str]) -> Problem | None:
        host = headers.get("host", "")
        name = _host_name(host)
        if name and (name in self.names or _is_address(name)):
            return None
        return Problem(
            403,
            f"Host {host!r} does not name this agent.",
            "Ask for it by IP address, localhost or this machine's name.",
        )

    def _check_origin(self, headers: Mapping[str, str]) -> Problem | None:
        origin = headers.get("origin")
        if origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower():
            return None
        return Problem(
            403,
            f"Origin {origin!r} is another site.",
            "Call the agent from a program, such as curl or `llmprobe status`.",
        )

    def _check_site(self, method: str, path: str, headers: Mapping[str, str]) -> Problem | None:
        """A browser tells from what site a request comes also where it sends no ``Origin``.

        A link may lead from another site to what we show outside of the API, in a tab of its own, which that
        site cannot read.
        """
        site = headers.get("sec-fetch-site", "").lower()
        if site not in ("cross-site", "same-site"):
            return None
        opened = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        if opened and method == "GET" and not path.startswith("/api"):
            return None
        return Problem(
            403,
            f"A page of another site asks for {path} (Sec-Fetch-Site: {site}).",
            "Call the agent from a program, such as curl or `llmprobe status`.",
        )

    def _has_token(self, headers: Mapping[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return self.token is not None and scheme.lower() == "bearer" and self.token.matches(given.strip())

    def _check_token(self, method: str, guarded: bool, headers: Mapping[str, str]) -> Problem | None:
        if (self.kind == "loopback" and not guarded) or self._has_token(headers):
            return None
        if self.sessions is not None and self.sessions.admits(method, headers):
            return None
        where = self.token.path if self.token is not None else "the token file"
        return Problem(
            401,
            "This needs the agent's token, and the request has none or another one.",
            f'Send "Authorization: Bearer <token>" with the token in {where}, or use the llmprobe command.',
            {"WWW-Authenticate": 'Bearer realm="llmprobe"'},
        )


def is_guarded(method: str, path: str) -> bool:
    """Whether a call needs the token wherever it comes from, and leaves a line in the log."""
    return method not in _READING or path == _GUARDED or path.startswith(f"{_GUARDED}/")


def door_for(host: str, token: Token, token_file_given: bool) -> Door:
    """The door of a TCP socket that listens on ``host``."""
    if is_loopback(host):
        return Door("loopback", token, frozenset({"localhost", host.lower()}), Sessions(token))
    names = {"localhost", host.lower(), socket.gethostname().lower()}
    if not token_file_given:
        return Door("open", None, frozenset(names))
    return Door("open", token, frozenset(names), Sessions(token))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a socket that listens on ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class DoorKeeper:
    """ASGI middleware that applies a door's checks before anything else runs.

    The request's state gets ``by_session``, and ``admitted``, which asks the door again.
    """

    def __init__(self, app: ASGIApp, door: Door, hold_seconds: float = HOLD_SECONDS) -> None:
        """
        Args:
            hold_seconds: how long one waits for a refusal, once there are too many of them.
        """
        self._app = app
        self._door = door
        self._hold_seconds = hold_seconds
        self._refusals = Bucket(rate=50, burst=100)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the problem, or pass the request on."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            problem = self._door.check(scope["method"], scope["path"], headers)
            if problem is not None:
                if not self._refusals.take():
                    await hold(scope, receive, self._hold_seconds)
                await problem.response()(scope, receive, send)
                return
            state = scope.setdefault("state", {})
            state["by_session"] = self._door.by_session(headers)
            # For what lasts: a session ends, and a token is replaced, while it goes on.
            state["admitted"] = lambda: self._door.check(scope["method"], scope["path"], headers) is None
        await self._app(scope, receive, send)
