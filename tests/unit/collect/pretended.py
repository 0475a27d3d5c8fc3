"""A pretended server over real journals, and a clock of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprobe.collect.collector import Collector
from llmprobe.collect.views import ServerView
from llmprobe.compute.hardware import Peaks
from llmprobe.export.prometheus import expose
from llmprobe.record.layout import Phase
from llmprobe.record.recorder import Recorder

SECOND = 10**9
PEAKS = Peaks(1e12, 1e14, "bfloat16", "nominal", "made for this test")
MODEL = {
    "weights_bytes": 1_000_000,
    "compute_dtype": "bfloat16",
    "operators": {
        "linear": {"bytes": 800_000, "params": 400_000},
        "head": {"bytes": 100_000, "params": 50_000},
    },
    "embedding_bytes": 100_000,
    "tied": False,
    "kv": {
        "capacity_bytes": 10_000_000,
        "groups": [
            {
                "kind": "full",
                "window": None,
                "layers": 2,
                "bytes_per_token": 100.0,
                "flops_per_pair": 200.0,
                "bytes_per_request": 0.0,
            }
        ],
    },
    "unmodelled": [],
}


class Server:
    """One pretended server: a worker and front ends, each with a journal. ``requests`` decode in a step."""

    requests = 1

    def __init__(
        self, directory: Path, group: str = "g", server: str = "vllm-1", fronts: int = 1, engine: int = 0
    ) -> None:
        said = {"group": group, "server": server, "model_name": "m", "framework": "vllm", "engine": engine}
        self.worker = Recorder.open(
            directory, "worker", {**said, "role": "worker", "rank": 0, "clock": "host", "model": MODEL}
        )
        self.fronts = [
            Recorder.open(directory, "frontend", {**said, "role": "frontend"}) for _ in range(fronts)
        ]

    def step(self, begin: int, end: int, phase: Phase = Phase.DECODE, flags: int = 0) -> None:
        middle = begin + (end - begin) * 3 // 4
        number = self.worker.begin(phase, 1, begin)
        self.worker.step(
            number,
            begin,
            phase,
            0,
            flags,
            (begin, middle, middle, end),
            requests=self.requests,
            prefill_requests=0,
            prompt_tokens=0,
            decode_tokens=self.requests,
            sampled=self.requests,
            context_decode=(10 * self.requests, 0, 0, 0),
            pairs_decode=(10 * self.requests, 0, 0, 0),
        )

    def close(self) -> None:
        for recorder in (self.worker, *self.fronts):
            recorder.close()


class Clock:
    now = 100 * SECOND

    def __call__(self) -> int:
        return self.now


def collector(tmp_path: Path, clock: Clock, server: Server, **more: Any) -> Collector:
    def own() -> dict[Path, Any]:
        recorders = (server.worker, *server.fronts)
        return {recorder.writer.path: recorder.writer for recorder in recorders}

    return Collector(tmp_path, clock=clock, peaks=lambda facts: PEAKS, own_writers=own, **more)


def only(found: Collector) -> ServerView:
    found.tick(final=True)
    (view,) = found.views()
    return view


def total(view: ServerView) -> float:
    return sum(sum(parts.values()) for parts in view.ranks[0].device_time.values())


def busy_second(server: Server, at: int, steps: int = 10) -> None:
    """A request that pends for a second in which ``steps`` steps of 60 ms run, 40 ms apart."""
    for front in server.fronts:
        front.pending(at, 1)
    for number in range(steps):
        server.step(at + number * 100_000_000 + 40_000_000, at + (number + 1) * 100_000_000)
    for front in server.fronts:
        front.pending(at + SECOND, 0)


def program(directory: Path, **facts: Any) -> Recorder:
    said = {"role": "program", "group": "g", "server": "generate", "framework": "transformers", **facts}
    return Recorder.open(directory, "program", said)


def one_step(recorder: Recorder, begin: int, end: int) -> None:
    number = recorder.begin(Phase.DECODE, 1, begin)
    recorder.step(
        number, begin, Phase.DECODE, 0, 0, (begin, end, end, end),
        requests=1, prefill_requests=0, prompt_tokens=0, decode_tokens=1,
    )  # fmt: skip


def series(found: Collector) -> list[str]:
    lines = expose(found.views()).decode().splitlines()
    return [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")]
