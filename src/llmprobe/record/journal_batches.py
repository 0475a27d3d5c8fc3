"""Much for a journal at once: what lies side by side in the file goes there with one write.

Each ``os.pwrite`` gives the interpreter lock away. A thread that writes a quarter second of a loaded front
end cell by cell takes it from the event loop a hundred times, and as often the loop waits to get it back.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
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
        begin = last = (-1, 0)
        for cell in sorted(cells):
            histogram, bucket = cell
            if histogram != last[0] or bucket - last[1] > _APART:
                self._write_run(begin, last)
                begin = cell
            value, position = self._cells[histogram][bucket], histogram * _BUCKETS + bucket
            crc = _crc32(_pack_position(position, value)) or 1
            _pack_pair(self._image(histogram), bucket * _CELL_PAIR, value, crc, value, crc)
            last = cell
        self._write_run(begin, last)
        cells.clear()

    def _image(self, histogram: int) -> bytearray:
        image = self._images.get(histogram)
        if image is None:
            image = self._images[histogram] = bytearray(_BUCKETS * _CELL_PAIR)
        return image

    def _write_run(self, begin: tuple[int, int], last: tuple[int, int]) -> None:
        """The cells of one histogram from one to another as they are in its image."""
        histogram = begin[0]
        if histogram < 0:  # there are none
            return
        first, end = begin[1] * _CELL_PAIR, (last[1] + 1) * _CELL_PAIR
        with memoryview(self._images[histogram]) as view:
            offset = layout.HISTOGRAMS_OFFSET + histogram * len(view) + first
            _pwrite(self._fd, view[first:end], offset)
