"""GPU telemetry: every GPU that a live rank uses, looked at once a second through NVML.

A thread of its own asks, so that a driver that does not answer holds up nobody; what it saw last is read by
others. It starts with the first rank on a GPU: elsewhere nothing is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprobe.collect.gpu import WINDOW_SECONDS, GpuWatch
from llmprobe.collect.gpu_users import users
from llmprobe.collect.host import lock_holder
from llmprobe.collect.nvml import Hardware, Nvml, NvmlError, open_nvml
from llmprobe.collect.process import Process
from llmprobe.collect.views import GpuView
from llmprobe.compute.evidence import CounterEvidence
from llmprobe.compute.steady import SHORT_SECONDS

#: Figures that only a GPU's counters give.
COUNTER_FIGURES = ("gpu_dram_active_ratio", "gpu_tensor_active_ratio")
#: Figures that every rank on a GPU should have.
GPU_FIGURES = ("gpu_power_watts", *COUNTER_FIGURES)

_EVERY_SECONDS = 1.0
_RETRY_NS = 60 * 10**9
_STALE_NS = 5 * 10**9


@dataclass(frozen=True)
class _Use:
    """Who uses one GPU, as journals tell."""

    own: frozenset[int]
    ranks: int


@dataclass(frozen=True)
class _Seen:
    """One GPU at the last look. ``problem`` says why nothing is known."""

    at_ns: int
    view: GpuView | None = None
    counters: CounterEvidence | None = None
    counters_lately: CounterEvidence | None = None
    no_counters: str = ""
    problem: str = ""


class Telemetry:
    """`watch` and what reads are called by one thread, `sample` by one other; nothing raises.

    Args:
        library: opens NVML.
        clock: nanoseconds of CLOCK_MONOTONIC.
        root: of the file system.
        thread: whether a thread of its own samples; else the caller does.
    """

    def __init__(
        self,
        library: Callable[[], Nvml] = open_nvml,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        root: Path = Path("/"),
        thread: bool = True,
    ) -> None:
        self._open = library
        self._clock = clock
        self._root = root
        self._threaded = thread
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._uses: Mapping[str, _Use] = {}
        self._seen: Mapping[str, _Seen] = {}
        self._hardware: dict[str, Hardware] = {}  # of every GPU that was ever seen
        self._nvml: Nvml | None = None
        self._watches: dict[str, GpuWatch] = {}
        self._retry_ns: dict[str, int] = {}  # GPU, or "" for NVML itself → not to be tried before
        self._problems: dict[str, str] = {}

    def watch(self, processes: Iterable[Process]) -> None:
        """Say who is measured: the GPUs of live ranks are looked at, no others."""
        living = [process for process in processes if process.alive]
        by_uuid: dict[str, list[Process]] = {}
        for process in living:
            if process.role != "frontend" and (uuid := gpu_of(process.facts)):
                by_uuid.setdefault(uuid, []).append(process)
        uses = {}
        for uuid, ranks in by_uuid.items():
            groups = {rank.group for rank in ranks}
            own = {_pid(process) for process in living if process.group in groups}
            uses[uuid] = _Use(frozenset(pid for pid in own if pid is not None), len(ranks))
        self._uses = uses
        if uses and self._threaded and self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._run, name="llmprobe-telemetry", daemon=True)
            self._thread.start()

    def gpu(self, facts: Mapping[str, Any]) -> GpuView | None:
        """The GPU of a rank with these facts; None where nothing is known of late."""
        seen, age = self._of(facts)
        return dataclasses.replace(seen.view, age_seconds=age) if seen is not None and seen.view else None

    def counters(self, facts: Mapping[str, Any]) -> CounterEvidence | None:
        """Likewise its counters over the last 10 s."""
        seen, age = self._of(facts)
        found = seen.counters if seen is not None else None
        return dataclasses.replace(found, age_seconds=age) if found is not None else None

    def counters_lately(self, facts: Mapping[str, Any]) -> CounterEvidence | None:
        """Likewise over the last 3 s, the shorter of a verdict's windows."""
        seen, age = self._of(facts)
        found = seen.counters_lately if seen is not None else None
        return dataclasses.replace(found, age_seconds=age) if found is not None else None

    def hardware(self, facts: Mapping[str, Any]) -> Hardware | None:
        """What does not change about it; None before it was seen. Known for good from then on."""
        return self._hardware.get(gpu_of(facts))

    def missing(self, facts: Mapping[str, Any]) -> dict[str, str]:
        """Figure → why it is not known, of a rank with these facts; empty where it uses no GPU."""
        uuid = gpu_of(facts)
        seen = self._seen.get(uuid)
        if not uuid or seen is None:  # not looked at yet
            return {}
        if seen.problem or self._clock() - seen.at_ns > _STALE_NS:
            silent = f"NVML has not answered for {(self._clock() - seen.at_ns) / 1e9:.0f} s"
            return dict.fromkeys(GPU_FIGURES, seen.problem or silent)
        return dict.fromkeys(COUNTER_FIGURES, seen.no_counters) if seen.no_counters else {}

    def sample(self) -> None:
        """Look at every GPU once."""
        now = self._clock()
        uses = self._uses
        for uuid in [uuid for uuid in self._watches if uuid not in uses]:
            self._drop(uuid)
        self._retry_ns = {at: when for at, when in self._retry_ns.items() if at in uses or not at}
        if not uses:
            self._shut()
        self._seen = {uuid: self._look(uuid, use, now) for uuid, use in uses.items()}

    def close(self) -> None:
        """Stop looking."""
        self._ended.set()
        thread = self._thread
        if thread is None:
            self._shut()
        else:
            thread.join(2.0)

    def _run(self) -> None:
        try:
            while True:
                self.sample()
                if self._ended.wait(_EVERY_SECONDS):
                    break
        finally:
            self._shut()

    def _look(self, uuid: str, use: _Use, now: int) -> _Seen:
        try:
            watch = self._watch_of(uuid, now)
            if watch is None:
                return _Seen(now, problem=self._problems.get(uuid) or self._problems.get("", ""))
            watch.sample(now, lambda listed, used: users(listed, use.own, use.ranks, used, self._root))
            return _Seen(
                now,
                watch.view(),
                watch.counters(WINDOW_SECONDS),
                watch.counters(SHORT_SECONDS),
                watch.no_counters,
            )
        except Exception as error:  # noqa: BLE001 - a GPU that goes, or NVML's surprises, must not end the rest
            self._drop(uuid)
            self._failed(uuid, error, now)
            if not self._watches:
                self._shut()  # a library that lost its GPUs finds them again only from the start
            return _Seen(now, problem=self._problems[uuid])

    def _watch_of(self, uuid: str, now: int) -> GpuWatch | None:
        if uuid in self._watches:
            return self._watches[uuid]
        if now < max(self._retry_ns.get(uuid, 0), self._retry_ns.get("", 0)):
            return None
        if self._nvml is None:
            try:
                self._nvml = self._open()
            except NvmlError as error:
                self._failed("", error, now)
                return None
        self._problems.pop("", None)
        watch = self._watches[uuid] = GpuWatch(self._nvml.gpu(uuid))
        self._hardware[uuid] = watch.hardware
        self._problems.pop(uuid, None)
        return watch

    def _failed(self, at: str, error: Exception, now: int) -> None:
        self._problems[at] = str(error) if isinstance(error, NvmlError) else f"NVML: {error!r}"
        self._retry_ns[at] = now + _RETRY_NS

    def _drop(self, uuid: str) -> None:
        watch = self._watches.pop(uuid, None)
        if watch is not None:
            with contextlib.suppress(Exception):
                watch.close()

    def _shut(self) -> None:
        for uuid in list(self._watches):
            self._drop(uuid)
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            with contextlib.suppress(Exception):
                nvml.close()

    def _of(self, facts: Mapping[str, Any]) -> tuple[_Seen | None, float]:
        seen = self._seen.get(gpu_of(facts))
        if seen is None:
            return None, 0.0
        age = self._clock() - seen.at_ns
        return (None, 0.0) if age > _STALE_NS else (seen, max(age, 0) / 1e9)


def gpu_of(facts: Mapping[str, Any]) -> str:
    """The UUID of the GPU in a worker's facts; empty where it has none."""
    device = facts.get("device")
    if not isinstance(device, Mapping) or device.get("type") != "cuda":
        return ""
    return str(device.get("uuid") or "")


def _pid(process: Process) -> int | None:
    """In this namespace; None if another one's."""
    pid = lock_holder(process.reader.fileno())
    if pid is None and process.facts.get("pid") == os.getpid():
        return os.getpid()  # our own locks are not shown to us
    return pid
