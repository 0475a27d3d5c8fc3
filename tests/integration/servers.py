"""The ``vllm serve`` processes that tests share, each started before it is needed.

A start takes 40 s, nearly all of it imports in one process after another: the work of one core. So tests that
need no server run first, and beside them one server after another starts; see `Servers.look`.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import psutil
from waiting import PATIENCE_SECONDS

from llmprobe.demo.server import VllmServer, answers

_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_SPARE_BYTES = 6 << 30  # with less memory than that no server is started before it is needed

_BREAKS_A_HOOK = textwrap.dedent(
    """
    # Found first on PYTHONPATH: one of llmprobe's hooks fails at every step once there is a file "broken".
    from pathlib import Path

    import llmprobe.hooks.vllm.steps as steps

    def entered(*arguments):
        if BROKEN.exists():
            raise RuntimeError("broken on purpose")
        return original(*arguments)

    BROKEN = Path(__file__).with_name("broken")
    original, steps.WorkerSteps.entered = steps.WorkerSteps.entered, entered
    """
)


def _nothing(folder: Path) -> dict[str, str]:
    return {}


def _injections(folder: Path) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(_BREAKS_A_HOOK)
    paths = (str(folder), str(_BENCHMARKS), os.environ.get("PYTHONPATH"))
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        _slow_host().VARIABLE: str(folder / "seconds"),
    }


def tell_delay(injected: VllmServer, seconds: float) -> None:
    """From the next step on, the server sleeps that long before each."""
    _slow_host().tell(injected.log.with_name("seconds"), seconds)


def break_hook(injected: VllmServer) -> None:
    """From the next step on, one of llmprobe's hooks fails at each."""
    injected.log.with_name("broken").touch()


def _slow_host() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slow_host", _BENCHMARKS / "support" / "slow_host.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Recipe:
    """How a server is started.

    Attributes:
        flags: of ``vllm serve``, beside those of a quick start.
        environment: given the server's own folder, variables beside the usual ones.
        beside: the server whose LLMPROBE_DIR, and so whose agent, it shares.
    """

    flags: tuple[str, ...] = ()
    environment: Callable[[Path], Mapping[str, str]] = _nothing
    beside: str | None = None


RECIPES = {
    "plain": Recipe(("--max-num-batched-tokens", "256", "--max-num-seqs", "16", "--enable-prefix-caching")),
    "injected": Recipe(
        (
            *("--no-async-scheduling", "--no-enable-prefix-caching"),
            *("--scheduler-cls", "support.slow_scheduler.SlowScheduler"),
        ),
        _injections,
    ),
    "neighbour": Recipe(
        (
            *("--num-gpu-blocks-override", "14", "--api-server-count", "2", "--max-model-len", "384"),
            *("--block-size", "32", "--no-enable-prefix-caching"),
        ),
        beside="injected",
    ),
}

#: Fixture → server, in the order in which tests run: what they do to a server only later ones may see.
FIXTURES = {
    "server": "plain",
    "slow_server": "injected",
    "neighbour": "neighbour",
    "broken_server": "injected",
    "mortal": "plain",
}


def turn(names: Iterable[str]) -> int:
    """When a test with these fixtures runs: -1 before all servers, else with the first one of `FIXTURES`."""
    return min((at for at, name in enumerate(FIXTURES) if name in names), default=-1)


class Servers:
    """Starts servers of `RECIPES` and stops them.

    Args:
        model: the directory of the model, served as ``tiny``.
        cache: their XDG_CACHE_HOME.
        fixtures: those of `FIXTURES` that this run of the tests needs.
        new_folder: makes a folder for one server.
    """

    def __init__(
        self, model: Path, cache: Path, fixtures: Iterable[str], new_folder: Callable[[], Path]
    ) -> None:
        self._model = model
        self._cache = cache
        #: Server → when the last test that needs it runs, in the order of their first ones.
        self._last_turn: dict[str, int] = {}
        for at, (fixture, name) in enumerate(FIXTURES.items()):
            if fixture in fixtures:
                self._last_turn[name] = at
        self._new_folder = new_folder
        self._started: dict[str, VllmServer] = {}
        self._ending: dict[str, threading.Thread] = {}

    def ready(self, fixture: str) -> VllmServer:
        """The server, once it and its agent answer. Raises `ServerFailed`."""
        name = FIXTURES[fixture]
        server = self._start(name)
        server.wait_ready(2 * PATIENCE_SECONDS)
        if RECIPES[name].beside is None:
            server.wait_agent(PATIENCE_SECONDS)
        return server

    def look(self, fixtures: Sequence[str]) -> None:
        """Between tests: stop servers whose tests are over, start the next one if no other is starting.

        Args:
            fixtures: of the test that comes next.
        """
        now = turn(fixtures)
        for name, last in self._last_turn.items():
            if last < now and name in self._started and name not in self._ending:
                self._ending[name] = threading.Thread(target=self._started[name].stop)
                self._ending[name].start()
        if any(self._starting(server) for server in self._started.values()):
            return
        for name, last in self._last_turn.items():
            if last >= now and name not in self._started:
                if psutil.virtual_memory().available > _SPARE_BYTES:
                    self._start(name)
                return

    def stop(self) -> None:
        """Stop them all, at once: each takes some seconds."""
        for name, server in self._started.items():
            if name not in self._ending:
                self._ending[name] = threading.Thread(target=server.stop)
                self._ending[name].start()
        for thread in self._ending.values():
            thread.join()

    def logs(self) -> str:
        """The last lines of every server's log."""
        return "\n".join(f"--- {one.log}\n{one.last_lines(60)}" for one in self._started.values())

    @staticmethod
    def _starting(server: VllmServer) -> bool:
        return server.process.poll() is None and not answers(f"{server.url}/health")

    def _start(self, name: str) -> VllmServer:
        if name in self._started:
            return self._started[name]
        recipe = RECIPES[name]
        folder = self._new_folder()
        environment = {"XDG_CACHE_HOME": str(self._cache), **recipe.environment(folder)}
        if recipe.beside is not None:
            environment["LLMPROBE_DIR"] = str(self._start(recipe.beside).directory)
        self._started[name] = VllmServer.start(
            self._model, shared_directory(), folder / "vllm.log", _quick(recipe.flags), environment
        )
        return self._started[name]


def shared_directory() -> Path:
    """A new path for LLMPROBE_DIR in shared memory, where journals lie in production too."""
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="llmprobe-test-", dir=base))


def _quick(flags: Sequence[str]) -> list[str]:
    """``flags``, and those of what makes a start quick and plain that they do not set themselves."""
    result = [*flags, "--enforce-eager"]  # no graph compilation: a minute less
    for flag, value in {
        "--max-model-len": "2048",
        "--dtype": "float32",  # as stored; the default would halve it
        "--served-model-name": "tiny",
    }.items():
        if flag not in flags:
            result += [flag, value]
    return result
