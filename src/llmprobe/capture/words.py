"""What a program said last, for people."""

from __future__ import annotations

import re
import signal

_MOST_CHARS = 400
_PROGRESS = re.compile(r"\[\d+/\d+\]|\[=*\s*\d+%|\d+%\s*\]|^Processing \d+ events")


def exit_words(code: int) -> str:
    """How a process ended, by its exit status as `subprocess` gives it."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def last_words(output: str) -> str:
    """The last lines of ``output``, without progress bars, on one line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", output)]
    said = [line for line in lines if line and not _PROGRESS.search(line)]
    return " / ".join(said[-4:])[-_MOST_CHARS:]
