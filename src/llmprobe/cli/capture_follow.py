"""Follows captures to their ends, with their progress on standard error."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from llmprobe.agent.client import Agent, AgentError
from llmprobe.capture.session import FINAL, STATES, is_id
from llmprobe.cli.capture_targets import Target
from llmprobe.cli.output import err

_POLL_SECONDS = 0.5
#: How long an agent may be silent, say because it is being replaced.
_SILENCE_SECONDS = 30.0


@dataclass
class Followed:
    """One capture of one agent; ``capture`` is what the agent said last."""

    target: Target
    capture: dict[str, Any]
    error: str | None = None
    #: Whether what was asked for is wrong, whatever the server does.
    misused: bool = False
    folder: Path | None = None
    report: Any = None
    text: str = ""
    summary: dict[str, Any] | None = None
    silent_since: float | None = None

    @property
    def agent(self) -> Agent:
        """Whom to ask."""
        return self.target.agent

    @property
    def url(self) -> str:
        """Its path, which no answer has a say in."""
        return f"/api/captures/{self.capture['id']}"

    @property
    def live(self) -> bool:
        """Whether there is something to wait for."""
        return self.error is None and self.capture.get("state") not in FINAL

    def look(self) -> None:
        """Ask how it goes."""
        try:
            status, answer = self.agent.request("GET", self.url)
        except AgentError as error:
            self._silent(str(error))
            return
        if status == 404:
            self.error = f"capture {self.capture['id']} was removed"
        elif status != 200:
            self._silent(f"{self.agent.name} answers {status}")
        elif not is_capture(answer) or answer["id"] != self.capture["id"]:
            self.error = str(self.agent.foreign("it says nothing of the capture"))
        else:
            self.silent_since = None
            self.capture = answer
            if answer["state"] in ("failed", "cancelled"):
                self.error = f"capture {answer['id']} {answer['state']}: {answer.get('reason')}"

    def _silent(self, why: str) -> None:
        self.silent_since = self.silent_since or time.monotonic()
        if time.monotonic() - self.silent_since > _SILENCE_SECONDS:
            self.error = why

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "agent": self.agent.name,
            "node": self.target.node,
            "capture": self.capture or None,
            "error": self.error,
            "folder": None if self.folder is None else str(self.folder),
            "report": self.report,
            "summary": self.summary,
        }


def is_capture(answer: Any) -> bool:
    """Whether an answer describes a capture, as far as it is relied on: its id becomes a path here."""
    return (
        isinstance(answer, dict)
        and isinstance(answer.get("id"), str)
        and is_id(answer["id"])
        and answer.get("state") in STATES
        and _is_progress(answer.get("progress"))
        and isinstance(answer.get("notes", []), list)
    )


def _is_progress(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and 0 <= value <= 1)


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
