"""How long the engine's outputs wait in a front end: from the engine core to their streams.

The engine core stamps the outputs of an iteration when it has made them with CLOCK_MONOTONIC, which processes
of one machine share. A front end that has no time left takes them late, and clients see tokens in bunches.
"""

from __future__ import annotations

import time
from collections import deque

from llmprobe.record.recorder import Recorder

_now = time.monotonic_ns
_AT_MOST = 512  # only noted, should nobody come to write them
#: An engine on another machine has a clock of its own: what is further off is no lag.
_MOST_NS = 600 * 10**9


class OutputLags:
    """Those of one front end. `handed` and `note` are for its event loop, `write` for any thread."""

    def __init__(self) -> None:
        self._last: int | None = None  # nobody has said yet which engine's
        self._noted: deque[tuple[Recorder, int]] = deque(maxlen=_AT_MOST)

    def handed(self, made_seconds: float) -> None:
        """Outputs were detokenized and handed to their streams. Of an iteration's parts the last counts.

        Args:
            made_seconds: CLOCK_MONOTONIC when the engine core had them; 0 where it does not say.
        """
        lag = _now() - round(made_seconds * 1e9)
        self._last = lag if made_seconds and 0 <= lag <= _MOST_NS else None

    def note(self, recorder: Recorder | None) -> None:
        """The outputs handed last were of this engine; None: of one that goes unrecorded."""
        lag, self._last = self._last, None
        if lag is not None and recorder is not None:
            self._noted.append((recorder, lag))

    def write(self) -> None:
        """Write what was noted."""
        lags: dict[Recorder, list[int]] = {}
        while self._noted:
            try:
                recorder, lag = self._noted.popleft()
            except IndexError:  # another thread took the last one
                break
            lags.setdefault(recorder, []).append(lag)
        for recorder, of in lags.items():
            recorder.output_lags(tuple(of))
