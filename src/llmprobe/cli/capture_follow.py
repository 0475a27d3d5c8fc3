"""Follows captures to their ends, with their progress on standard error."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from llmprobe.agent.client import Agent, AgentError
from llmprobe.cli.output import err

_POLL_SECONDS = 0.5
#: How long an agent may be silent, say because it is being replaced.
_SILENCE_SECONDS = 30.0
_FINAL = ("done", "failed", "cancelled")


@dataclass
class Followed:
    """One capture of one agent; ``capture`` is what the agent said last."""

    agent: Agent
    capture: dict[str, Any]
    error: str | None = None
    folder: Path | None = None
    report: Any = None
    silent_since: float | None = None

    @property
    def live(self) -> bool:
        """Whether there is something to wait for."""
        return self.error is None and self.capture.get("state") not in _FINAL

    def look(self) -> None:
        """Ask how it goes."""
        try:
            status, answer = self.agent.request("GET", self.capture["url"])
        except AgentError as error:
            self.silent_since = self.silent_since or time.monotonic()
            if time.monotonic() - self.silent_since > _SILENCE_SECONDS:
                self.error = str(error)
            return
        self.silent_since = None
        if status == 404:
            self.error = f"capture {self.capture['id']} was removed"
        elif status == 200:
            self.capture = answer
            if answer["state"] in ("failed", "cancelled"):
                self.error = f"capture {answer['id']} {answer['state']}: {answer['reason']}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "agent": self.agent.name,
            "capture": self.capture or None,
            "error": self.error,
            "folder": None if self.folder is None else str(self.folder),
            "report": self.report,
        }


def follow(captures: list[Followed]) -> None:
    """Return once none of them is live."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        shown: dict[int, TaskID] = {}
        while True:
            for one in captures:
                if one.live:
                    one.look()
                if one.capture:
                    _show(bars, shown, one, len(captures) > 1)
            if not any(one.live for one in captures):
                return
            time.sleep(_POLL_SECONDS)


def _show(bars: Progress, shown: dict[int, TaskID], one: Followed, several: bool) -> None:
    where = f"{one.agent.name}: " if several else ""
    text = f"{where}{one.capture['id']} {one.capture['state']}"
    task = shown.get(id(one))
    if task is None:
        task = shown[id(one)] = bars.add_task(text, total=1.0)
    progress = one.capture.get("progress")
    bars.update(task, description=text, total=None if progress is None else 1.0, completed=progress or 0.0)
