"""CPU time of front ends and engine cores: sums that never fall while the server lives."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from llmprobe.collect.host_cpu import ENGINE_CORE, FRONT_END, HostCpu, Used

_ONE = st.dictionaries(
    st.integers(0, 99).map(str),
    st.builds(Used, st.just(FRONT_END), st.floats(0, 1e6)),
    max_size=40,
)


@given(st.lists(_ONE, max_size=12))
def test_the_sum_never_falls_whatever_ends_and_however_often_the_agent_starts_anew(looks: list) -> None:  # type: ignore[type-arg]
    cpu, before = HostCpu(), 0.0
    for used in looks:
        total = cpu.update("a", used, ()).get(FRONT_END, 0.0)
        assert total >= before - 1e-6
        assert total >= sum(of.seconds for of in used.values()) - 1e-6
        before = total
        saved = json.loads(json.dumps(cpu.save()))
        cpu = HostCpu()
        cpu.restore(saved)


def test_what_a_front_end_used_that_ended_stays_and_nothing_counts_twice() -> None:
    cpu = HostCpu()
    both = {"1-10": Used(FRONT_END, 5.0), "2-10": Used(ENGINE_CORE, 7.0)}
    assert cpu.update("a", both, ()) == {FRONT_END: 5.0, ENGINE_CORE: 7.0}
    # Another process, with a number that was used before.
    assert cpu.update("a", {"1-20": Used(FRONT_END, 1.0)}, ()) == {FRONT_END: 6.0, ENGINE_CORE: 7.0}
    assert cpu.update("a", {"1-20": Used(FRONT_END, 2.0)}, ()) == {FRONT_END: 7.0, ENGINE_CORE: 7.0}
    assert cpu.update("b", {}, ()) == {}


def test_more_processes_than_are_kept_apart_count_once_while_they_live() -> None:
    """``--api-server-count 40``; and when 20 of them ended, 20 others began."""
    cpu = HostCpu()
    front_ends = {f"{number}-10": Used(FRONT_END, 1.0) for number in range(40)}
    for seconds in (1.0, 1.0, 2.0):
        used = {process: Used(FRONT_END, seconds) for process in front_ends}
        assert cpu.update("a", used, ()) == {FRONT_END: 40 * seconds}
    others = {f"{number}-20": Used(FRONT_END, 3.0) for number in range(20)}
    living = {**{process: Used(FRONT_END, 2.0) for process in list(used)[20:]}, **others}
    for _ in range(3):
        assert cpu.update("a", living, ()) == {FRONT_END: 40 * 2.0 + 20 * 3.0}
        assert len(cpu.save()["used"]["a"]) == 40


def test_a_process_that_turns_out_to_be_a_ranks_too_is_told_there() -> None:
    """`vllm.LLM` with all in one process: the front end records before the worker does."""
    cpu = HostCpu()
    assert cpu.update("a", {"1-10": Used(FRONT_END, 5.0)}, ()) == {FRONT_END: 5.0}
    assert cpu.update("a", {}, {"1-10"}) == {}


def test_views_that_are_gone_are_forgotten() -> None:
    cpu = HostCpu()
    cpu.update("a", {"1-10": Used(FRONT_END, 5.0)}, ())
    cpu.keep({"b"})
    assert cpu.save() == {"used": {}, "ended": {}}
