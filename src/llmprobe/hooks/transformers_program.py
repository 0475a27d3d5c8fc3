"""What the ``generate`` calls of one program share: its journal, its clock, its model, and which run now."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from typing import Any

from llmprobe.hooks.naming import program_name
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.torch_model import device_facts
from llmprobe.hooks.transformers_cache import measure_groups
from llmprobe.hooks.transformers_generation import Generation
from llmprobe.hooks.transformers_model import (
    ModelDescription,
    describe,
    flags,
    model_name,
    parameter_bytes,
    program_facts,
)
from llmprobe.record.clock import StepClock
from llmprobe.record.clocks import no_clock, step_clock
from llmprobe.record.recorder import Recorder
from llmprobe.settings import logger

_now = time.monotonic_ns
#: How often it is looked, at most, whether the weights are still those that the facts tell of; and for no
#: more than a thousandth of the time: a look takes some 5 us a parameter, and experts are thousands.
_LOOK_EVERY_NS = 2_000_000_000
_LOOK_SHARE = 1000

FULL_ONLY: tuple[tuple[str, int | None], ...] = (("full", None),)


class Program:
    """State beside one recorder, whose facts describe one model."""

    def __init__(
        self,
        probe: Probe,
        recorder: Recorder,
        clock: StepClock,
        model: Any,
        description: ModelDescription | None,
    ) -> None:
        self.recorder = recorder
        self.clock = clock
        #: Whose streams the clock stamps.
        self.device = model.device
        #: `Probe.generation` of the last step.
        self.generation = probe.generation
        self.running: dict[int, Generation] = {}
        #: Steps finished on the host and not yet written, and when some were last.
        self.unwritten = 0
        self.written_at = 0
        # Held for dictionary accesses and journal writes when a call begins or ends, never in a step.
        # Reentrant, because a signal handler may itself call generate.
        self.lock = threading.RLock()
        # Held while steps are written; the step path only tries it.
        self.writing = threading.RLock()
        self._probe = probe
        self._model = weakref.ref(model)
        self._name = model_name(model)
        self._description = description
        self._measured = False
        self._described_bytes = self._parameter_bytes(model)
        self._dtype = model.dtype
        self._look_again_ns = _now() + _LOOK_EVERY_NS

    @classmethod
    def make(cls, probe: Probe, model: Any) -> Program | None:
        """Arm this process for its first call; None if no journal can be made, or its steps not be timed."""
        clock = step_clock(model.device)
        if clock is None:
            _say_once(no_clock(model.device))
            return None
        # A model of an unknown shape must not keep the rest from being recorded.
        description = probe.guard.call("transformers.describe", describe, model)

        def facts() -> dict[str, Any]:
            said = program_facts(probe.settings, program_name(probe.settings), model, clock.name)
            return {**said, "model": description.facts if description is not None else None}

        recorder = probe.arm("program", facts)
        return cls(probe, recorder, clock, model, description) if recorder is not None else None

    def groups_of(self, model: Any) -> tuple[tuple[str, int | None], ...]:
        """(kind, window) of the KV groups of ``model``, in the order of a step record's columns."""
        if self._description is not None and self._model() is model:
            return self._description.groups
        return FULL_ONLY

    def adopt(self, model: Any, draft: bool) -> bool:
        """Whether a call of ``model`` can be followed; corrects the facts where they describe another model.

        One model after another is followed, each described in its time. Once two live side by side, the
        traffic of a step is not known and the facts drop the model; draft models have a phase of their own.
        """
        device, same = model.device, self._model() is model
        if device == self.device and (draft or (same and model.dtype == self._dtype)):
            return True
        with self.lock:
            alone = not self.running and (same or self._model() is None)
            if alone and not draft:
                return self._describe_anew(model)
            if same and device == self.device:
                return True
            if device != self.device:
                self.note(f"a model on {device} is not followed beside the one on {self.device}")
                return False
            if self._description is not None:
                self._description = None
                self.recorder.update_facts(model=None)
                self.note(
                    f"several models ({self._name}, {model_name(model)}): their traffic is not modelled"
                )
        return True

    def _describe_anew(self, model: Any) -> bool:
        if model.device != self.device:
            clock = step_clock(model.device)
            if clock is None:
                self.note(no_clock(model.device))
                return False
            self.device, self.clock = model.device, clock
        self._description = self._probe.guard.call("transformers.describe", describe, model)
        self._model, self._name, self._measured = weakref.ref(model), model_name(model), False
        self._described_bytes = self._parameter_bytes(model)
        self._dtype, self._look_again_ns = model.dtype, _now() + _LOOK_EVERY_NS
        self.recorder.update_facts(
            model=self._description.facts if self._description is not None else None,
            model_name=self._name,
            flags=flags(model),
            device=device_facts(model.device),
            clock=self.clock.name,
        )
        return True

    def look(self, model: Any) -> None:
        """See now and then, once a call of ``model`` is over, whether its weights are still as described.

        Programs quantise, resize, and load adapters between two calls.
        """
        now = _now()
        if now < self._look_again_ns or self._model() is not model:
            return
        found = self._parameter_bytes(model)
        self._look_again_ns = now + max(_LOOK_EVERY_NS, _LOOK_SHARE * (_now() - now))
        if found != self._described_bytes:
            with self.lock:
                if not self.running:
                    self._describe_anew(model)

    def _parameter_bytes(self, model: Any) -> int | None:
        found: int | None = self._probe.guard.call("transformers.describe", parameter_bytes, model)
        return found

    def measured(self, call: Generation, cache: Any, rows: int) -> None:
        """Correct the facts, once a model, by what its ``cache`` and weights really are after a forward."""
        if self._measured or self._description is None or self._model() is not call.model:
            return
        self._measured = True
        # compressed-tensors unpacks all weights in the first forward, for good.
        found = self._parameter_bytes(call.model)
        unpacked = found != self._described_bytes
        if unpacked:
            self._described_bytes = found
            self._description = self._probe.guard.call("transformers.describe", describe, call.model)
            if self._description is None:
                self.recorder.update_facts(model=None)
                return
        facts = measure_groups(self._description, cache, rows)
        if facts is not None or unpacked:
            self.recorder.update_facts(model=self._description.facts)

    def kv_bytes(self) -> int:
        """Resident bytes of the caches of all running calls."""
        return sum(running.kv_bytes for running in list(self.running.values()))

    def note(self, text: str) -> None:
        """Add a note to the journal's facts, once."""
        notes = self.recorder.facts.get("notes", [])
        if text not in notes:
            self.recorder.update_facts(notes=[*notes, text])


@functools.cache
def _say_once(text: str) -> None:
    logger().warning("%s", text)
