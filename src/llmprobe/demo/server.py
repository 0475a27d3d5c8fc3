"""A real ``vllm serve`` on loopback, with llmprobe on, that leaves nothing behind when it is stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil

from llmprobe.processors import own_group
from llmprobe.record.agent_launch import agent_info, agent_running

_STOP_SECONDS = 15.0
_GRACE_SECONDS = 5.0
_AGENT_SECONDS = 10.0


class ServerFailed(Exception):
    """The server did not come up or went away; the message ends with the last lines of its log."""


class VllmServer:
    """One ``vllm serve`` process tree and the agent of its directory."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, directory: Path, log: Path) -> None:
        self.process = process
        self.port = port
        self.directory = directory
        self.log = log
        self._children: list[psutil.Process] = []
        self._ready = False
        self._guard = _start_guard(process.pid)

    @classmethod
    def start(
        cls,
        model: Path,
        directory: Path,
        log: Path,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        prefix: Sequence[str] = (),
    ) -> VllmServer:
        """Start a server; it is not ready yet, see `wait_ready`.

        Args:
            model: a model directory.
            directory: this server's own ``LLMPROBE_DIR``; made by the server.
            log: file that gets its output.
            flags: further ones of ``vllm serve``.
            env: variables that go over `server_environment`.
            port: None for any free one.
            prefix: a command that runs the server, such as ``nsys launch``.

        Raises:
            ServerFailed: there is no ``vllm`` in this Python's environment.
        """
        port = port or free_port()
        command = [
            *prefix,
            *vllm_command(),
            "serve",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *flags,
        ]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env={**server_environment(directory), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **own_group(),  # a Ctrl-C in the terminal reaches us alone: we stop it in order
            )
        return cls(process, port, directory, log)

    @property
    def url(self) -> str:
        """Where the server answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def agent_url(self) -> str:
        """Where this server's agent answers. Raises ServerFailed if none runs."""
        info = agent_info(self.directory)
        if info is None or info.get("port") is None:
            raise ServerFailed(f"no agent serves {self.directory}; see {self.directory / 'agent.log'}")
        return f"http://127.0.0.1:{info['port']}"

    def wait_ready(
        self, timeout_seconds: float = 300.0, waiting: Callable[[float], None] | None = None
    ) -> None:
        """Return once ``/health`` answers.

        Args:
            timeout_seconds: give up after that long.
            waiting: called about five times a second with the seconds since the start of the wait.

        Raises:
            ServerFailed: the process ended, or the time is over.
        """
        begin = time.monotonic()
        while True:
            elapsed = time.monotonic() - begin
            if self.process.poll() is not None:
                raise ServerFailed(
                    f"vllm serve ended with exit status {self.process.returncode}:\n{self.last_lines()}"
                )
            if answers(f"{self.url}/health"):
                self._remember_children()
                self._ready = True
                return
            if elapsed > timeout_seconds:
                raise ServerFailed(f"vllm serve is not ready after {elapsed:.0f} s:\n{self.last_lines()}")
            if waiting is not None:
                waiting(elapsed)
            time.sleep(0.2)

    def wait_agent(self, timeout_seconds: float = 30.0) -> str:
        """Return `agent_url` once the agent answers there. Raises ServerFailed when the time is over."""
        begin = time.monotonic()
        while True:
            with contextlib.suppress(ServerFailed):
                url = self.agent_url
                if answers(f"{url}/healthz"):
                    return url
            if time.monotonic() - begin > timeout_seconds:
                raise ServerFailed(
                    f"no agent answers for {self.directory} after {timeout_seconds:.0f} s; the server says:\n"
                    f"{self.last_lines(containing='llmprobe')}"
                )
            time.sleep(0.1)

    def last_lines(self, count: int = 20, containing: str = "") -> str:
        """The end of the server's log, of the lines that contain a word."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join([line for line in lines if containing in line][-count:])

    def stop(self) -> None:
        """End the server, its children and its agent, and remove its directory. May be called again."""
        self.stop_server_only()
        if self._guard.poll() is None:
            self._guard.communicate(b"told\n")
        stop_agent(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)

    def stop_server_only(self) -> None:
        """End the server and its children; the agent of its directory stays. May be called again."""
        self._remember_children()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS if self._ready else _GRACE_SECONDS)
        # vLLM's helpers free shared memory when their turn comes to end; only then by force.
        psutil.wait_procs(self._children, timeout=_GRACE_SECONDS)
        # Whatever is left of the group, and those of its processes that left it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in self._children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(self._children, timeout=_STOP_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_SECONDS)

    def _remember_children(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._children = list(
                {*self._children, *psutil.Process(self.process.pid).children(recursive=True)}
            )


def _start_guard(group: int) -> subprocess.Popen[bytes]:
    """A shell that kills a process group when we die without having told it not to.

    vLLM, when asked to end while it starts, may not; and its processes would outlive a demo that was killed.
    """
    return subprocess.Popen(
        ["sh", "-c", 'read told || kill -KILL "-$1"', "sh", str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **own_group(),
    )


def vllm_command() -> list[str]:
    """How to run this Python's vLLM: the ``vllm`` beside it, or the module where only that was installed.

    Raises:
        ServerFailed: there is neither.
    """
    path = Path(sys.executable).with_name("vllm")
    if path.exists():
        return [str(path)]
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a folder that is only called so
        raise ServerFailed(f"no vllm beside {sys.executable}: install vLLM there (`make setup` does)")
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def server_environment(directory: Path, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a server that is measured in ``directory`` and needs no network.

    LLMPROBE_* of the caller are not passed on, so that nothing but ``directory`` and its agent is used.
    """
    environ = os.environ if environ is None else environ
    kept = {name: value for name, value in environ.items() if not name.startswith("LLMPROBE")}
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without effect on a GPU
        **kept,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LLMPROBE": "1",
        "LLMPROBE_DIR": str(directory),
        "LLMPROBE_LISTEN": f"127.0.0.1:{free_port()}",
    }


def stop_agent(directory: Path) -> None:
    """End the agent that serves ``directory``, if one does; returns when its process is gone."""
    asked: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + _AGENT_SECONDS
    while agent_running(directory) and time.monotonic() < deadline:
        info = agent_info(directory)  # None while it is still starting
        with contextlib.suppress(psutil.Error):
            if info is not None and info["pid"] not in asked:
                process = asked[info["pid"]] = psutil.Process(info["pid"])
                process.terminate()
        time.sleep(0.1)
    _, left = psutil.wait_procs(list(asked.values()), timeout=_AGENT_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_AGENT_SECONDS)


def free_port() -> int:
    """A TCP port of loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a GET of ``url`` gives 200 within two seconds. Proxies are not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False
