"""Notes when each request passes where, in vLLM's server and in its client. Part of ``ttft_parts.py``.

Python imports this at its start where the folder is on PYTHONPATH. One line a mark, in the file that
TTFT_MARKS names: the place, the request's id, nanoseconds of CLOCK_MONOTONIC. No clock of llmprobe is used.
"""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

from llmprobe.hooks.on_import import when_imported

_now = time.monotonic_ns
_ID = re.compile(rb"x-request-id: ?([^\r\n]+)", re.IGNORECASE)


class Marks:
    """The file, opened once a process."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, place: str, request: str, when_ns: int) -> None:
        """``request`` passed ``place``."""
        os.write(self._fd, (json.dumps([place, request, when_ns]) + "\n").encode())

    def add_in(self, place: str, data: bytes, when_ns: int) -> str | None:
        """The request whose headers are in ``data`` passed; returns its id."""
        found = _ID.search(data)
        if found is None:
            return None
        request = found[1].decode()
        self.add(place, request, when_ns)
        return request


def server_http(module: Any, marks: Marks) -> None:
    """uvicorn: the application is called; the first piece of its response was handed to the connection."""
    cycle = module.RequestResponseCycle
    run_asgi, send = cycle.run_asgi, cycle.send
    waiting: dict[int, str] = {}

    async def marked_run_asgi(self: Any, app: Any) -> None:
        when = _now()
        for name, value in self.scope["headers"]:
            if name.lower() == b"x-request-id":
                marks.add("called", value.decode(), when)
                waiting[id(self)] = value.decode()
        try:
            await run_asgi(self, app)
        finally:
            waiting.pop(id(self), None)

    async def marked_send(self: Any, message: Any) -> None:
        await send(self, message)
        if id(self) in waiting and message["type"] == "http.response.body" and message.get("body"):
            marks.add("sent", waiting.pop(id(self)), _now())

    cycle.run_asgi, cycle.send = marked_run_asgi, marked_send


def server_engine(module: Any, marks: Marks) -> None:
    """vLLM: the first token is detokenized and with its stream."""
    original = module.OutputProcessor.process_outputs
    seen: set[str] = set()

    def process_outputs(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, outputs, *args, **kwargs)
        for output in outputs:
            if output.request_id not in seen:
                seen.add(output.request_id)
                marks.add("token", output.request_id, _now())
        return result

    module.OutputProcessor.process_outputs = process_outputs


def client_http(module: Any, marks: Marks) -> None:
    """aiohttp: the request is handed to the connection."""
    writer = module.StreamWriter
    write, write_lines = writer._write, writer._writelines

    def marked_write(self: Any, chunk: Any) -> Any:
        marks.add_in("written", bytes(chunk), _now())
        return write(self, chunk)

    def marked_write_lines(self: Any, chunks: Any) -> Any:
        chunks = list(chunks)
        marks.add_in("written", b"".join(chunks), _now())
        return write_lines(self, chunks)

    writer._write, writer._writelines = marked_write, marked_write_lines


def client_requests(module: Any, marks: Marks) -> None:
    """vllm bench serve: its own times of a request."""
    functions = module.ASYNC_REQUEST_FUNCS

    def marked(original: Any) -> Any:
        async def request(request_func_input: Any, *args: Any, **kwargs: Any) -> Any:
            output = await original(request_func_input, *args, **kwargs)
            marks.add("begun", request_func_input.request_id, round(output.start_time * 1e9))
            parsed = round((output.start_time + output.ttft) * 1e9)
            marks.add("parsed", request_func_input.request_id, parsed)
            return output

        return request

    for name, function in list(functions.items()):
        functions[name] = marked(function)


if path := os.environ.get("TTFT_MARKS"):
    _marks = Marks(path)
    for _name, _install in {
        "uvicorn.protocols.http.httptools_impl": server_http,
        "vllm.v1.engine.output_processor": server_engine,
        "aiohttp.http_writer": client_http,
        "vllm.benchmarks.lib.endpoint_request_func": client_requests,
    }.items():
        when_imported(_name, lambda module, install=_install: install(module, _marks))
