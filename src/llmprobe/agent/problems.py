"""Errors over HTTP: problem details (RFC 9457) that also say what to do next."""

from __future__ import annotations

import http
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

MEDIA_TYPE = "application/problem+json"

_MEMBERS = {"type": "string", "title": "string", "status": "integer", "detail": "string", "next": "string"}
_SCHEMA = {
    "type": "object",
    "required": list(_MEMBERS),
    "properties": {name: {"type": kind} for name, kind in _MEMBERS.items()},
}
#: The problems that any call may meet, for the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": http.HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": _SCHEMA}}}
    for status in (400, 401, 403, 404, 405, 408, 409, 413, 422, 429, 503, 507)
}


@dataclass(eq=False)
class Problem(Exception):
    """``detail`` says what is wrong, ``next`` what to do about it."""

    status: int
    detail: str
    next: str
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON members. Lone surrogates, which a request may hold and UTF-8 cannot, are "?" there."""
        return {
            "type": "about:blank",
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": _sayable(self.detail),
            "next": _sayable(self.next),
        }

    def response(self) -> JSONResponse:
        """As an HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers, media_type=MEDIA_TYPE)


def _sayable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
