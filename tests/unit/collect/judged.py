"""A server whose verdicts are looked at, under a load of our making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprobe.collect.collector import Collector
from llmprobe.collect.views import ServerView
from llmprobe.compute.hardware import Peaks

from .pretended import SECOND, Clock, Server

MS = 1_000_000
#: A step of the model moves 901 100 bytes: 18 ms of it are then 0.7 of the bandwidth.
PEAKS = Peaks(901_100 / 0.018 / 0.7, 1e12, "bfloat16", "nominal", "made for this test")


class World:
    """A server under a load of our making, looked at once a second."""

    def __init__(self, directory: Path, clock: Clock | None = None, **more: Any) -> None:
        self.directory = directory
        self.clock = clock or Clock()
        self.server = Server(directory)
        self.more: dict[str, Any] = {"peaks": lambda facts: PEAKS, **more}
        self.collector = self.collect()
        self.at = self.clock.now
        self.server.fronts[0].update_facts(
            flags={"max_num_seqs": 8, "async_scheduling": False, "pipeline_parallel_size": 1}
        )

    def collect(self) -> Collector:
        recorders = (self.server.worker, *self.server.fronts)
        own = {recorder.writer.path: recorder.writer for recorder in recorders}
        return Collector(self.directory, clock=self.clock, own_writers=lambda: own, **self.more)

    def second(self, span_ms: float = 18, gap_ms: float = 2, busy: bool = True) -> ServerView:
        """One second of load, and what is then known."""
        end = self.at + SECOND
        self.server.fronts[0].pending(self.at, int(busy))
        while busy and self.at + (gap_ms + span_ms) * MS <= end:
            begin = self.at + round(gap_ms * MS)
            self.at = begin + round(span_ms * MS)
            self.server.step(begin, self.at)
        self.at = end
        self.clock.now = end
        self.collector.tick()
        (view,) = self.collector.views()
        return view

    def seconds(self, count: int, **load: Any) -> list[str]:
        """The class of decode after each second."""
        return [self.second(**load).verdicts["decode"].bottleneck for _ in range(count)]
