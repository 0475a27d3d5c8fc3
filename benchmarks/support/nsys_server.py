"""A ``vllm serve`` with llmprobe under ``nsys launch``: recorded for moments while it serves."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmprobe.demo.server import VllmServer
from support.serving import NAME, new_directory

#: How nsys may record CUDA graphs: each as one, or every kernel of it, which can hang the process.
GRAPHS = ("graph", "node")
_NSYS_SECONDS = 120.0


class NsysFailed(Exception):
    """nsys ended badly; the message is its own."""


class NsysServer:
    """The server, and the nsys session around it. A context manager; starts at once, see `wait_ready`."""

    def __init__(
        self,
        name: str,
        model: Path,
        flags: Sequence[str],
        env: Mapping[str, str],
        graphs: str = GRAPHS[0],
        more: Sequence[str] = (),
    ) -> None:
        """
        Args:
            name: of what is served, for logs.
            model: a directory with a configuration; weights are made up.
            flags: further ones of ``vllm serve``.
            env: variables of the server beside those of this process.
            graphs: one of `GRAPHS`.
            more: options of ``nsys launch``.

        Raises NsysFailed where there is no nsys.
        """
        if shutil.which("nsys") is None:
            raise NsysFailed("there is no nsys on the PATH")
        self.name = name
        self._session = f"accuracy-{secrets.token_hex(4)}"
        self.folder = Path(tempfile.mkdtemp(prefix="llmprobe-accuracy-"))
        launch = ["nsys", "launch", f"--session-new={self._session}", "--wait=primary"]
        launch += ["--trace=cuda,nvtx", graphs_flag(graphs), *more]
        self.server = VllmServer.start(
            model,
            new_directory(),
            self.folder / "vllm.log",
            ["--served-model-name", NAME, "--load-format", "dummy", *flags],
            {"VLLM_CACHE_ROOT": str(self.folder / "cache"), **env},
            prefix=launch,
        )

    def wait_ready(self, timeout_seconds: float = 400.0) -> None:
        """Return once server and agent answer. Raises ServerFailed."""
        self.server.wait_ready(timeout_seconds)
        self.server.wait_agent()

    def record(self, label: str, seconds: float) -> Path:
        """Record everything on the device for so long; returns the SQLite export. Raises NsysFailed."""
        report = self.folder / f"{label}.nsys-rep"
        sqlite = report.with_suffix(".sqlite")
        session = f"--session={self._session}"
        _nsys(
            "start", session, "--sample=none", "--cpuctxsw=none", "--force-overwrite=true", "-o", str(report)
        )
        time.sleep(seconds)
        _nsys("stop", session)
        _nsys("export", "--type=sqlite", "--force-overwrite=true", "-o", str(sqlite), str(report))
        return sqlite

    def __enter__(self) -> NsysServer:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(NsysFailed):
            _nsys("shutdown", f"--session={self._session}", "--kill=sigkill")
        self.server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def graphs_flag(graphs: str) -> str:
    """Of ``nsys launch``; ``graphs`` is one of `GRAPHS`."""
    return f"--cuda-graph-trace={graphs}"


def nsys_version() -> str:
    """What ``nsys --version`` says. Raises NsysFailed."""
    return _nsys("--version").strip().rpartition("version ")[2]


def _nsys(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nsys", *arguments], capture_output=True, text=True, timeout=_NSYS_SECONDS, check=False
        )
    except OSError as error:
        raise NsysFailed(f"cannot run nsys: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NsysFailed(f"nsys {arguments[0]} took longer than {_NSYS_SECONDS:.0f} s") from None
    if done.returncode:
        raise NsysFailed(f"nsys {arguments[0]}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout
