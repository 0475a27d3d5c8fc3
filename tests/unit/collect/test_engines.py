"""Data-parallel engines: each waits for its own requests, unless they all work in step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmprobe.collect.collector import Collector
from llmprobe.collect.views import ServerView
from llmprobe.record.layout import Phase

from .pretended import PEAKS, SECOND, Clock, Server

MS = 1_000_000


class Engines:
    """A server of two engines, of which only the first has requests for most of the time."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.clock = clock
        self.engines = [Server(directory, engine=engine) for engine in range(2)]
        recorders = [found for made in self.engines for found in (made.worker, *made.fronts)]
        self._recorders = recorders
        self._found = Collector(
            directory,
            clock=clock,
            peaks=lambda facts: PEAKS,
            own_writers=lambda: {recorder.writer.path: recorder.writer for recorder in recorders},
        )

    def pending(self, engine: int, unfinished: int) -> None:
        self.engines[engine].fronts[0].pending(self.clock.now, unfinished)

    def second(self, *steps: int, phase: Phase = Phase.DECODE) -> None:
        """So many steps of 19 ms of each engine, 20 ms apart, then nothing."""
        for made, count, of in zip(self.engines, steps, (Phase.DECODE, phase), strict=True):
            for number in range(count):
                begin = self.clock.now + number * 20 * MS
                made.step(begin + MS, begin + 20 * MS, of)
        self.clock.now += SECOND
        for recorder in self._recorders:
            recorder.publish()
        self._found.tick()

    def view(self) -> ServerView:
        self._found.tick(final=True)
        (view,) = self._found.views()
        return view

    def close(self) -> None:
        self._found.close()
        for made in self.engines:
            made.close()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], Engines]]:
    made: list[Engines] = []

    def engines() -> Engines:
        made.append(Engines(tmp_path, clock))
        return made[-1]

    yield engines
    for one in made:
        one.close()


def test_an_engine_without_a_request_has_nothing_to_do_while_another_works(
    make: Callable[[], Engines],
) -> None:
    engines = make()
    engines.pending(0, 1)
    for _ in range(20):
        engines.pending(1, 1)
        begun = engines.clock.now
        engines.engines[1].fronts[0].pending(begun + 200 * MS, 0)
        engines.second(50, 10)
    view = engines.view()
    times = view.ranks[1].device_time
    assert times["decode"]["host_gap"] == pytest.approx(199 * 0.001)  # time begins with the first step
    assert times["none"]["no_work"] == pytest.approx(20 * 0.8, abs=1)
    gap = view.ranks[1].figures["decode"].sync_gap_ratio
    assert gap is not None and gap < 0.1


def test_an_engine_without_a_request_is_not_stalled_while_another_works(make: Callable[[], Engines]) -> None:
    engines = make()
    engines.pending(0, 1)
    engines.pending(1, 1)
    engines.second(50, 50)
    engines.pending(1, 0)
    for _ in range(60):
        engines.second(50, 0)
    view = engines.view()
    assert [rank.stall for rank in view.ranks] == [None, None]
    assert not view.headline.startswith("STALLED")


def test_a_stall_names_its_engine(make: Callable[[], Engines]) -> None:
    engines = make()
    engines.pending(0, 1)
    engines.pending(1, 1)
    engines.second(50, 50)
    for _ in range(60):
        engines.second(50, 0)
    view = engines.view()
    assert view.headline.startswith("STALLED: engine 1, rank 0 has been without a step since step 50")


def test_engines_that_work_in_step_all_wait_while_one_has_requests(make: Callable[[], Engines]) -> None:
    """Those of a mixture of experts: a dummy step that does not come holds up every engine."""
    engines = make()
    engines.pending(0, 1)
    for _ in range(3):
        engines.second(50, 50, phase=Phase.DUMMY)
    times = engines.view().ranks[1].device_time
    assert times["dummy"]["host_gap"] == pytest.approx(149 * 0.001)
    assert times.get("none", {}).get("no_work", 0.0) == 0.0
    for _ in range(60):
        engines.second(0, 0)
    assert {rank.engine for rank in engines.view().ranks if rank.stall is not None} == {0, 1}
