"""An engine process as far as captures can tell: answers asks as it is told, and has a journal with steps."""

from __future__ import annotations

import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.capture.tool import Worker
from llmprobe.record.asked import Paths, Said, read_ask, write
from llmprobe.record.cupti_records import ACTIVITY, COPY, Window
from llmprobe.record.layout import Clock, Phase
from llmprobe.record.recorder import Recorder
from llmprobe.record.window_file import Seen, write_window

STEP_NS = 5_000_000
SECRET = "planted-5ecret-never-to-be-seen"


class ScriptedEngine:
    """Answers every ask on its own thread.

    ``does`` is ``record``, ``until ended``, ``refuse``, ``nothing`` or ``hang``.
    """

    def __init__(self, directory: Path, rank: int = 0, clock: Clock = Clock.CUDA) -> None:
        self.recorder = Recorder.open(directory, "worker", {"role": "worker", "rank": rank})
        self.does = "record"
        self.notes: tuple[str, ...] = ()
        self.asks: list[Any] = []
        self.refusals: dict[str, str | None] = {"torch": None, "kernels": None}
        self._rank = rank
        self._clock = clock
        self._number = 0
        self._paths = Paths.of(self.recorder.writer.path)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def worker(self) -> Worker:
        """As the agent knows it."""
        device = {"name": "NVIDIA H100", "index": 0}
        return Worker(self.recorder.writer.path, f"rank{self._rank}", self._rank, self.refusals, device)

    @property
    def left(self) -> list[str]:
        """What lies in the folder of asks."""
        folder = self._paths.ask.parent
        return [path.name for path in folder.iterdir()] if folder.exists() else []

    def close(self) -> None:
        """The process ends."""
        self._over.set()
        self._thread.join()
        self.recorder.close(remove=True)

    def _serve(self) -> None:
        while not self._over.wait(0.02):
            ask = read_ask(self._paths.ask)
            if ask is None or any(known.id == ask.id for known in self.asks) or self.does == "nothing":
                continue
            self.asks.append(ask)
            if self.does == "refuse":
                write(self._paths.said, Said(ask.id, "failed", "as told"))
                continue
            begin_ns, clocks = time.monotonic_ns(), [(time.time_ns(), time.monotonic_ns())]
            write(self._paths.said, Said(ask.id, "recording", begin_ns=begin_ns))
            if self.does == "hang":
                continue
            while self.does == "until ended" and not self._over.wait(0.02):
                again = read_ask(self._paths.ask)
                if again is not None and again.end:
                    self.asks.append(again)
                    break
            spans = [self._step() for _ in range(4)]
            end_ns = time.monotonic_ns()
            clocks.append((time.time_ns(), time.monotonic_ns()))
            (self._torch if ask.tool == "torch" else self._kernels)(spans, begin_ns, end_ns, clocks[0])
            said = Said(ask.id, "done", "", 4, begin_ns, end_ns, tuple(clocks), self.notes)
            write(self._paths.said, said)

    def _step(self) -> tuple[int, int]:
        """A step of which the device is busy in the middle half."""
        self._number += 1
        entered = time.monotonic_ns()
        self.recorder.begin(int(Phase.DECODE), 2, entered)
        time.sleep(STEP_NS / 1e9)
        end = time.monotonic_ns()
        self.recorder.step(
            self._number,
            entered,
            int(Phase.DECODE),
            int(self._clock),
            0,
            (entered, end - 1_000_000, end - 500_000, end),
            requests=2,
            prefill_requests=0,
            prompt_tokens=0,
            decode_tokens=2,
        )
        return entered, end

    def _kernels(
        self, spans: list[tuple[int, int]], begin_ns: int, end_ns: int, clocks: tuple[int, int]
    ) -> None:
        rows = np.zeros(2 * len(spans), ACTIVITY)
        for at, (begin, end) in enumerate(spans):
            quarter = (end - begin) // 4
            rows[2 * at] = (begin + quarter, begin + 2 * quarter, 0 if at else 2, 7, 0, 0)
            rows[2 * at + 1] = (begin + 2 * quarter, begin + 3 * quarter, 1, 7, 0, COPY)
        # A lambda is named by the file that holds it, as nvcc names those of C++.
        names = ["_Z4gemmi", "memcpy HtoD", f"f::{{lambda at /home/{SECRET}/model.cu:3}}"]
        write_window(self._paths.result, Seen(1, Window(begin_ns, end_ns, rows, names, 0)))

    def _torch(
        self, spans: list[tuple[int, int]], begin_ns: int, end_ns: int, clocks: tuple[int, int]
    ) -> None:
        base = 1_000_000_000
        events = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": SECRET}}]
        for begin, end in spans:
            at = clocks[0] + begin - clocks[1]
            quarter = (end - begin) // 4
            events.append(
                {
                    "ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7,
                    "ts": (at + quarter - base) / 1000, "dur": 2 * quarter / 1000,
                    "args": {"device": 0, "stream": 7, "correlation": 1, "secret": SECRET},
                }
            )  # fmt: skip
            events.append(
                {"ph": "X", "cat": "python_function", "name": f"/home/{SECRET}.py(1): f", "pid": 1, "tid": 1,
                 "ts": (at - base) / 1000, "dur": 1, "args": {}}
            )  # fmt: skip
        document = {
            "schemaVersion": 1,
            "host_name": SECRET,
            "deviceProperties": [{"id": 0, "name": "NVIDIA H100"}],
            "traceEvents": events,
            "baseTimeNanoseconds": base,
        }
        self._paths.result.write_bytes(gzip.compress(json.dumps(document).encode()))
