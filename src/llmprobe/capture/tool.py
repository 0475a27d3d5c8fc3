"""What a way of recording must be able to do, so that a capture can be taken to its end with it.

`llmprobe.capture.run` knows no tool; each has a file of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class ToolError(Exception):
    """The tool did not do what was asked; the message holds its own last words."""


class Interrupted(Exception):
    """Somebody wanted what goes on to end."""


@dataclass(frozen=True)
class Worker:
    """One engine process that can be asked for a capture.

    ``name`` is unlike any other of the server's, such as ``rank0``; ``refusals`` says what cannot capture it
    and why (tool → reason); a tool that it does not name cannot either. ``unsafe``: what could, but is not
    chosen where there is another. ``device``: what it says of its GPU.
    """

    journal: Path
    name: str
    rank: int
    refusals: Mapping[str, str | None]
    device: Mapping[str, Any] = field(default_factory=dict)
    unsafe: Mapping[str, str] = field(default_factory=dict)


class Tool(Protocol):
    """One recording of one tool. All methods block; they raise `ToolError`, `Interrupted` or OSError.

    Each may be called by an agent that starts anew, on what the one before it left.
    """

    #: Whether it records until `collect`, and so has to be told when the time is over.
    ends_by_clock: bool

    def check(self) -> None:
        """While pending: raise unless a recording can begin now."""

    def start(self, seconds: float, steps: int | None) -> None:
        """Begin: for ``seconds`` at most, and for so many steps where the tool counts them itself."""

    def resume(self) -> None:
        """Raise unless the recording goes on; once, before it is looked at."""

    def ended(self) -> bool:
        """Whether the recording is over already. Asked ten times a second."""

    def progress(self) -> float | None:
        """How far it is (0 to 1), where the tool knows better than the clock."""

    def taken_bytes(self) -> int:
        """What the recording takes on disk so far."""

    def collect(self) -> list[str]:
        """End the recording if it goes on, and leave what it made in the capture's folder; returns notes."""

    def abandon(self) -> None:
        """End whatever was begun, and delete what it left elsewhere. Raises nothing."""

    def hang_hint(self) -> str:
        """What is known of servers that stop getting on while this records; may be empty. Raises nothing."""

    def forget(self) -> None:
        """The capture has ended, well or not. Raises nothing."""
