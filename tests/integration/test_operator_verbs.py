"""``top`` in a real terminal and ``snapshot``, over a real agent and real journals, and without the agent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE_SECONDS, until

from llmprobe.agent.client import AgentError, request

pytestmark = pytest.mark.integration

FEEDER = Path(__file__).with_name("journal_feeder.py")
COMMAND = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'llmprobe'; from llmprobe.cli.app import main; main()",
]


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(f"/dev/shm/llmprobe-test-verbs-{os.getpid()}")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def fed(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A pretended server and its agent; gives the agent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    feeders = []
    for role in ("frontend", "worker"):
        feeder = subprocess.Popen(
            [sys.executable, str(FEEDER), str(directory), role], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        feeders.append(feeder)
        assert feeder.stdout is not None
        feeder.stdout.readline()
    listen = f"127.0.0.1:{port}"
    module = [sys.executable, "-m", "llmprobe.agent", "--directory", str(directory), "--listen", listen]
    agent = subprocess.Popen([*module, "--foreground", "--external"], stderr=subprocess.DEVNULL)
    try:
        yield agent
    finally:
        agent.kill()
        agent.wait()
        for feeder in feeders:
            feeder.kill()
            feeder.wait()


class Terminal:
    """A program in a terminal of 80 columns and 24 lines."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(arguments[0], arguments, environment)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.output = b""

    def wait_for(self, text: str) -> None:
        """Until ``text`` stands in what came since the last call."""
        deadline, seen = time.monotonic() + PATIENCE_SECONDS, b""
        while text not in re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode(errors="replace"):
            assert time.monotonic() < deadline, seen
            seen += self._read()

    def press(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def ended(self) -> int:
        """Its exit status, once it ends."""
        while self._read():
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bytes:
        if not select.select([self.fd], [], [], PATIENCE_SECONDS)[0]:
            return b""
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # how Linux says that the other side closed
            return b""
        self.output += data
        return data


def test_operators_watch_servers_live_and_take_a_snapshot_also_when_the_agent_is_dead(
    directory: Path, tmp_path: Path
) -> None:
    environment = dict(os.environ, LLMPROBE_DIR=str(directory), TERM="xterm-256color")
    environment.pop("NO_COLOR", None)

    def llmprobe(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def decoding() -> bool:
        with contextlib.suppress(AgentError):
            _, answer = request(directory, "GET", "/api/status")
            return any("decode" in rank["figures"] for one in answer["servers"] for rank in one["ranks"])
        return False

    with fed(directory) as agent:
        until(decoding, "decode figures")

        rows = json.loads(llmprobe("top", "--json").stdout)["rows"]
        (decode,) = (row for row in rows if row["phase"] == "decode")
        assert decode["step_seconds_p50"] > 0
        piped = llmprobe("top")
        assert "fed-a" in piped.stdout
        assert "\x1b" not in piped.stdout

        terminal = Terminal([*COMMAND, "top", "--interval", "0.5"], environment)
        terminal.wait_for(">fed-a")
        terminal.press(b"\r")
        terminal.wait_for("enter back")
        terminal.press(b"\x1b[6~" * 9)  # more may be known of it than 24 lines hold
        terminal.wait_for("prefill")  # of the table of phases, near its end
        terminal.press(b"\x1b[5~" * 9)
        terminal.wait_for("fed-a")  # the headline is its first line
        terminal.press(b"\x1b")
        terminal.wait_for("q quit")
        terminal.press(b"q")
        assert terminal.ended() == 0
        assert terminal.output.rstrip().endswith(b"\x1b[?1049l")  # the shell's own screen is back

        ended = Terminal([*COMMAND, "top"], environment)
        ended.wait_for(">fed-a")
        os.kill(ended.pid, signal.SIGTERM)
        assert ended.ended() == 128 + signal.SIGTERM
        assert ended.output.rstrip().endswith(b"\x1b[?1049l")

        with_agent = llmprobe("snapshot", "--output", "alive.json.gz", "--json")
        assert json.loads(with_agent.stdout)["agent"] is True
        agent.kill()
        agent.wait()
        assert llmprobe("top", "--once").returncode == 1
        without = llmprobe("snapshot", "--output", "dead.json.gz", "--json")
        assert without.returncode == 0, without.stderr
        assert json.loads(without.stdout)["agent"] is False
        assert json.loads(without.stdout)["steps"] > json.loads(with_agent.stdout)["steps"] > 0
        assert llmprobe("snapshot", "--output", "dead.json.gz").returncode == 2
    shown = llmprobe("snapshot", "--show", "dead.json.gz").stdout
    assert "fed-a worker rank 0" in shown
    assert re.search(r"host: \d\.\d\d cores of", shown)
    assert re.search(r"decode +\d+ ", shown)
