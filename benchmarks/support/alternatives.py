"""What else tells something about a vLLM server: each as a server, and what is done to it under load."""

from __future__ import annotations

import contextlib
import http.client
import secrets
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from llmprobe.demo.server import VllmServer
from support.capturing import profiler_flags
from support.nsys_server import GRAPHS, graphs_flag
from support.serving import running_server

_OFF = {"LLMPROBE": "0"}
_NSYS_SECONDS = 120.0
_POST_SECONDS = 60.0

#: Something that goes on while a server is measured.
Meanwhile = Callable[[], AbstractContextManager[object]]


class AlternativeFailed(Exception):
    """A tool refused or ended badly; the message is its own."""


@dataclass(frozen=True)
class Served:
    """A server that answers, and the stretches of load to measure on it, in order.

    A stretch is its name, what goes on meanwhile, and the most seconds that it may take.
    """

    server: VllmServer
    stretches: Sequence[tuple[str, Meanwhile, float]]


#: Starts one: the model's directory (None: the demo's), flags of ``vllm serve``, a folder of its own.
Start = Callable[[Path | None, Sequence[str], Path], AbstractContextManager[Served]]
_ALWAYS = float("inf")
#: A profiler's records are held in memory until it stops.
_RECORDING_SECONDS = 10.0


def _plain(name: str, more: Sequence[str], env: dict[str, str]) -> Start:
    @contextlib.contextmanager
    def start(model: Path | None, flags: Sequence[str], folder: Path) -> Iterator[Served]:
        with running_server(model, [*flags, *more], env) as server:
            yield Served(server, [(name, nullcontext, _ALWAYS)])

    return start


@contextlib.contextmanager
def _torch(model: Path | None, flags: Sequence[str], folder: Path) -> Iterator[Served]:
    """vLLM's own profiler. It is not stopped, which may take minutes: the server is ended instead."""
    with running_server(model, [*flags, *profiler_flags(folder)], _OFF) as server:

        @contextlib.contextmanager
        def profiling() -> Iterator[None]:
            _post(server.port, "/start_profile")
            yield

        yield Served(
            server,
            [
                ("torch profiler, not running", nullcontext, _ALWAYS),
                ("torch profiler, running", profiling, _RECORDING_SECONDS),
            ],
        )


@contextlib.contextmanager
def _nsys(model: Path | None, flags: Sequence[str], folder: Path) -> Iterator[Served]:
    name = f"side-by-side-{secrets.token_hex(4)}"
    session = f"--session={name}"
    launch = ["nsys", "launch", f"--session-new={name}", "--wait=primary", "--trace=cuda,nvtx"]
    with running_server(model, flags, _OFF, [*launch, graphs_flag(GRAPHS[0])]) as server:

        @contextlib.contextmanager
        def recording() -> Iterator[None]:
            _run_nsys("start", session, "--sample=none", "--cpuctxsw=none", "-o", str(folder / "report"))
            try:
                yield
            finally:
                _run_nsys("stop", session)

        try:
            yield Served(
                server,
                [
                    ("nsys launch, not recording", nullcontext, _ALWAYS),
                    ("nsys, recording", recording, _RECORDING_SECONDS),
                ],
            )
        finally:
            with contextlib.suppress(AlternativeFailed):
                _run_nsys("shutdown", session, "--kill=sigkill")


#: By name. A plain server is what the others are held against.
ALTERNATIVES: dict[str, Start] = {
    "plain": _plain("vLLM alone", (), _OFF),
    "llmprobe": _plain("LLMPROBE=1", (), {"LLMPROBE_KERNEL_WINDOWS": "off"}),
    "windows": _plain("LLMPROBE=1, windows 0.1/10", (), {"LLMPROBE_KERNEL_WINDOWS": "0.1/10"}),
    "mfu": _plain("--enable-mfu-metrics", ("--enable-mfu-metrics",), _OFF),
    "torch": _torch,
    "nsys": _nsys,
}


def _post(port: int, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_POST_SECONDS)
    try:
        connection.request("POST", path)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except OSError as error:
        raise AlternativeFailed(f"POST {path}: {error}") from None
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise AlternativeFailed(f"POST {path}: {response.status}: {text[:300]}")


def _run_nsys(*arguments: str) -> None:
    try:
        done = subprocess.run(
            ["nsys", *arguments], capture_output=True, text=True, timeout=_NSYS_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AlternativeFailed(f"nsys {arguments[0]}: {error}") from None
    if done.returncode:
        raise AlternativeFailed(f"nsys {arguments[0]}: {(done.stderr or done.stdout).strip()[-500:]}")
