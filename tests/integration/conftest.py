"""A tiny model made on the spot and real ``vllm serve`` processes, for every integration test."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from llmprobe.demo.model import make_model
from llmprobe.demo.server import VllmServer

StartServer = Callable[..., VllmServer]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32, the dtype that every CPU multiplies natively."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", dtype="float32")


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that holds measured peak rates of this machine, as `llmprobe calibrate` leaves it."""
    cache = tmp_path_factory.mktemp("cache")
    subprocess.run(
        [str(Path(sys.executable).with_name("llmprobe")), "calibrate", "--seconds", "0.2"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return cache


@pytest.fixture(scope="session")
def vllm_server(
    tiny_model: Path,
    calibrated: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[StartServer]:
    """Starts servers: ``vllm_server(*flags, env={}, model=None, quick=True, agent=True, wait=True)``.

    Each call starts a server of its own with ``LLMPROBE=1`` and its own LLMPROBE_DIR and waits until it and
    its agent answer. The model is called ``tiny``. All are stopped at the end of the session; a test may
    call ``.stop()`` before.
    """
    servers: list[VllmServer] = []

    def start(
        *flags: str,
        env: dict[str, str] | None = None,
        model: Path | None = None,
        quick: bool = True,
        agent: bool = True,
        wait: bool = True,
        timeout_seconds: float = 300.0,
    ) -> VllmServer:
        server = VllmServer.start(
            model or tiny_model,
            shared_directory(),
            tmp_path_factory.mktemp("server") / "vllm.log",
            _with_defaults(flags) if quick else flags,
            {"XDG_CACHE_HOME": str(calibrated), **(env or {})},
        )
        servers.append(server)
        if wait:
            server.wait_ready(timeout_seconds)
            if agent:
                server.wait_agent()
        return server

    yield start
    for server in servers:
        server.stop()
        if request.session.testsfailed:
            print(f"\n--- {server.log}\n{server.last_lines(60)}")


@pytest.fixture(scope="session")
def server(vllm_server: StartServer) -> VllmServer:
    """One server that tests share which only look at it; they may not stop or switch it."""
    return vllm_server("--max-num-batched-tokens", "256", "--max-num-seqs", "16", "--enable-prefix-caching")


def shared_directory() -> Path:
    """A new path for LLMPROBE_DIR in shared memory, where journals lie in production too."""
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="llmprobe-test-", dir=base))


def _with_defaults(flags: Sequence[str]) -> list[str]:
    """``flags``, and those of what makes a start quick and plain that they do not set themselves."""
    given = {flag.partition("=")[0] for flag in flags}
    result = list(flags)
    if not given & {"--enforce-eager", "--no-enforce-eager"}:
        result.append("--enforce-eager")  # no graph compilation: a minute less
    for flag, value in {
        "--max-model-len": "2048",
        "--dtype": "float32",  # as stored; the default would halve it
        "--served-model-name": "tiny",
    }.items():
        if flag not in given:
            result += [flag, value]
    return result
