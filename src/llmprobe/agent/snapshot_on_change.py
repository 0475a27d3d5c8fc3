"""Snapshots that the agent makes by itself when a verdict changes: opt-in, few, in nobody's way."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmprobe.agent import snapshot
from llmprobe.agent.snapshot import SnapshotError

log = logging.getLogger("llmprobe.agent")

PREFIX = "verdict-"
_NOT_SETTLED = ("idle", "unknown")


class SnapshotOnChange:
    """Looks at verdicts about once a second; saves a snapshot when one becomes another.

    From ``idle`` and ``unknown`` nothing is concluded: what counts is the last class before them.
    """

    def __init__(
        self,
        directory: Path,
        folder: Path,
        *,
        least_seconds: float = 600.0,
        keep: int = 6,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            directory: the shared directory (``Settings.directory``).
            folder: where the snapshots go; made if it is missing.
            least_seconds: between two snapshots.
            keep: how many of its own files stay; the oldest go first.
            clock: seconds.
        """
        self._directory = directory
        self._folder = folder
        self._least_seconds = least_seconds
        self._keep = keep
        self._clock = clock
        self._last: dict[tuple[str, str], str] = {}
        self._made_at = float("-inf")
        self._thread: threading.Thread | None = None

    def look(self, verdicts: Mapping[tuple[str, str], str], status: Callable[[], dict[str, Any]]) -> bool:
        """Take in the verdicts as they are now; True if a snapshot was begun, on a thread of its own.

        Args:
            verdicts: (server, phase) → class. Of what is missing nothing is remembered.
            status: gives what ``/api/status`` says; called only for a snapshot.
        """
        settled = {at: found for at, found in verdicts.items() if found not in _NOT_SETTLED}
        changed = [
            f"{server} {phase}: {self._last[server, phase]} to {found}"
            for (server, phase), found in settled.items()
            if self._last.get((server, phase), found) != found
        ]
        self._last = {at: settled.get(at, self._last.get(at, "")) for at in verdicts}
        self._last = {at: found for at, found in self._last.items() if found}
        now = self._clock()
        if not changed or now - self._made_at < self._least_seconds or self._running():
            return False
        self._made_at = now
        self._thread = threading.Thread(
            target=self._make, args=("; ".join(changed), status()), name="llmprobe-snapshot", daemon=True
        )
        self._thread.start()
        return True

    def close(self) -> None:
        """Wait for the snapshot under way, at most a few seconds."""
        if self._thread is not None:
            self._thread.join(5.0)

    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _make(self, why: str, status: dict[str, Any]) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Host signals are in the status: the agent has been watching all along.
            document = snapshot.build(self._directory, status=status, host_seconds=0)
            document["provenance"]["reason"] = why
            path = self._folder / f"{PREFIX}{snapshot.default_name(document['provenance']['made'])}"
            snapshot.save(document, path)
            log.info("verdict changed (%s): saved %s", why, path)
            for old in sorted(self._folder.glob(f"{PREFIX}llmprobe-*.json.gz"))[: -self._keep]:
                old.unlink()
        except (SnapshotError, OSError) as error:
            log.warning("no snapshot of a changed verdict: %s", error)
