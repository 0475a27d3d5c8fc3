"""How long scenarios on a GPU take, and whether there is time for another one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from support.gpu_scenario_list import SCENARIOS, Scenario

#: A start of vLLM on an H100 took 60 to 140 s; requests of every shape that go before the first scenario.
START_SECONDS = (60.0, 140.0)
WARM_SECONDS = 20.0
#: Of a scenario besides its load: what comes before, and sums; and a recording of nsys.
_AROUND_SECONDS, _NSYS_SECONDS = 3.0, 8.0
#: That the load before a change of load runs.
BEFORE_SECONDS = 20.0


def needed(scenario: Scenario, seconds: float, nsys: bool = False) -> float:
    """Seconds of one scenario."""
    before = BEFORE_SECONDS if scenario.before else 0.0
    around = _AROUND_SECONDS + (_NSYS_SECONDS if nsys else 0.0)
    return max(seconds, scenario.least_seconds) + before + around


class Deadline:
    """Minutes from now, in which as much as fits is begun.

    ``start_seconds`` is what a server's start is taken to need.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = time.monotonic() + (float("inf") if minutes is None else 60 * minutes)
        self.start_seconds = START_SECONDS[1] + WARM_SECONDS

    def reaches(self, seconds: float) -> bool:
        """Whether what takes so long would be over in time."""
        return time.monotonic() + seconds <= self._end

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around a start that is as slow as the next ones will be at most."""
        begin = time.monotonic()
        yield
        self.start_seconds = max(self.start_seconds, time.monotonic() - begin)


def listing(seconds: float) -> str:
    """Servers with their scenarios, and what they take."""
    lines = []
    for kind in dict.fromkeys(item.kind for item in SCENARIOS):
        mine = [item for item in SCENARIOS if item.kind == kind]
        total = sum(needed(item, seconds) for item in mine) + WARM_SECONDS
        least, most = (round((total + start) / 60, 1) for start in START_SECONDS)
        lines.append(f"--server {kind}: {least} to {most} min with --seconds {seconds:g}")
        lines += [f"  {needed(item, seconds):4.0f} s  {item.name}" for item in mine]
    return "\n".join(lines)
