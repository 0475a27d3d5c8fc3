"""Verdicts on phases whose steps take longer than the seconds that a verdict is about."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from llmprobe.compute.verdict import Verdict
from llmprobe.record.layout import Phase

from .judged import MS, PEAKS, World
from .pretended import SECOND


class LongSteps(World):
    """Steps that take as long as they please, one after the other; ``decode``: a second of it between."""

    def __init__(self, directory: Path, plan: Iterable[tuple[float, int]], decode: bool = False) -> None:
        """``plan``: seconds and tokens of each step of prefill; of the last one the end never comes."""
        super().__init__(directory)
        self._plan, self._decode = list(plan), decode
        self.server.fronts[0].pending(self.at, 1)
        self._begin()

    def _begin(self) -> None:
        self._seconds, self._tokens = self._plan.pop(0)
        self._number = self.server.worker.begin(Phase.PREFILL, self._tokens, self.at)

    def look(self) -> Verdict | None:
        """What is known of prefill a second later."""
        self.clock.now += SECOND
        while self._plan and (end := self.at + round(self._seconds * SECOND)) <= self.clock.now:
            # 0.7 of the bandwidth, whatever it takes: its bytes are those of what it has read by then.
            context = round(PEAKS.bandwidth_bytes_per_second * 0.7 * self._seconds / 100)
            self.server.worker.step(
                self._number, self.at, Phase.PREFILL, 0, 0, (self.at, end, end, end),
                requests=1, prefill_requests=1, prompt_tokens=self._tokens, decode_tokens=0,
                context_prefill=(context, 0, 0, 0),
            )  # fmt: skip
            self.at = end
            for _ in range(50 * self._decode):
                self.server.step(self.at, self.at + 20 * MS)
                self.at += 20 * MS
            self._begin()
        self.server.worker.publish()
        self.collector.tick()
        (view,) = self.collector.views()
        return view.verdicts.get("prefill")


@pytest.mark.parametrize("seconds", [2.5, 4.0, 7.0, 9.9, 10.1, 15.0, 29.0])
@pytest.mark.parametrize("decode", [False, True])
def test_steps_longer_than_the_window_get_their_class_and_keep_it(
    tmp_path: Path, seconds: float, decode: bool
) -> None:
    world = LongSteps(tmp_path, [(seconds, 10)] * 100, decode)
    seen = [found for _ in range(120) if (found := world.look()) is not None]
    world.server.close()
    settled = 8 + round(2 * seconds)
    assert {found.bottleneck for found in seen[:settled]} <= {"unknown", "memory_bound", "idle"}
    assert {found.bottleneck for found in seen[settled:]} == {"memory_bound"}, [
        (found.bottleneck, found.cause) for found in seen
    ]
    assert {found.reason[:8] for found in seen[settled:]} == {"MBU 0.70"}
    if seconds > 10:
        shares = [found.share_ratio for found in seen[settled:]]
        assert shares == [pytest.approx(seconds / (seconds + decode), rel=0.1)] * len(shares)
        rates = [found.steps_per_second for found in seen[settled:]]
        assert rates == [pytest.approx(1 / (seconds + decode), rel=0.1)] * len(rates)


def test_a_first_step_that_runs_is_no_idleness(tmp_path: Path) -> None:
    """A front end hears of a request that runs with the end of its first step: until then it has none."""
    world = LongSteps(tmp_path, [(1000.0, 10)])
    headlines = []
    for _ in range(12):
        found = world.look()
        (view,) = world.collector.views()
        headlines.append(view.headline)
    world.server.close()
    assert not [said for said in headlines if "IDLE" in said]
    assert found is not None
    assert (found.bottleneck, found.cause) == ("unknown", "step_running")
    assert headlines[-1].endswith("one has been running for 12 s.")


def test_a_step_that_takes_far_longer_than_the_last_is_not_taken_to_be_like_it(tmp_path: Path) -> None:
    world = LongSteps(tmp_path, [(15.0, 10), (15.0, 10), (1000.0, 10)])
    seen = [world.look() for _ in range(30 + 29)]
    assert seen[-1] is not None
    assert seen[-1].bottleneck == "memory_bound"
    seen += [world.look() for _ in range(8)]
    world.server.close()
    assert seen[-1] is not None
    assert (seen[-1].bottleneck, seen[-1].cause) == ("unknown", "step_running")


def test_a_step_may_take_longer_in_proportion_to_its_tokens(tmp_path: Path) -> None:
    """A prompt is cut into chunks, of which the last is a short one."""
    world = LongSteps(tmp_path, [(18.0, 60), (18.0, 60), (6.0, 20)] * 10)
    seen = [found.bottleneck for _ in range(120) if (found := world.look()) is not None]
    world.server.close()
    assert set(seen[-90:]) == {"memory_bound"}


def test_a_window_has_all_of_the_step_that_it_begins_in(tmp_path: Path) -> None:
    """Of a step that ended long ago most lies before the last ten seconds: it does not fill them."""
    world = LongSteps(tmp_path, [(9.6, 10), (1000.0, 10)])
    for _ in range(10):
        world.look()
    world.server.worker.abandon(world.server.worker.begun)
    world.server.fronts[0].pending(world.at, 0)
    for _ in range(7):
        found = world.look()
    world.server.close()
    assert found is not None
    assert found.share_ratio == pytest.approx(9.6 / 17, abs=0.01)
