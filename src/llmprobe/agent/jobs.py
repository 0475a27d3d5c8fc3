"""What the agent does again and again, on one thread, whatever fails in it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("llmprobe.agent")


@dataclass
class _Job:
    name: str
    period: float
    run: Callable[[], object]
    due: float


class Jobs:
    """Periodic jobs. An error is logged once a kind, counted, and ends nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: list[_Job] = []
        self._said: set[tuple[str, type[BaseException], str]] = set()
        self.errors: Counter[str] = Counter()
        #: When the job of each name last ended well.
        self.succeeded: dict[str, float] = {}

    def add(self, name: str, period_seconds: float, run: Callable[[], object]) -> None:
        """Run ``run`` now and every ``period_seconds``. Jobs that are due together run in this order."""
        self._jobs.append(_Job(name, period_seconds, run, self._clock()))

    def run_due(self) -> float:
        """Run what is due; returns seconds until the next job is."""
        for job in self._jobs:
            if self._clock() < job.due:
                continue
            self.attempt(job.name, job.run)
            # A job that takes longer than its period drops turns instead of never pausing.
            job.due = max(job.due + job.period, self._clock() + job.period / 2)
        return max(min((job.due for job in self._jobs), default=1.0) - self._clock(), 0.0)

    def attempt(self, name: str, run: Callable[[], object]) -> None:
        """Run something once, under the same protection."""
        try:
            run()
        except Exception as error:  # an agent that died would help nobody
            self.errors[name] += 1
            kind = (name, type(error), _place(error))
            if kind not in self._said:
                self._said.add(kind)
                log.exception("%s failed; tried again, and not said again", name)
        else:
            self.succeeded[name] = self._clock()

    def since_success(self, name: str) -> float | None:
        """Seconds since a job last ended well; None if it never did."""
        last = self.succeeded.get(name)
        return None if last is None else self._clock() - last

    def run_until(self, stop: threading.Event) -> None:
        """Run jobs until ``stop`` is set."""
        while not stop.wait(self.run_due()):
            pass


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
