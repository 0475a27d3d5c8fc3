"""How one agent runs."""

from __future__ import annotations

from dataclasses import dataclass

from llmprobe.settings import Settings


@dataclass(frozen=True)
class Options:
    """How one agent runs."""

    settings: Settings
    #: Started by hand: stays, also without any engine.
    external: bool = False
    #: Stays attached to the terminal.
    foreground: bool = False
    #: How long it stays after the last engine.
    linger_seconds: float = 30.0
