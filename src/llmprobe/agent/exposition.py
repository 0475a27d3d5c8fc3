"""Keeps each vLLM server's Prometheus text in a file, for that server's own ``/metrics``.

The engine's front end only reads a small file: it neither computes nor waits for us.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from llmprobe.agent.files import write_atomically
from llmprobe.collect.views import ServerView
from llmprobe.export.prometheus import expose
from llmprobe.record.agent_launch import EXPOSITION_NAME, exposition_path

#: Writing may take this share of the time, so that many GPUs lower the rate, not the budget.
_SHARE = 0.005
_LONGEST_PAUSE_SECONDS = 5.0


class ExpositionFiles:
    """The files of one agent. Not thread-safe."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._folder = directory / EXPOSITION_NAME
        self._clock = clock
        self._written: set[Path] = set()
        self._not_before = 0.0

    def start(self) -> None:
        """Make the folder, and remove what an agent before this one left."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for left in self._folder.iterdir():
            left.unlink()

    def write(self, views: Iterable[ServerView]) -> None:
        """Bring the files up to date; does nothing while the last writing still has to be paid off.

        Raises:
            OSError: a file could not be written; the others were tried.
        """
        begun = self._clock()
        if begun < self._not_before:
            return
        failed: OSError | None = None
        current: set[Path] = set()
        for view in views:
            if view.framework != "vllm":
                continue
            path = exposition_path(self._directory, view.group)
            current.add(path)
            try:
                write_atomically(path, expose([view]))
            except OSError as error:
                failed = error
        for path in self._written - current:
            path.unlink(missing_ok=True)
        self._written = current
        ended = self._clock()
        self._not_before = ended + min((ended - begun) / _SHARE, _LONGEST_PAUSE_SECONDS)
        if failed is not None:
            raise failed

    def remove(self) -> None:
        """Remove every file, and the folder."""
        for path in self._written:
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()
        self._written = set()
