"""Steps of a worker without an engine, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm.seams import Seam
from llmprobe.hooks.vllm.steps import WorkerSteps
from llmprobe.record.clock import HostClock, StepClock
from llmprobe.record.journal_reader import JournalReader
from llmprobe.settings import Settings

from .scheduled import Scheduled


class Runner:
    """With the place where vLLM's runner starts a forward."""

    def forward(self) -> None:
        pass


class Rig:
    """Steps of a worker whose runner has a seam, and the journal they end up in."""

    def __init__(self, directory: Path) -> None:
        self.probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(directory)}))
        recorder = self.probe.arm("worker", dict, size=5 << 18)
        assert recorder is not None
        self.recorder = recorder
        self.steps = WorkerSteps(self.probe)
        # What `arm` finds out from a worker of vLLM's.
        self.use(HostClock())
        self.steps.armed = True
        self.reader = JournalReader(recorder.writer.path, recorder.writer)

    def use(self, clock: StepClock) -> None:
        self.steps.use(clock, self.recorder, Seam(Runner, "forward", "v2"))

    def run(self, scheduled: Scheduled, *, forward: bool = True) -> None:
        self.begin(scheduled)
        if forward:
            Runner().forward()
        self.end()

    def begin(self, scheduled: Scheduled) -> None:
        self.steps.entered(scheduled)

    def end(self) -> None:
        self.steps.forward_end(None)
        self.steps.sample_start(None)
        self.steps.sample_end(object())

    def written(self) -> np.ndarray:
        self.steps.write()
        return self.reader.read().steps
