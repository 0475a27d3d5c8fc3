"""Writing a journal: the file through which an engine process tells the agent what it saw.

The writer allocates its file before anything else, so that it can never meet a full disk later, and uses
``os.pwrite`` (a memory map that loses its backing kills the process with SIGBUS). It holds a record lock
on the file for as long as it lives: the kernel drops it at any kind of death, so liveness needs no pid.

What lies side by side in the file goes there with one write. Each ``os.pwrite`` gives the interpreter lock
away: a thread that writes a quarter second of a loaded front end cell by cell takes it from the event loop a
hundred times, and as often the loop waits to get it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprobe.record import layout

# Bound once: these run several times a step inside the engine.
BUCKETS = layout.BUCKETS
CELL_PAIR = layout.CELL_PAIR
HISTOGRAMS_OFFSET = layout.HISTOGRAMS_OFFSET
bucket_of = layout.bucket_of
_CRC = layout.CRC
_crc32 = zlib.crc32
_pwrite = os.pwrite
_pack_crc = layout.CRC.pack
_pack_seq = struct.Struct("<Q").pack
_pack_cell_pair = struct.Struct("<QI4xQI4x").pack_into
_pack_position = struct.Struct("<QQ").pack
_pack_progress = layout.PROGRESS.pack
_pack_step_totals = layout.STEP_TOTALS.pack
_pack_request_totals = layout.REQUEST_TOTALS.pack
_STEP_COUNTERS = len(layout.STEP_COUNTERS)
_STEP_TOTALS_OFFSET = layout.STEP_TOTALS_OFFSET
_REQUEST_TOTALS_OFFSET = layout.REQUEST_TOTALS_OFFSET
_RING_OFFSET = layout.RING_OFFSET
_FIRST_STEP_HISTOGRAM = layout.HISTOGRAM_INDEX["step_prefill"]  # behind those of requests
#: Cells between two changed ones that are written once more rather than written around: a page of them.
_APART = 4096 // CELL_PAIR


class JournalError(Exception):
    """A journal could not be made or read; the message says which and why, in one line."""


class JournalVersionError(JournalError):
    """A journal of another llmprobe, which this one does not read."""


def _seal(payload: bytes) -> bytes:
    return payload + _CRC.pack(_crc32(payload))


class JournalWriter:
    """Appends records and keeps cumulative totals. One writer a process; calls must not overlap."""

    def __init__(self, fd: int, path: Path, slots: int) -> None:
        self._fd = fd
        self.path = path
        self._slots = slots
        self._seq = 0
        self._updates = 0
        self._loads = 0
        self._facts_writes = 0
        self.counters = [0] * len(layout.COUNTERS)
        #: Cells that are counted and not yet published, of requests and of steps.
        self._due: tuple[set[tuple[int, int]], set[tuple[int, int]]] = set(), set()
        self._cells = [[0] * BUCKETS for _ in layout.HISTOGRAMS]
        #: Histogram → its cells as they lie in the file, for those that were ever counted in (58 KiB each).
        self._images: dict[int, bytearray] = {}

    @classmethod
    def create(cls, path: Path, facts: Mapping[str, Any], size: int = layout.DEFAULT_SIZE) -> JournalWriter:
        """Allocate and open a journal.

        Args:
            path: a file that does not exist yet.
            facts: what the reader must know about this process; JSON, at most 64 KiB.
            size: bytes of the whole file.

        Raises:
            JournalError: no room, no permission, or a directory that is missing or read-only.
        """
        slots = (size - layout.RING_OFFSET) // layout.RECORD_SIZE
        fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(fd, 0, size)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
                with contextlib.suppress(OSError):
                    path.unlink()
            raise JournalError(
                f"no journal at {path}: {os.strerror(error.errno or 0)} ({size >> 10} KiB needed)"
            ) from None
        writer = cls(fd, path, slots)
        try:
            writer.set_facts(facts)
            writer._write_header(size)
        except Exception:
            writer.close(remove=True)
            raise
        return writer

    def _write_header(self, size: int) -> None:
        head = layout.HEADER.pack(
            layout.MAGIC,
            layout.VERSION,
            size,
            layout.RING_OFFSET,
            layout.RECORD_SIZE,
            self._slots,
            secrets.token_bytes(24),
            0,
        )[:-4]
        os.pwrite(self._fd, _seal(head), 0)

    def close(self, remove: bool = False) -> None:
        """Give up the lock, and with ``remove`` the file too."""
        if self._fd >= 0:
            if remove:
                with contextlib.suppress(OSError):
                    self.path.unlink()
            os.close(self._fd)
            self._fd = -1

    @property
    def written(self) -> int:
        """Records written so far."""
        return self._seq

    def fileno(self) -> int:
        """The file descriptor; -1 once closed."""
        return self._fd

    def set_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace the facts. Raises JournalError above 64 KiB.

        What is no text, as in names of files that are not UTF-8, is replaced: no reader could pass it on.
        """
        text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
        if len(text) > layout.FACTS_SLOT - 16:
            raise JournalError(f"the facts of {self.path.name} take {len(text)} bytes, more than fit")
        self._facts_writes += 1
        slot = self._facts_writes % 2
        payload = struct.pack("<QI", self._facts_writes, len(text)) + text
        os.pwrite(self._fd, _seal(payload), layout.FACTS_OFFSET + slot * layout.FACTS_SLOT)

    def append(self, pack: struct.Struct, *fields: Any) -> int:
        """Append one record; ``fields`` are those of its layout behind ``seq``. Returns its ``seq``."""
        seq = self._seq
        payload = pack.pack(seq, *fields)
        _pwrite(self._fd, payload + _pack_crc(_crc32(payload)), _RING_OFFSET + (seq % self._slots) * 256)
        self._seq = seq + 1  # only now: a write that failed must not leave a hole
        return seq

    def append_packed(self, records: Sequence[bytes]) -> None:
        """Append records packed beforehand by their layout, whatever their ``seq`` says."""
        at = 0
        while at < len(records):
            slot = self._seq % self._slots
            some = records[at : at + self._slots - slot]
            written = bytearray()
            for seq, record in enumerate(some, self._seq):
                payload = _pack_seq(seq) + record[8:]
                written += payload
                written += _pack_crc(_crc32(payload))
            _pwrite(self._fd, written, _RING_OFFSET + slot * layout.RECORD_SIZE)
            self._seq += len(some)  # as in `append`
            at += len(some)

    def progress(self, begun: int, time_ns: int, ended: int, phase: int, tokens: int) -> None:
        """Publish the step begun last and the one ended last."""
        payload = _pack_progress(begun, time_ns, ended, phase, tokens)
        sealed = payload + _pack_crc(_crc32(payload))
        _pwrite(self._fd, sealed + sealed, layout.PROGRESS_OFFSET)

    def load(
        self,
        time_ns: int,
        running: int,
        waiting: int,
        kv_usage: float,
        unfinished: int,
        armed: bool,
        inert: bool,
        tokenless: int = 0,
    ) -> None:
        """Publish the load as it is now; ``kv_usage`` is NaN where it is not known."""
        self._loads += 1
        payload = layout.LOAD.pack(
            self._loads, time_ns, running, waiting, kv_usage, unfinished, armed, inert, tokenless
        )
        sealed = payload + _CRC.pack(_crc32(payload))
        os.pwrite(self._fd, sealed + sealed, layout.LOAD_OFFSET)

    def flush_steps(self) -> None:
        """Publish the totals of steps in `counters`, and their histograms."""
        payload = _pack_step_totals(self._seq, *self.counters[:_STEP_COUNTERS])
        sealed = payload + _pack_crc(_crc32(payload))
        _pwrite(self._fd, sealed + sealed, _STEP_TOTALS_OFFSET)
        # Behind them: readers add the steps beyond the totals to the histograms themselves.
        self._write_cells(self._due[1])

    def flush_requests(self) -> None:
        """Publish the totals of requests, and of llmprobe itself, in `counters`, and their histograms."""
        self._updates += 1
        payload = _pack_request_totals(self._updates, *self.counters[_STEP_COUNTERS:])
        sealed = payload + _pack_crc(_crc32(payload))
        _pwrite(self._fd, sealed + sealed, _REQUEST_TOTALS_OFFSET)
        self._write_cells(self._due[0])

    def observe(self, histogram: int, nanoseconds: int, times: int = 1) -> None:
        """Count a duration ``times`` times in a histogram (an index of `layout.HISTOGRAMS`).

        Published with the next `flush_steps` or `flush_requests`, whichever's it is: one write for many.
        """
        bucket = bucket_of(nanoseconds)
        self._cells[histogram][bucket] += times
        self._due[histogram >= _FIRST_STEP_HISTOGRAM].add((histogram, bucket))

    def _write_cells(self, cells: set[tuple[int, int]]) -> None:
        for cell in cells:
            self._draw(*cell)
        for histogram, first, last in _runs(cells):
            image = self._images[histogram]
            with memoryview(image) as view:
                offset = HISTOGRAMS_OFFSET + histogram * len(image) + first * CELL_PAIR
                _pwrite(self._fd, view[first * CELL_PAIR : (last + 1) * CELL_PAIR], offset)
        cells.clear()  # only now, for the same reason

    def _draw(self, histogram: int, bucket: int) -> None:
        """Bring a cell of its histogram's image up to date."""
        image = self._images.get(histogram)
        if image is None:
            image = self._images[histogram] = bytearray(BUCKETS * CELL_PAIR)
        value = self._cells[histogram][bucket]
        crc = _crc32(_pack_position(histogram * BUCKETS + bucket, value)) or 1
        _pack_cell_pair(image, bucket * CELL_PAIR, value, crc, value, crc)


def _runs(cells: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Cells that are close together, as (histogram, first bucket, last bucket)."""
    runs: list[tuple[int, int, int]] = []
    for histogram, bucket in sorted(cells):
        if runs and runs[-1][0] == histogram and bucket - runs[-1][2] <= _APART:
            runs[-1] = histogram, runs[-1][1], bucket
        else:
            runs.append((histogram, bucket, bucket))
    return runs
