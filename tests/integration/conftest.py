"""A tiny model made on the spot and real ``vllm serve`` processes, for every integration test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from captured import gates, nsys, wrapped  # noqa: F401 - fixtures of several files
from servers import FIXTURES, Servers, turn

from llmprobe.demo.model import make_model
from llmprobe.demo.server import VllmServer

_WANTED = pytest.StashKey[set[str]]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need no server come first: meanwhile servers start."""
    used = {item: getattr(item, "fixturenames", ()) for item in items}
    items.sort(key=lambda item: turn(used[item]))
    config.stash[_WANTED] = {name for names in used.values() for name in names if name in FIXTURES}


@pytest.fixture(autouse=True, scope="session")
def engines_that_share_a_machine() -> Iterator[None]:
    """Engines multiply tiny models on one thread, on whichever core is free, and know the models' classes.

    vLLM would bind every worker to the same core, beside the others of a run of all tests; torch's further
    threads spin while they wait for each other. And what vLLM finds out about a model's class, in a process
    of its own, it keeps below XDG_CACHE_HOME, which is another one where peaks are a test's own.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT") or str(cache / "vllm"))
        yield


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
def servers(
    tiny_model: Path,
    calibrated: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Servers]:
    """All servers that tests share, each with ``LLMPROBE=1``, and a LLMPROBE_DIR but for a neighbour."""
    wanted = request.config.stash[_WANTED]
    found = Servers(tiny_model, calibrated, wanted, lambda: tmp_path_factory.mktemp("server"))
    yield found
    found.stop()
    if request.session.testsfailed:
        print(f"\n{found.logs()}")


@pytest.fixture(autouse=True)
def start_ahead(request: pytest.FixtureRequest) -> None:
    """Start the next server that later tests need, if any does."""
    if request.config.stash[_WANTED]:
        request.getfixturevalue("servers").look(request.fixturenames)


@pytest.fixture(scope="session")
def server(servers: Servers) -> VllmServer:
    """For tests that only look at it: they may not stop or switch it."""
    return servers.ready("server")


@pytest.fixture(scope="session")
def slow_server(servers: Servers) -> VllmServer:
    """Its scheduler sleeps before each step for as long as `servers.tell_delay` told it."""
    return servers.ready("slow_server")


@pytest.fixture(scope="session")
def neighbour(servers: Servers) -> VllmServer:
    """Shares the directory and the agent of ``slow_server``; has two API servers and hardly any KV cache."""
    return servers.ready("neighbour")


@pytest.fixture(scope="session")
def broken_server(servers: Servers) -> VllmServer:
    """The same as ``slow_server``, when its neighbour is gone; for `servers.break_hook`."""
    return servers.ready("broken_server")


@pytest.fixture(scope="session")
def mortal(servers: Servers) -> VllmServer:
    """The same as ``server``, for tests that switch it off, kill its agent and, as the last, its worker."""
    return servers.ready("mortal")
