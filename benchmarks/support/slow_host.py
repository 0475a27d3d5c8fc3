"""How a benchmark tells the scheduler of a running engine to be slow: by a file."""

from __future__ import annotations

import os
from pathlib import Path

#: Names the file with the seconds; no file or an empty one means none.
VARIABLE = "SCENARIO_SLOW_FILE"


def tell(file: Path, seconds: float) -> None:
    """From the next step on, sleep that long before each."""
    work = file.with_suffix(".new")
    work.write_text(f"{seconds:.6f}" if seconds else "")
    work.replace(file)


def told() -> float:
    """Seconds, as told to this process."""
    try:
        return float(Path(os.environ[VARIABLE]).read_text() or 0)
    except (KeyError, OSError, ValueError):
        return 0.0
