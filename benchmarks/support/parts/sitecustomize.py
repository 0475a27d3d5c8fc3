"""Adds up what parts of llmprobe take in a vLLM worker. Part of ``own_time_parts.py``.

Python imports this at its start where the folder is on PYTHONPATH. Twice a second the sums so far are written
into the folder that OWN_TIME_PARTS names, one file a process: part → [calls, nanoseconds]. On the engine's
thread those are of the clock, on llmprobe's of its processor time.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmprobe.hooks.on_import import when_imported

_EVERY_SECONDS = 0.5
_sums: dict[str, list[int]] = {}


def _timed(part: str, function: Callable[..., Any], now: Callable[[], int]) -> Callable[..., Any]:
    total = _sums.setdefault(part, [0, 0])

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = now()
        try:
            return function(*args, **kwargs)
        finally:
            total[1] += now() - begin
            total[0] += 1

    return timed


def events(module: Any) -> None:
    """The step clock of a CUDA device: each event it records, and the times it asks for."""
    clock = module.CudaClock
    made, mark = clock.__init__, clock.mark
    places, ended = [0], [True]
    totals = [_sums.setdefault(f"event {index}", [0, 0]) for index in range(4)]
    now = time.monotonic_ns

    def marked(self: Any, stamps: Any, index: int) -> None:
        places[0] = index
        if index in (0, 3):
            ended[0] = index == 3
        mark(self, stamps, index)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        record = self._record

        def recorded(event: Any, stream: Any, index: int = -1) -> None:
            begin = now()
            record(event, stream)
            total = totals[index if index >= 0 else places[0]]
            total[1] += now() - begin
            total[0] += 1

        def by_hooks(event: Any, stream: Any) -> None:  # in the place of marks 0 and 3, in turns
            ended[0] = not ended[0]
            recorded(event, stream, 3 if ended[0] else 0)

        self._record, self.record = recorded, by_hooks

    clock.__init__, clock.mark = init, marked
    clock.harvest = _timed("harvest", clock.harvest, time.thread_time_ns)


def thread(module: Any) -> None:
    """llmprobe's thread: a round, and what of it is writing steps."""
    records, recorder = module.StepRecords, module.Recorder
    records.write = _timed("write", records.write, time.thread_time_ns)
    recorder.steps = _timed("append", recorder.steps, time.thread_time_ns)
    recorder.publish = _timed("publish", recorder.publish, time.thread_time_ns)


def rounds(module: Any) -> None:
    """All of a round."""
    housekeeping = module._Housekeeping
    housekeeping.round = _timed("round", housekeeping.round, time.thread_time_ns)


def _write(folder: Path) -> None:
    while True:
        time.sleep(_EVERY_SECONDS)
        if any(total[0] for total in _sums.values()):
            unfinished = folder / f".{os.getpid()}"
            unfinished.write_text(json.dumps(_sums))
            unfinished.replace(folder / f"{os.getpid()}.json")


def _begin(folder: Path) -> None:
    threading.Thread(target=_write, args=(folder,), daemon=True).start()


if path := os.environ.get("OWN_TIME_PARTS"):
    for _name, _install in {
        "llmprobe.record.cuda_clock": events,
        "llmprobe.hooks.vllm.records": thread,
        "llmprobe.hooks.session": rounds,
    }.items():
        when_imported(_name, _install)
    _begin(Path(path))
    os.register_at_fork(after_in_child=lambda: _begin(Path(path)))
