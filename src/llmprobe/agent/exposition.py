"""Keeps each vLLM server's metric families in a file, for that server's own ``/metrics``.

JSON, not Prometheus' text: the front end reads it between two tokens, and parsing the text in Python costs
it ten times as much.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmprobe.agent.files import write_atomically
from llmprobe.collect.views import ServerView
from llmprobe.export.catalogue import FAMILIES, Family
from llmprobe.export.prometheus import Samples, fill
from llmprobe.record.agent_launch import EXPOSITION_NAME, exposition_path

#: Writing may take this share of the time, so that many GPUs lower the rate, not the budget.
_SHARE = 0.005
_LONGEST_PAUSE_SECONDS = 5.0
SCHEMA = 1


def encode(view: ServerView) -> bytes:
    """The metric families of one server as JSON, for `llmprobe.hooks.vllm.endpoint.decode`.

    ``{"schema": 1, "families": [[name, type, documentation, series], …]}``; a series is
    ``[labels, [[sample name, le or null, value], …]]``: the buckets of a histogram share their labels.
    """
    found = _Series()
    fill(found, view)
    return json.dumps({"schema": SCHEMA, "families": found.families()}, separators=(",", ":")).encode()


class _Series(Samples):
    """As they stand in the file. Metrics of `prometheus_client` on the way would triple the cost."""

    def __init__(self) -> None:
        self._series: dict[str, list[Any]] = {}

    def put(self, family: Family, labels: Sequence[str], value: float) -> None:
        self._add(family, labels, [[family.name, None, float(value)]])

    def put_histogram(
        self, family: Family, labels: Sequence[str], buckets: list[tuple[str, float]], total: float
    ) -> None:
        name = family.name
        bucket = f"{name}_bucket"
        rows: list[Any] = [[bucket, le, count] for le, count in buckets]
        rows += [[f"{name}_count", None, buckets[-1][1]], [f"{name}_sum", None, float(total)]]
        self._add(family, labels, rows)

    def _add(self, family: Family, labels: Sequence[str], rows: list[Any]) -> None:
        named = dict(zip(family.labels, labels, strict=True))
        self._series.setdefault(family.name, []).append([named, rows])

    def families(self) -> list[Any]:
        """In the catalogue's order."""
        return [
            # As `prometheus_client` names them: a counter without what its samples end with.
            [name.removesuffix("_total"), family.kind, family.help, self._series[name]]
            for name, family in FAMILIES.items()
            if name in self._series
        ]


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
            path = exposition_path(self._directory, view.group, view.own_label)
            current.add(path)
            try:
                write_atomically(path, encode(view))
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
