"""Reading a journal, at any time, without disturbing its writer: torn records are seen and left out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmprobe.record import layout
from llmprobe.record.journal import JournalError, JournalVersionError, JournalWriter

_ANY = np.dtype(f"V{layout.RECORD_SIZE}")
_CELL_WORDS = layout.CELL_PAIR // 8  # of each of two cells: its value, then its CRC below four unused bytes
_FIRST_CHUNK = 32
_CHUNK = 512
_READ_ROUNDS = 256
_SEQ = struct.Struct("<Q")
_STEP_SUMS = (
    ("step_prompt_tokens", "prompt_tokens"),
    ("step_decode_tokens", "decode_tokens"),
    ("own_ns_step", "own_ns"),
)


class Load(NamedTuple):
    """What a process published about its load; see `layout.LOAD`."""

    update: int
    time: int
    running: int
    waiting: int
    kv_usage: float
    unfinished: int
    armed: int
    inert: int
    tokenless: int


class Progress(NamedTuple):
    """The step begun last and the number of the one ended last, as of a quarter second ago at most."""

    begun: int
    time: int
    ended: int
    phase: int
    tokens: int


class Records(NamedTuple):
    """New records since the last read, in order, by kind, and how many the ring overwrote unread."""

    steps: np.ndarray
    requests: np.ndarray
    pending: np.ndarray
    lost: int


class JournalReader:
    """Reads one journal, at any time, without disturbing its writer."""

    def __init__(self, path: Path, writer: JournalWriter | None = None) -> None:
        """Open a journal.

        Args:
            path: the journal's file.
            writer: this process's own writer of that file, if it is. Its descriptor is then shared:
                closing another descriptor of the same file would drop the writer's lock (POSIX).

        Raises:
            JournalVersionError: ``path`` is a journal that this version does not read.
            JournalError: it is none, or is still being made.
        """
        self.path = path
        self._writer = writer
        self._fd = -1
        if writer is not None:
            self._fd = writer.fileno()
        else:
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError as error:
                raise JournalError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from None
        try:
            self._read_header()
        except JournalError:
            self.close()
            raise
        self._facts: tuple[list[bytes], dict[str, Any]] | None = None
        self._next = 0
        self._expected = _FIRST_CHUNK
        self._resume = 0  # records before it were returned by an earlier reader
        self._histograms: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._shown: dict[str, np.ndarray] = {}
        self._uncounted = np.empty(0, layout.STEP)  # steps read that the published totals may lack

    def _read_header(self) -> None:
        head = os.pread(self._fd, layout.HEADER.size, 0)
        if len(head) < layout.HEADER.size or head[:8] != layout.MAGIC:
            raise JournalError(f"{self.path} is not a journal, or is still being made")
        _, version, size, ring, record, slots, identity, crc = layout.HEADER.unpack(head)
        if crc != zlib.crc32(head[:-4]):
            raise JournalError(f"the header of {self.path} is damaged")
        if (version, ring, record) != (layout.VERSION, layout.RING_OFFSET, layout.RECORD_SIZE):
            raise JournalVersionError(
                f"{self.path} has journal version {version}; this llmprobe reads {layout.VERSION}"
            )
        if slots <= 0 or os.fstat(self._fd).st_size < size:
            raise JournalError(f"{self.path} is cut short")
        self.identity = bytes(identity).hex()
        self.slots = self._slots = int(slots)

    def close(self) -> None:
        """Close the file; the journal itself stays."""
        if self._fd >= 0 and self._writer is None:
            os.close(self._fd)
        self._fd = -1

    def fileno(self) -> int:
        """The open file; -1 once closed."""
        return self._fd

    def alive(self) -> bool:
        """Whether the writer still lives: it holds a lock on the file until it dies."""
        if self._writer is not None:
            return self._writer.fileno() >= 0
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
        fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return False

    def facts(self) -> dict[str, Any]:
        """What the writer says about its process, engine and model; empty if unreadable."""
        numbers = [os.pread(self._fd, 8, layout.FACTS_OFFSET + slot * layout.FACTS_SLOT) for slot in range(2)]
        if self._facts is not None and self._facts[0] == numbers:
            return self._facts[1]
        best: tuple[int, bytes] = (0, b"{}")
        for slot in range(2):
            data = os.pread(self._fd, layout.FACTS_SLOT, layout.FACTS_OFFSET + slot * layout.FACTS_SLOT)
            if len(data) < 16:
                continue
            number, length = struct.unpack_from("<QI", data)
            end = 12 + length
            if (
                end + 4 <= len(data)
                and layout.CRC.unpack_from(data, end)[0] == zlib.crc32(data[:end])
                and number > best[0]
            ):
                best = (number, data[12:end])
        said = json.loads(best[1])
        facts: dict[str, Any] = said if isinstance(said, dict) else {}
        # Of an update that is under way, the old facts are read: they are not those of its number.
        newest = max((_SEQ.unpack(number)[0] for number in numbers if len(number) == _SEQ.size), default=0)
        self._facts = (numbers, facts) if best[0] == newest else None
        return facts

    def _pair(self, offset: int, size: int) -> bytes | None:
        """The newer whole copy of a pair, by its leading update number; None if there is none yet."""
        data = os.pread(self._fd, 2 * (size + 4), offset)
        best: bytes | None = None
        for start in (0, size + 4):
            copy = data[start : start + size]
            crc = data[start + size : start + size + 4]
            if len(crc) < 4 or layout.CRC.unpack(crc)[0] != zlib.crc32(copy):
                continue
            if best is None or struct.unpack_from("<Q", copy)[0] > struct.unpack_from("<Q", best)[0]:
                best = copy
        return best

    def counters(self) -> dict[str, int]:
        """Every cumulative total of `layout.COUNTERS` by name, as of the last `read`.

        The engine publishes its totals of steps a few times a second; steps read since are added here, so
        that none is missing however the engine ended. (``gap_ns_*`` alone stay as published.)
        """
        counters = dict.fromkeys(layout.COUNTERS, 0)
        if data := self._pair(layout.REQUEST_TOTALS_OFFSET, layout.REQUEST_TOTALS.size):
            counters.update(zip(layout.REQUEST_COUNTERS, layout.REQUEST_TOTALS.unpack(data)[1:], strict=True))
        counters.update(self._step_totals())
        steps = self._uncounted
        for phase in np.flatnonzero(np.bincount(steps["phase"])):
            of = steps[steps["phase"] == phase]
            counters[f"steps_{layout.PHASES[phase]}"] += len(of)
            counters[f"span_ns_{layout.PHASES[phase]}"] += int(np.maximum(of["e3"] - of["e0"], 0).sum())
        for name, field in _STEP_SUMS:
            counters[name] += int(steps[field].sum())
        return counters

    def progress(self) -> Progress | None:
        """The step begun last, or None before the first."""
        data = self._pair(layout.PROGRESS_OFFSET, layout.PROGRESS.size)
        return Progress(*layout.PROGRESS.unpack(data)) if data else None

    def load(self) -> Load | None:
        """The load published last, or None before the first."""
        data = self._pair(layout.LOAD_OFFSET, layout.LOAD.size)
        return Load(*layout.LOAD.unpack(data)) if data else None

    def histogram(self, name: str) -> np.ndarray:
        """Counts by bucket, as of the last `counters`, in which its sum is.

        See `layout.bucket_bounds_seconds` for the buckets.
        """
        first = layout.HISTOGRAM_INDEX[name] * layout.BUCKETS
        data = os.pread(
            self._fd, layout.BUCKETS * layout.CELL_PAIR, layout.HISTOGRAMS_OFFSET + first * layout.CELL_PAIR
        )
        words = np.frombuffer(data, dtype="<u8")
        # Few cells change from one call to the next: only those are checked anew.
        before, known = self._histograms.get(name) or (
            np.zeros_like(words),
            np.zeros(layout.BUCKETS, np.uint64),
        )
        counts = known.copy()
        for bucket in set((np.flatnonzero(words != before) // _CELL_WORDS).tolist()):
            cells = words[bucket * _CELL_WORDS : (bucket + 1) * _CELL_WORDS].tolist()
            whole = [
                value
                for value, sealed in zip(cells[::2], cells[1::2], strict=True)
                if sealed & 0xFFFFFFFF == layout.cell_crc(first + bucket, value)
            ]
            counts[bucket] = max(whole, default=0)
        self._histograms[name] = (words, counts)
        if name.startswith("step_"):
            counts = self._with_unpublished(name, counts)
        return counts

    def _with_unpublished(self, name: str, counts: np.ndarray) -> np.ndarray:
        """Add the steps that the published totals lack.

        The writer publishes totals before cells, and here they are looked at after the cells: a step is never
        counted twice. It may be missing for a moment; then what was shown before stands.
        """
        self._step_totals()
        phase = layout.PHASES.index(name.removeprefix("step_"))
        counts = counts.copy()
        steps = self._uncounted[self._uncounted["phase"] == phase]
        for span in (steps["e3"] - steps["e0"]).tolist():
            counts[layout.bucket_of(span)] += np.uint64(1)
        shown = self._shown.get(name)
        if shown is not None:
            counts = np.maximum(counts, shown)
        self._shown[name] = counts
        return counts

    def _step_totals(self) -> dict[str, int]:
        """The published totals of steps; forgets the steps that they count."""
        data = self._pair(layout.STEP_TOTALS_OFFSET, layout.STEP_TOTALS.size)
        if not data:
            return {}
        through, *totals = layout.STEP_TOTALS.unpack(data)
        self._uncounted = self._uncounted[self._uncounted["seq"] >= through]
        return dict(zip(layout.STEP_COUNTERS, totals, strict=True))

    @property
    def position(self) -> int:
        """``seq`` of the record that `read` will return next; set it to resume after a restart."""
        return max(self._next, self._resume)

    @position.setter
    def position(self, seq: int) -> None:
        # Steps before it that the published totals lack are still read, to be counted, but not returned.
        data = self._pair(layout.STEP_TOTALS_OFFSET, layout.STEP_TOTALS.size)
        published = layout.STEP_TOTALS.unpack(data)[0] if data else 0
        self._resume = seq
        self._next = min(seq, int(published))

    def read(self) -> Records:
        """The records appended since the last call."""
        parts: list[bytes] = []
        first, lost = self._next, 0
        count = self._expected
        for _ in range(_READ_ROUNDS):
            data = self._chunk(count)
            whole = self._whole_records(data)
            if whole:
                parts.append(data[: whole * layout.RECORD_SIZE])
                self._next += whole
            count = _CHUNK
            if whole * layout.RECORD_SIZE < len(data):
                at = whole * layout.RECORD_SIZE
                expected = max(self._next, self._resume)
                if not self._skip_lost(data[at : at + layout.RECORD_SIZE]):
                    break
                lost += max(self._next - expected, 0)
        # A reader that keeps its pace finds about as many the next time.
        self._expected = min(max((self._next - first) * 5 // 4, _FIRST_CHUNK), _CHUNK)
        records = _by_kind(parts, lost, 0)
        if len(records.steps):
            self._uncounted = _joined(self._uncounted, records.steps)[-self._slots :]
        if parts and _SEQ.unpack_from(parts[0])[0] < self._resume:
            records = _by_kind(parts, lost, self._resume)
        return records

    def _chunk(self, count: int) -> bytes:
        slot = self._next % self._slots
        count = min(count, self._slots - slot)
        return os.pread(self._fd, count * layout.RECORD_SIZE, layout.RING_OFFSET + slot * layout.RECORD_SIZE)

    def _whole_records(self, data: bytes) -> int:
        """How many records at the start of ``data`` are whole, and the ones that come next."""
        count, size = len(data) // layout.RECORD_SIZE, layout.RECORD_SIZE
        seqs = np.frombuffer(data, "<u8", count * (size // 8))[:: size // 8]
        follow = seqs == np.arange(self._next, self._next + count, dtype=np.uint64)
        if not follow.all():
            count = int(follow.argmin())
        crcs = np.frombuffer(data, "<u4", count * (size // 4))[size // 4 - 1 :: size // 4].tolist()
        # All that every process records passes here: without a loop in Python.
        payloads = np.ndarray((count,), f"V{size - 4}", data, strides=(size,)).tolist()
        found = list(map(zlib.crc32, payloads))
        if found != crcs:
            return next(number for number in range(count) if found[number] != crcs[number])
        return count

    @staticmethod
    def _whole(record: bytes, seq: int) -> bool:
        return (
            len(record) == layout.RECORD_SIZE
            and _SEQ.unpack_from(record)[0] == seq
            and layout.CRC.unpack_from(record, layout.RECORD_SIZE - 4)[0] == zlib.crc32(record[:-4])
        )

    def _skip_lost(self, found: bytes) -> int:
        """Move past records that will never be read; 0 if the next one is merely not written yet.

        ``found`` lies where the next record should: an older one, so far; a newer one, if that slot was
        overwritten; or a damaged one, lost if it has a whole successor, because the writer finishes one
        record before it begins the next.
        """
        if len(found) < layout.RECORD_SIZE or _SEQ.unpack_from(found)[0] < self._next or not any(found):
            return 0
        ring = os.pread(self._fd, self._slots * layout.RECORD_SIZE, layout.RING_OFFSET)
        newer = [
            seq
            for at in range(0, len(ring), layout.RECORD_SIZE)
            if (seq := _SEQ.unpack_from(ring, at)[0]) >= self._next
            and seq % self._slots == at // layout.RECORD_SIZE
            and self._whole(ring[at : at + layout.RECORD_SIZE], seq)
        ]
        if not newer:
            return 0
        lost = int(min(newer)) - self._next
        self._next += lost
        return lost


def _by_kind(parts: list[bytes], lost: int, from_seq: int) -> Records:
    rows = np.frombuffer(b"".join(parts), layout.STEP)  # what all kinds share lies where it does in a step
    kinds = rows["kind"]
    if from_seq:
        kinds = np.where(rows["seq"] >= from_seq, kinds, 0)

    def of(kind: layout.Kind) -> np.ndarray:
        chosen = kinds == kind
        found = rows if chosen.all() else rows.view(_ANY)[chosen]
        return found.view(layout.DTYPES[kind])

    return Records(of(layout.Kind.STEP), of(layout.Kind.REQUEST), of(layout.Kind.PENDING), lost)


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Both, as plain bytes: joining named fields costs numpy ten times as much."""
    joined: np.ndarray = np.concatenate([one.view(_ANY), other.view(_ANY)]).view(layout.STEP)
    return joined
