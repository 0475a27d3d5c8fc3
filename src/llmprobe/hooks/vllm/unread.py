"""What a worker was asked to do and nobody has read yet: noted on the step path, read elsewhere, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from llmprobe.hooks.vllm.batch import DUMMY, Batch, BatchReader, Noted
from llmprobe.record.clock import HOST_STEPS_KEPT

#: An output of the scheduler: the number of its step (0: none was made of it), when it came, and the fields
#: of `Noted`; a total of -1 stands for padding, which works on no request.
Row = tuple[int, int, Any, int, Any, Any, dict[str, int] | None, tuple[Any, ...], dict[str, int], Any]
NO_ROW: Row = (0, 0, (), 0, (), (), None, (), {}, None)
#: In the place of a row: forget the requests so far.
FORGET: Row = (-1, 0, (), 0, (), (), None, (), {}, None)
_AT_MOST = 2 * HOST_STEPS_KEPT


class Unread:
    """Outputs of one engine's scheduler. Any thread may append to ``rows``; only one at a time may read."""

    def __init__(self, failed: Callable[[str, Exception], None]) -> None:
        """
        Args:
            failed: told of outputs that cannot be read.
        """
        #: In order; also those that made no step: requests begin and end in them all the same.
        self.rows: deque[Row] = deque(maxlen=_AT_MOST)
        self._reader = BatchReader()
        self._failed = failed
        #: Batches of steps that are not recorded yet, by number; None: it could not be read.
        self._read: dict[int, Batch | None] = {}

    def start(self, windows: tuple[int | None, ...]) -> None:
        """From here on, of a model whose KV-cache groups have these windows."""
        self._reader = BatchReader(windows)

    def batch(self, row: Row) -> Batch | None:
        """The batch of a step, once those before it are read; None if it could not be."""
        number, read = row[0], self._read
        while number not in read and self.rows:
            earlier = self.rows.popleft()
            if earlier[0] < 0:
                self._reader = BatchReader(self._reader.windows)
                continue
            batch = None
            try:
                batch = DUMMY if earlier[3] < 0 else self._reader.read(Noted(*earlier[2:]))
            except Exception as error:  # noqa: BLE001 - the others are good
                self._failed("vllm.read", error)
            if earlier[0]:
                read[earlier[0]] = batch
                if len(read) > _AT_MOST:  # of steps that were given up; fewer wait for their times
                    read.pop(next(iter(read)), None)
        return read.get(number)

    def take(self, row: Row) -> Batch | None:
        """`batch`, of a step that is being recorded: it and those before it are not needed any more."""
        batch, read, number = self.batch(row), self._read, row[0]
        read.pop(number, None)
        if read:
            for earlier in [known for known in list(read) if known <= number]:
                read.pop(earlier, None)
        return batch
