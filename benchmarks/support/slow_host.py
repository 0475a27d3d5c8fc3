"""How a benchmark tells a running engine to be slow, or its step clock to lie: by files."""

from __future__ import annotations

import os
from pathlib import Path

#: Names the file with the seconds that the scheduler sleeps; no file or an empty one means none.
VARIABLE = "SCENARIO_SLOW_FILE"
#: Names the file with the share of every span that llmprobe's step clock tells; likewise.
CLOCK_VARIABLE = "SCENARIO_CLOCK_FILE"


def tell(file: Path, number: float) -> None:
    """From the next step on: so many seconds before each, or that share of each span. 0 ends it."""
    work = file.with_suffix(".new")
    work.write_text(f"{number:.6f}" if number else "")
    work.replace(file)


def told(variable: str = VARIABLE) -> float:
    """The number, as told to this process."""
    try:
        return float(Path(os.environ[variable]).read_text() or 0)
    except (KeyError, OSError, ValueError):
        return 0.0
