"""What a recording by nsys holds of llmprobe's ranges."""

from __future__ import annotations

import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path


def exported(nsys: str, recording: Path) -> Path:
    """The recording as a database, beside it."""
    target = recording.with_suffix(".sqlite")
    command = [nsys, "export", "--type", "sqlite", "--output", str(target), str(recording)]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    return target


def ranges(database: Path) -> list[tuple[str, int]]:
    """Name and payload of every range of ours in it, in the order in which they began."""
    with closing(sqlite3.connect(database)) as data:
        query = """
            select coalesce(event.text, name.value), event.int64Value from NVTX_EVENTS as event
            join NVTX_EVENTS as domain
                on domain.domainId = event.domainId and domain.eventType = 75 and domain.text = 'llmprobe'
            left join StringIds as name on name.id = event.textId
            where event.eventType = 59 and event.end is not null order by event.start
        """
        return data.execute(query).fetchall()
