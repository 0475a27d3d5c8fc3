"""A server's verdict is what most of its ranks' time says: the class, then its cause, then who is surest."""

from __future__ import annotations

import pytest

from llmprobe.compute.servers import combine

from .verdicts import verdict

COMMUNICATION = verdict("sync_bound", "communication", confidence=0.7)
HOST = verdict("sync_bound", "host_between_steps", confidence=0.8)


def test_one_surer_rank_does_not_name_the_cause_for_all_others() -> None:
    found = combine([(9.0, COMMUNICATION)] * 7 + [(9.0, HOST)])
    assert (found.bottleneck, found.cause) == ("sync_bound", "communication")
    assert found.confidence == pytest.approx(0.7 * 7 / 8)
    assert found.reason.endswith(
        "; 88% of the ranks' time agrees, the rest is sync_bound (host_between_steps)"
    )


def test_causes_count_by_time_and_not_by_ranks() -> None:
    assert combine([(1.0, COMMUNICATION)] * 3 + [(9.0, HOST)]).cause == "host_between_steps"


def test_the_cause_is_that_of_the_class_that_leads() -> None:
    """Ranks that cannot tell are more than any one cause, and fewer than those that wait."""
    unknown = verdict("unknown", "no_model", confidence=0.0)
    found = combine([(5.0, unknown), (3.0, COMMUNICATION), (4.0, HOST)])
    assert (found.bottleneck, found.cause) == ("sync_bound", "host_between_steps")
    assert found.confidence == pytest.approx(0.8 * 4 / 12)
    assert found.reason.endswith("the rest is sync_bound (communication), unknown (no_model)")


def test_the_surest_of_those_that_agree_speaks() -> None:
    sure = verdict("sync_bound", "communication", confidence=0.9, reason="sure")
    assert combine([(9.0, COMMUNICATION), (1.0, sure)]) == sure
