"""Reading a JSON document of which one list is long, item by item: memory holds a piece of it, never all."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmprobe.analysis.events import AnalysisError

_CHUNK_BYTES = 1 << 20
#: One event is at most this long; a longer one is no event.
_MAX_VALUE_CHARS = 1 << 26
_LONGEST_NUMBER = 400
_WHITE_SPACE = re.compile("[ \t\r\n\ufeff]*")
#: A gzip file may hold this much, and no more: it could be made to unpack without end.
MAX_BYTES = 16 << 30


def opened(path: Path) -> BinaryIO:
    """The file's content, unpacked if it is gzip."""
    with path.open("rb") as probe:
        zipped = probe.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path, "rb")) if zipped else path.open("rb")


class Document:
    """A JSON document of which only one list is long; its items are given one by one."""

    def __init__(self, stream: BinaryIO, path: Path, top_level: Callable[[str, Any], None]) -> None:
        self._stream = stream
        self._path = path
        self._top_level = top_level
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False
        self._read = 0
        self._pending = b""
        #: Whether there was a list of events, once all are given.
        self.has_events = False

    def events(self) -> Iterator[Any]:
        """The items of ``traceEvents``; other values of the document go to ``top_level(key, value)``."""
        first = self._peek()
        if first == "[":
            self.has_events = True
            yield from self._items()
            return
        if first != "{":
            raise AnalysisError(
                f"{self._path}: not a trace: neither SQLite, nor JSON, nor .nsys-rep, nor .npz"
            )
        self._at += 1
        while True:
            mark = self._peek()
            if mark == "}":
                return
            if mark == ",":
                self._at += 1
                continue
            key = self._value()
            if not isinstance(key, str) or self._peek() != ":":
                raise self._damaged()
            self._at += 1
            if key == "traceEvents" and self._peek() == "[":
                self.has_events = True
                yield from self._items()
            else:
                self._top_level(key, self._value())

    def _items(self) -> Iterator[Any]:
        self._at += 1
        while True:
            mark = self._peek()
            if mark == "]":
                self._at += 1
                return
            if mark == ",":
                self._at += 1
                continue
            yield self._value()

    def _value(self) -> Any:
        """The JSON value that comes next."""
        self._peek()
        wanted = _CHUNK_BYTES
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if self._ended or self._is_whole(value, end):
                    self._at = end
                    return value
            except json.JSONDecodeError:
                if self._ended:
                    raise self._damaged() from None
            except ValueError:  # an integer of thousands of digits
                raise self._damaged() from None
            if len(self._text) - self._at > _MAX_VALUE_CHARS:
                raise AnalysisError(
                    f"{self._path}: damaged: one value is longer than {_MAX_VALUE_CHARS} characters"
                )
            self._more(wanted)
            wanted *= 2  # a long value is tried again in steps that double, not a chunk at a time

    def _is_whole(self, value: Any, end: int) -> bool:
        """Whether the value that was read cannot go on in the next piece, as a number may."""
        if not isinstance(value, (int, float)) or len(self._text) - end > _LONGEST_NUMBER:
            return True
        return end < len(self._text) and self._text[end] in ",]} \t\r\n"

    def _peek(self) -> str:
        """The next character that is no white space."""
        while True:
            self._at = _WHITE_SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                raise self._damaged()
            self._more(_CHUNK_BYTES)

    def _more(self, wanted: int) -> None:
        raw = self._stream.read(wanted)
        self._read += len(raw)
        if self._read > MAX_BYTES:
            raise AnalysisError(f"{self._path}: unpacks to more than {MAX_BYTES >> 30} GiB")
        self._ended = not raw
        raw = self._pending + raw
        # Not in the middle of a character.
        cut = len(raw)
        if not self._ended:
            for back in range(1, min(4, len(raw)) + 1):
                byte = raw[-back]
                if byte >= 0xC0:
                    cut = len(raw) - back
                    break
                if byte < 0x80:
                    break
        self._pending = raw[cut:]
        self._text = self._text[self._at :] + raw[:cut].decode("utf-8", "replace")
        self._at = 0

    def _damaged(self) -> AnalysisError:
        at = max(0, self._read - len(self._text) + self._at)
        return AnalysisError(
            f"{self._path}: damaged JSON, or cut off: no value or end of one from byte {at} on"
        )
