"""The streaming client's process, and what its requests say about a stretch of time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support import streaming_client

_NAMES = ("sent", "first", "last", "longest", "longest_until")
_FIELDS = np.dtype([(name, "i8") for name in _NAMES])


class LoadFailed(Exception):
    """The client ended by itself, or a request gave fewer tokens than it asked for."""


@dataclass(frozen=True)
class Seen:
    """What the client saw in a stretch of time; medians over its requests."""

    requests: int
    ttft_seconds: float
    tpot_seconds: float
    tokens_per_second: float


class Load:
    """A steady load on one server, from entering the ``with`` block to leaving it."""

    def __init__(
        self,
        port: int,
        model: str,
        concurrency: int,
        prompt_tokens: int,
        output_tokens: int,
        pause_seconds: float = 0.0,
        spread_seconds: float = 0.0,
    ) -> None:
        """
        Args:
            port: of the server, on this machine.
            model: its name there.
            concurrency: requests at a time.
            prompt_tokens: of each request.
            output_tokens: of each request.
            pause_seconds: between a request's end and the next one over the same connection.
            spread_seconds: over which the first requests are sent. About as long as a request takes, and
                they end and begin one by one; without it, all requests do so together, in waves.
        """
        options = {
            "--port": port,
            "--model": model,
            "--concurrency": concurrency,
            "--prompt-tokens": prompt_tokens,
            "--output-tokens": output_tokens,
            "--pause-seconds": pause_seconds,
            "--spread-seconds": spread_seconds,
        }
        self._command = [sys.executable, str(Path(streaming_client.__file__))]
        self._command += [str(part) for option in options.items() for part in option]
        self.concurrency = concurrency
        self._output_tokens = output_tokens
        self._rows: list[tuple[int, ...]] = []
        self._short = 0

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reading.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            row = json.loads(line)
            self._rows.append(tuple(row[name] for name in _NAMES))
            self._short += not row["full"]

    def wait(self, seconds: float) -> None:
        """Let it run for that long. Raises LoadFailed."""
        time.sleep(seconds)
        if self._process.poll() is not None:
            raise LoadFailed(f"the client ended with exit status {self._process.returncode}")
        if self._short:
            raise LoadFailed(f"{self._short} requests did not get all their tokens")

    def requests(self) -> np.ndarray:
        """Those that are over: when each was ``sent``, its ``first`` and ``last`` token came, how long the
        ``longest`` wait between two of its tokens was, and until when (ns)."""
        return np.array(list(self._rows), dtype=_FIELDS)

    def longest_seconds(self) -> float:
        """Of the last requests: one that runs now should be over after that long."""
        rows = self.requests()[-2 * self.concurrency :]
        return float((rows["last"] - rows["sent"]).max()) / 1e9 if len(rows) else 0.0

    def seen(self, begin_ns: int, end_ns: int) -> Seen:
        """Requests wholly between two times; of the others, their tokens count. Raises LoadFailed."""
        rows = self.requests()
        whole = rows[(rows["sent"] >= begin_ns) & (rows["last"] <= end_ns)]
        if not len(whole):
            raise LoadFailed("no request began and ended within the time measured: make that longer")
        gaps = self._output_tokens - 1
        # A request's tokens lie evenly between its first and last.
        length = np.maximum(rows["last"] - rows["first"], 1)
        within = np.minimum(rows["last"], end_ns) - np.maximum(rows["first"], begin_ns)
        tokens = gaps * np.clip(within / length, 0, 1)
        tokens += (rows["first"] >= begin_ns) & (rows["first"] < end_ns)
        return Seen(
            len(whole),
            float(np.median(whole["first"] - whole["sent"])) / 1e9,
            float(np.median(whole["last"] - whole["first"])) / gaps / 1e9,
            float(tokens.sum()) / (end_ns - begin_ns) * 1e9,
        )
