"""Every step that a process records, read often enough that its ring never overtakes the reader."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from llmprobe.record.journal import JournalError
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.layout import STEP

_POLL_SECONDS = 0.5


class RecordsLost(Exception):
    """The ring came round before it was read."""


def live_journals(directory: Path, role: str) -> list[JournalReader]:
    """The journals of the processes of one role that live."""
    readers = []
    for path in sorted((directory / "journals").glob(f"{role}-*.journal")):
        try:
            reader = JournalReader(path)
        except JournalError:
            continue
        if reader.alive():
            readers.append(reader)
        else:
            reader.close()
    return readers


class StepLog:
    """The record of every step in one journal."""

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader
        self._rows: list[np.ndarray] = []
        reader.read()  # what was before is of no interest, nor whether the ring lost some of it

    def poll(self) -> None:
        """Take what is new. Raises RecordsLost."""
        records = self._reader.read()
        if records.lost:
            raise RecordsLost(f"{records.lost} records of {self._reader.path.name} were overwritten unread")
        if len(records.steps):
            self._rows.append(records.steps)

    def steps(self) -> np.ndarray:
        """All records so far, in order; see `llmprobe.record.layout.STEP`."""
        return np.concatenate(self._rows) if self._rows else np.empty(0, dtype=STEP)

    def own_ns(self, stretches: list[tuple[int, int]]) -> np.ndarray:
        """Own host time of each step that began in one of these stretches of time."""
        rows = self.steps()
        inside = np.zeros(len(rows), dtype=bool)
        for begin, end in stretches:
            inside |= (rows["time"] >= begin) & (rows["time"] < end)
        found: np.ndarray = rows["own_ns"][inside]
        return found


class Polling(threading.Thread):
    """Polls a log while something else goes on."""

    def __init__(self, log: StepLog) -> None:
        super().__init__(daemon=True)
        self._log = log
        self._ended = threading.Event()
        self._failed: Exception | None = None

    def run(self) -> None:
        try:
            while not self._ended.wait(_POLL_SECONDS):
                self._log.poll()
            self._log.poll()
        except (RecordsLost, OSError) as error:
            self._failed = error

    def __enter__(self) -> Polling:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.join()
        if self._failed is not None and exception[0] is None:
            raise self._failed
