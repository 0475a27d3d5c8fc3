"""HEAD where health checks and scrapers ask for it: FastAPI's routes answer GET alone."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: What is short and ends; a stream of events does not, and a capture's file would be read for nothing.
_PATHS = frozenset({"/", "/metrics", "/healthz", "/api/status"})


class Head:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"] not in _PATHS:
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, without_body)
