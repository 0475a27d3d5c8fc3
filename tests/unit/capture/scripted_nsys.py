"""A program that answers like nsys and fails on demand: what the real one cannot be made to do in a test.

The way that succeeds is tested with the real one, in tests/integration/test_captures.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llmprobe.capture.condition import Live
from llmprobe.capture.nsys import Session
from llmprobe.capture.session import Capture
from llmprobe.capture.tool import Worker

_SCRIPT = """#!/bin/sh
cd {folder}
[ -e "fail-$1" ] && {{ echo "[1/1] [====  40%] x"; cat "fail-$1"; exit 1; }}
echo "$*" >> calls
while [ -e hang ]; do sleep 0.05; done
for word; do
  case "$word" in
    --output=*) out="${{word#--output=}}";;
    *) [ "$before" = -o ] && out="$word"; before="$word";;
  esac
done
case "$1" in
  sessions) echo "ID TIME STATE LAUNCH NAME"; [ -e gone ] || echo "1 00:01 $(cat state) 1 {name}";;
  start)
    echo ConfiguredLaunched > state
    while [ -e hang-start ]; do sleep 0.05; done
    echo Collection > state; echo "$out" > out;;
  stop) echo Launched > state; [ -e silent-stop ] || echo report > "$(cat out).nsys-rep";;
  export)
    [ -e database ] && cp database "$out" && exit
    [ -e silent-export ] || echo "not a database" > "$out";;
esac
"""


class ScriptedNsys:
    """The program, the session that it pretends to have, and what it was called with."""

    def __init__(self, folder: Path, directory: Path, group: str = "g") -> None:
        folder.mkdir()
        self._folder = folder
        program = folder / "nsys"
        self.session = Session(group, "llmprobe-0123456789ab", str(program), str(folder / "tmp"), ("nvtx",))
        program.write_text(_SCRIPT.format(folder=folder, name=self.session.name))
        program.chmod(0o700)
        (folder / "tmp").mkdir()
        self.set_state("Launched")
        directory.mkdir(exist_ok=True)
        self.session.write(directory)

    def set_state(self, state: str) -> None:
        """What ``sessions list`` says."""
        (self._folder / "state").write_text(state)

    def state(self) -> str:
        """What ``sessions list`` says."""
        return (self._folder / "state").read_text().strip()

    def does(self, what: str, words: str = "") -> None:
        """Such as ``fail-start`` with its last words, ``silent-stop``, ``hang-start`` or ``gone``."""
        (self._folder / what).write_text(words)

    def undo(self, what: str) -> None:
        """It does not do that any more."""
        (self._folder / what).unlink(missing_ok=True)

    def exports(self, database: Path) -> None:
        """What it exports."""
        shutil.copy(database, self._folder / "database")

    def record_into(self, folder: Path) -> None:
        """As if ``start`` had been called for this capture."""
        self.set_state("Collection")
        (self._folder / "out").write_text(str(folder / "capture"))

    def calls(self) -> list[str]:
        """The command lines so far, without those of ``sessions list``."""
        return [line for line in self._lines() if not line.startswith("sessions")]

    def asked(self) -> int:
        """How often its sessions were listed."""
        return len(self._lines()) - len(self.calls())

    def _lines(self) -> list[str]:
        path = self._folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


class PretendedServer:
    """Servers as a capture sees them; ``live`` may be exchanged."""

    def __init__(self) -> None:
        self.now: Live | None = Live({"rank0": {"decode": 1}})
        self.processes: list[Worker] = []
        self._looked: list[Live | None] = []

    def looks_since(self, now: Live) -> int:
        """How often it was looked at since it shows this."""
        return sum(seen is now for seen in self._looked)

    def live(self, capture: Capture) -> Live | None:
        """What conditions look at."""
        self._looked.append(self.now)
        return self._looked[-1]

    def workers(self, capture: Capture) -> list[Worker]:
        """Its living engine processes."""
        return self.processes

    def figures(self, capture: Capture) -> dict[str, object] | None:
        """The server's entry in ``/api/status``."""
        return {"server": "s", "ranks": []}
