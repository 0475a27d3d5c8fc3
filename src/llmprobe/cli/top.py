"""``llmprobe top``: every server of this node and user, live."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from llmprobe.agent.client import AgentError, request
from llmprobe.cli import top_view
from llmprobe.cli.console import fail, settings_or_fail
from llmprobe.cli.output import out, print_json
from llmprobe.cli.paged import Paged

SCHEMA_VERSION = 1

EPILOG = """Examples:

llmprobe top

llmprobe top --sort gap --interval 2

llmprobe top --once --json

Keys: q quits, s sorts by the next column, r turns the order round, up and down (k and j) choose a row, enter
shows its server in detail and goes back; there up, down, page up and page down move. Without a terminal it
prints once, plainly."""

_KEYS = {
    b"q": "quit",
    b"\x04": "quit",
    b"s": "sort",
    b"r": "reverse",
    b"\r": "details",
    b"\n": "details",
    b"\x1b": "back",
    b"k": "up",
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"j": "down",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b" ": "page down",
}
_MOVES = {"up": -1, "down": 1, "page up": -1, "page down": 1}
#: A key as a terminal sends it; and the beginning of one whose rest a slow line may send later.
_KEY = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|.", re.DOTALL)
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|O)?$")
_SEQUENCE_SECONDS = 0.05


def top(
    sort: Annotated[str, typer.Option(help=f"Column to sort by: {' '.join(top_view.SORTS)}.")] = "server",
    reverse: Annotated[bool, typer.Option("--reverse", help="Sort the other way round.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and leave.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the rows once as JSON.")] = False,
) -> None:
    """Watch what every server and phase is bound by, a row each, over the last 30 s.

    An empty cell is not known. A gap with a ≥ may be larger: bubbles inside a step are not in it.
    """
    if sort not in top_view.SORTS:
        fail(f"--sort {sort!r} is no column; there are: {', '.join(top_view.SORTS)}", code=2)
    directory = settings_or_fail().directory
    if json or once or not out.is_terminal or out.is_dumb_terminal:
        _print_once(directory, sort, reverse, json)
        return
    signal.signal(signal.SIGTERM, _ended)
    with contextlib.suppress(KeyboardInterrupt):
        _Top(directory, sort, reverse, interval).run()


def _print_once(directory: Path, sort: str, reverse: bool, json: bool) -> None:
    try:
        status = _status(directory)
    except AgentError as error:
        fail(str(error))
    found = top_view.ordered(top_view.rows(status), sort, reverse)
    if json:
        print_json(
            {"schema_version": SCHEMA_VERSION, "time": status.get("time"), "rows": top_view.as_json(found)}
        )
        return
    if not found:
        out.print("No server is running with LLMPROBE=1.")
        return
    out.print(top_view.table(found, out.width))
    for line in top_view.headlines(found, out.width):
        out.print(line, soft_wrap=True)


def _status(directory: Path) -> dict[str, Any]:
    """What the agent says. Raises AgentError."""
    code, answer = request(directory, "GET", "/api/status", timeout=5.0)
    if code != 200 or not isinstance(answer, dict):
        raise AgentError(f"the agent answered {code}: {answer}")
    return answer


class _Top:
    """The live view: what is shown, and what keys change about it."""

    def __init__(self, directory: Path, sort: str, reverse: bool, interval: float) -> None:
        self._directory = directory
        self._sort = sort
        self._reverse = reverse
        self._interval = interval
        self._status: dict[str, Any] = {"servers": []}
        self._note = ""
        self._chosen: tuple[str, str | None] | None = (
            None  # server and phase, so that it stays when rows move
        )
        self._details = False
        self._page: Paged | None = None  # the details as last shown
        self._line = 0

    def run(self) -> None:
        """Until ``q`` or Ctrl-C."""
        with _keyboard() as keys, Live(console=out, auto_refresh=False, screen=True) as live:
            looked = float("-inf")
            while True:
                if time.monotonic() - looked >= self._interval:
                    looked = time.monotonic()
                    self._look()
                live.update(self._screen(with_keys=keys is not None), refresh=True)
                if self._wait(keys, looked + self._interval):
                    return

    def _look(self) -> None:
        try:
            self._status = _status(self._directory)
            self._note = time.strftime("%H:%M:%S")
        except AgentError as error:
            self._status = {"servers": []}
            self._note = str(error)

    def _wait(self, keys: int | None, until: float) -> bool:
        """Wait for a key or the next look; True to leave."""
        left = max(until - time.monotonic(), 0.0)
        if keys is None:
            time.sleep(left)
            return False
        if not select.select([keys], [], [], left)[0]:
            return False
        pressed = os.read(keys, 64)
        while _UNFINISHED.search(pressed) and select.select([keys], [], [], _SEQUENCE_SECONDS)[0]:
            if not (more := os.read(keys, 64)):
                break
            pressed += more
        # Keys may come fast, and several in one read: an escape sequence is one, else each byte.
        return not pressed or any(self._press(_KEYS.get(key, "")) for key in _KEY.findall(pressed))

    def _press(self, key: str) -> bool:
        """Do what a key asks for; True to leave."""
        found = self._rows()
        if key == "quit":
            return True
        if key == "sort":
            names = list(top_view.SORTS)
            self._sort = names[(names.index(self._sort) + 1) % len(names)]
        elif key == "reverse":
            self._reverse = not self._reverse
        elif key == "details":
            self._details, self._line = not self._details and bool(found), 0
        elif key == "back":
            self._details = False
        elif self._details and self._page is not None and key in _MOVES:
            line = self._line + _MOVES[key] * (self._page.room if "page" in key else 1)
            self._line = max(min(line, self._page.most), 0)
        elif key in ("up", "down") and found:
            at = self._at(found) + (1 if key == "down" else -1)
            row = found[max(0, min(at, len(found) - 1))]
            self._chosen = row.server, row.phase
        return False

    def _rows(self) -> list[top_view.Row]:
        return top_view.ordered(top_view.rows(self._status), self._sort, self._reverse)

    def _at(self, found: list[top_view.Row]) -> int:
        """The index of the chosen row; of its server if that phase is gone; else the first."""
        for index, row in enumerate(found):
            if (row.server, row.phase) == self._chosen:
                return index
        servers = [row.server for row in found]
        return servers.index(self._chosen[0]) if self._chosen and self._chosen[0] in servers else 0

    def _screen(self, with_keys: bool) -> RenderableType:
        found = self._rows()
        at = self._at(found) if found else None
        if self._details and at is not None:
            from llmprobe.cli.live import server_panel
            from llmprobe.cli.verdict_view import verdict_view

            (server, *_) = (one for one in self._status["servers"] if one["server"] == found[at].server)
            verdict = verdict_view(server, most_advice=2, named=True, evidence=True)
            content = Group(verdict, server_panel(server))
            self._page = Paged(content, self._line, out.height, "q quit  enter back")
            return self._page
        return top_view.screen(
            found,
            (out.width, out.height),
            selected=at if with_keys else None,
            sort=self._sort,
            reverse=self._reverse,
            note=self._note,
        )


@contextlib.contextmanager
def _keyboard() -> Iterator[int | None]:
    """Lets single keys through; gives the descriptor to read them from, None without a terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        changed = termios.tcgetattr(descriptor)
        # Ctrl-Z would leave the shell with this screen.
        changed[6][termios.VSUSP] = b"\0"
        termios.tcsetattr(descriptor, termios.TCSANOW, changed)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _ended(number: int, frame: object) -> NoReturn:
    """Leave through the blocks that give the terminal back."""
    raise SystemExit(128 + number)
