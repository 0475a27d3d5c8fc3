"""``with llmprobe.measure() as m:`` for notebooks and scripts: what happened inside the block."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmprobe.hooks import session
from llmprobe.hooks.naming import GROUP_VARIABLE

if TYPE_CHECKING:
    from llmprobe.collect.collector import Collector
    from llmprobe.export.run_seen import RunLooks

_POLL_SECONDS = 0.5


class Measurement:
    """The figures of one ``with`` block, there once it has ended. Prints and displays as a summary."""

    def __init__(self) -> None:
        #: The report as in ``run.json`` (see docs/operating.md); empty while the block runs.
        self.report: dict[str, Any] = {}

    def __str__(self) -> str:
        if not self.report:
            return "llmprobe: still measuring; the figures are there after the with block"
        from llmprobe.export.report import text

        return text(self.report)

    __repr__ = __str__


@contextlib.contextmanager
def measure() -> Iterator[Measurement]:
    """Measure every ``generate`` and every vLLM engine of this process and its children in a block.

    Switches the probe on if it is not, and off again at the end in that case::

        with llmprobe.measure() as m:
            model.generate(**inputs, max_new_tokens=100)
        print(m)
    """
    from llmprobe.export.report import report
    from llmprobe.export.run_seen import RunLooks

    was_on = (probe := session.current()) is not None and probe.enabled
    probe = session.enable()
    measurement = Measurement()
    collector = _collector(probe)
    collector.tick(final=True)
    before = collector.views()
    looks = RunLooks(before)
    poll = _Poll(collector, looks)
    poll.start()
    try:
        yield measurement
    finally:
        poll.stop()
        for write in probe.writers:
            probe.guard.call("measure", write)
        with contextlib.suppress(OSError):  # the probe was switched off inside: the last reading stands
            collector.tick(final=True)
        measurement.report = report(collector.views(), before, looks)
        collector.close()
        if not was_on:
            session.disable()


def _collector(probe: Any) -> Collector:
    from llmprobe.collect.collector import Collector
    from llmprobe.collect.peaks import attainable_for, peaks_for
    from llmprobe.collect.thresholds import load_thresholds

    thresholds, problem = load_thresholds(probe.settings.thresholds)

    def own() -> dict[Any, Any]:
        return {recorder.writer.path: recorder.writer for recorder in probe.recorders()}

    return Collector(
        probe.settings.directory,
        peaks=peaks_for,
        attainable=attainable_for,
        thresholds=thresholds,
        notes=[problem] if problem else (),
        only_group=os.environ.get(GROUP_VARIABLE, ""),
        own_writers=own,
        keep_dead=True,
    )


class _Poll(threading.Thread):
    """Reads the journals while the block runs, so that a long one does not outrun their rings."""

    def __init__(self, collector: Collector, looks: RunLooks) -> None:
        super().__init__(name="llmprobe-measure", daemon=True)
        self._collector, self._looks = collector, looks
        self._ended = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # the probe was switched off inside: nothing more is to be read
            while not self._ended.wait(_POLL_SECONDS):
                self._collector.tick()
                self._looks.look(self._collector.views())

    def stop(self) -> None:
        """End, and wait for the tick under way."""
        self._ended.set()
        self.join()
