"""Much for a journal at once: what lies side by side in the file goes there with one write.

Each ``os.pwrite`` gives the interpreter lock away. A thread that writes a quarter second of a loaded front
end cell by cell takes it from the event loop a hundred times, and as often the loop waits to get it back.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmprobe.record import layout
from llmprobe.record.journal import JournalWriter

_pwrite = os.pwrite
_crc32 = zlib.crc32
_pack_crc = layout.CRC.pack
_pack_position = struct.Struct("<QQ").pack
_pack_pair = struct.Struct("<QI4xQI4x").pack_into
_BUCKETS, _CELL_PAIR = layout.BUCKETS, layout.CELL_PAIR
#: Cells between two changed ones that are written once more rather than written around: a page of them.
_APART = 4096 // _CELL_PAIR


def append_all(writer: JournalWriter, pack: struct.Struct, rows: Sequence[tuple[Any, ...]]) -> None:
    """Append a record of that layout for each of ``rows``: its fields behind ``seq``."""
    at = 0
    while at < len(rows):
        slot = writer._seq % writer._slots
        some = rows[at : at + writer._slots - slot]
        written = bytearray()
        for seq, fields in enumerate(some, writer._seq):
            payload = pack.pack(seq, *fields)
            written += payload
            written += _pack_crc(_crc32(payload))
        _pwrite(writer.fileno(), written, layout.RING_OFFSET + slot * layout.RECORD_SIZE)
        writer._seq += len(some)  # only now: a write that failed must not leave a hole
        at += len(some)


class BatchWriter(JournalWriter):
    """As `JournalWriter`; calls must not overlap either. What lies in the file is the same."""

    def __init__(self, fd: int, path: Path, slots: int) -> None:
        super().__init__(fd, path, slots)
        #: Histogram → its cells as they lie in the file, for those that were ever counted in (58 KiB each).
        self._images: dict[int, bytearray] = {}

    def _write_cells(self, cells: set[tuple[int, int]]) -> None:
        for histogram, begin, end in _runs(sorted(cells)):
            image = self._images.get(histogram)
            if image is None:
                image = self._images[histogram] = bytearray(_BUCKETS * _CELL_PAIR)
            for bucket in range(begin, end):
                if (histogram, bucket) in cells:
                    value, position = self._cells[histogram][bucket], histogram * _BUCKETS + bucket
                    crc = _crc32(_pack_position(position, value)) or 1
                    _pack_pair(image, bucket * _CELL_PAIR, value, crc, value, crc)
            offset = layout.HISTOGRAMS_OFFSET + histogram * len(image)
            with memoryview(image) as view:
                _pwrite(self._fd, view[begin * _CELL_PAIR : end * _CELL_PAIR], offset + begin * _CELL_PAIR)
        cells.clear()


def _runs(cells: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """Of sorted cells those that lie near each other: histogram, first bucket, the one behind the last."""
    begin = 0
    for index in range(1, len(cells) + 1):
        histogram, last = cells[index - 1]
        if index < len(cells) and cells[index][0] == histogram and cells[index][1] - last <= _APART:
            continue
        yield histogram, cells[begin][1], last + 1
        begin = index
