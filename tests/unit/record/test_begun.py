"""Numbers of steps where some number them themselves and others do not."""

from __future__ import annotations

from llmprobe.record.begun import Begun, LatestStep


class Numbering:
    """An engine that numbers its steps itself."""

    alone = False

    def __init__(self) -> None:
        self.step = LatestStep(0, 0, 0, 0)

    def latest(self) -> LatestStep:
        return self.step


def test_who_does_not_number_steps_gets_one_after_another() -> None:
    begun = Begun()
    assert begun.latest == LatestStep(0, 0, 0, 0)
    assert [begun.begin(1, 7, time_ns) for time_ns in (100, 200)] == [1, 2]
    assert begun.latest == LatestStep(2, 200, 1, 7)
    assert begun.latest.tokens == 7


def test_numbers_go_on_behind_those_of_an_engine_also_once_it_has_left() -> None:
    begun, engine = Begun(), Numbering()
    begun.begin(1, 1, 100)
    begun.join(engine)
    assert engine.alone
    engine.step = LatestStep(5, 500, 2, 3)
    assert begun.begin(1, 1, 600) == 6
    engine.step = LatestStep(9, 900, 2, 3)
    begun.leave(engine)
    assert begun.latest == LatestStep(9, 900, 2, 3)
    assert begun.begin(1, 1, 1000) == 10
    assert begun.latest == LatestStep(10, 1000, 1, 1)


def test_the_latest_is_a_step_whoever_began_it() -> None:
    begun, engine = Begun(), Numbering()
    begun.join(engine)
    assert isinstance(begun.latest, LatestStep)
    begun.leave(engine)
    begun.begin(1, 2, 3)
    assert isinstance(begun.latest, LatestStep)
