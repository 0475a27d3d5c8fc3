"""What a page in a browser holds instead of the token: a cookie, which it gets in exchange.

Scripts cannot read it (HttpOnly), other sites cannot have it sent (SameSite=Strict), it says nothing of the
token, and it ends after twelve hours, with `DELETE`, with the agent, or when the token is replaced. Browsers
do not keep cookies apart by port: a page of another port of the same host counts as another site here, and
what a stolen cookie would be worth most for, raw recordings, needs the token itself.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response

from llmprobe.agent.files import Token
from llmprobe.agent.problems import Problem
from llmprobe.export.summary import SCHEMA_VERSION

SECONDS = 12 * 3600
_MOST = 64
_PATH = "/api"
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True)
class _Session:
    digest: bytes  # of what the cookie holds
    token: bytes  # of the token that it was given for
    until: float


class Sessions:
    """The sessions of one door. Used on the event loop alone."""

    def __init__(self, token: Token, clock: Callable[[], float] = time.monotonic) -> None:
        self._token = token
        self._clock = clock
        self._open: list[_Session] = []  # the oldest first

    def begin(self) -> str:
        """A new one: what its cookie holds. The oldest of 64 makes room."""
        value = secrets.token_urlsafe(32)
        self._open = [*self._live(), _Session(_digest(value), self._token_digest(), self._clock() + SECONDS)]
        del self._open[:-_MOST]
        return value

    def end(self, headers: Mapping[str, str]) -> bool:
        """End those that a request names; whether there was one."""
        found = self._find(headers)
        self._open = [one for one in self._open if one not in found]
        return bool(found)

    def seconds_left(self, headers: Mapping[str, str]) -> float | None:
        """Of the one that a request names; None if it names none that is open."""
        found = self._find(headers)
        return max(one.until for one in found) - self._clock() if found else None

    def admits(self, method: str, headers: Mapping[str, str]) -> bool:
        """Whether a request comes from a page of our own address and names an open session.

        A browser tells where a request comes from in ``Sec-Fetch-Site``, or, over plain HTTP beyond loopback,
        in ``Origin`` where the request could change anything; that ``Origin`` is ours was checked before.
        """
        site = headers.get("sec-fetch-site")
        reads = method in _READING
        ours = (
            site == "same-origin"
            or (reads and site == "none")
            or (site is None and (reads or "origin" in headers))
        )
        return ours and bool(self._find(headers))

    def _find(self, headers: Mapping[str, str]) -> list[_Session]:
        given = [_digest(value) for value in _cookies(headers)]
        token = self._token_digest()
        found = []
        for one in self._live():  # all of them, each in constant time
            named = sum(secrets.compare_digest(one.digest, digest) for digest in given)
            if secrets.compare_digest(one.token, token) and named:
                found.append(one)
        return found

    def _live(self) -> list[_Session]:
        now = self._clock()
        return [one for one in self._open if one.until > now]

    def _token_digest(self) -> bytes:
        return _digest(self._token.value())


def add_routes(app: FastAPI, sessions: Sessions) -> None:
    """Add ``/api/session``, which only a page needs: programs send the token each time."""

    @app.post("/api/session", summary="Exchange the token for a cookie, for a page in a browser")
    async def begin(request: Request, response: Response) -> dict[str, Any]:
        if by_session(request):
            raise Problem(
                401, "A cookie cannot be exchanged for another one.", 'Send "Authorization: Bearer <token>".'
            )
        response.set_cookie(
            cookie_name(request.headers),
            sessions.begin(),
            max_age=SECONDS,
            path=_PATH,
            httponly=True,
            samesite="strict",
        )
        response.headers["Cache-Control"] = "no-store"
        return {"schema_version": SCHEMA_VERSION, "open": True, "seconds_left": float(SECONDS)}

    @app.get("/api/session", summary="Whether the request's cookie opens what needs the token")
    async def session(request: Request, response: Response) -> dict[str, Any]:
        left = sessions.seconds_left(request.headers)
        response.headers["Cache-Control"] = "no-store"
        return {"schema_version": SCHEMA_VERSION, "open": left is not None, "seconds_left": left}

    @app.delete("/api/session", summary="End the session of the request's cookie")
    async def end(request: Request, response: Response) -> dict[str, Any]:
        ended = sessions.end(request.headers)
        response.delete_cookie(cookie_name(request.headers), path=_PATH, httponly=True, samesite="strict")
        return {"schema_version": SCHEMA_VERSION, "ended": ended}


def by_session(request: Request) -> bool:
    """Whether a request was let in for its cookie, not for the token."""
    return bool(getattr(request.state, "by_session", False))


def cookie_name(headers: Mapping[str, str]) -> str:
    """Of the agent that a request goes to: several on one host do not take each other's away."""
    try:
        port = urlsplit(f"//{headers.get('host', '')}").port
    except ValueError:
        port = None
    return f"llmprobe_session_{port or 80}"


def _cookies(headers: Mapping[str, str]) -> list[str]:
    """What a request's cookies of our name hold.

    There may be several, where somebody set one for another path or domain, and anything beside them:
    browsers send what other programs on this host set, and `http.cookies` takes none of a header that it does
    not like.
    """
    wanted = cookie_name(headers)
    pairs = (part.partition("=") for part in headers.get("cookie", "").split(";"))
    return [value.strip().strip('"') for name, _, value in pairs if name.strip() == wanted]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
