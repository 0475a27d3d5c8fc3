"""The formula of confidence, and one verdict from several ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.compute.classify import classify
from llmprobe.compute.confidence import WEIGHTS, Vote, confidence, margin
from llmprobe.compute.servers import combine
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import Observation

from .verdicts import figures, kernels, seen, verdict

votes = st.lists(st.builds(Vote, st.sampled_from(list(WEIGHTS)), st.booleans(), st.floats(0, 1)), max_size=5)


def test_one_witness_alone_gives_its_weight() -> None:
    assert confidence([Vote("model of the work", True)], 1.0) == pytest.approx(WEIGHTS["model of the work"])


def test_two_witnesses_leave_what_neither_settles() -> None:
    both = [Vote("model of the work", True), Vote("kernel windows", True)]
    left = (1 - WEIGHTS["model of the work"]) * (1 - WEIGHTS["kernel windows"])
    assert confidence(both, 1.0) == pytest.approx(1 - left)


def test_margin_is_nothing_at_the_threshold_and_full_half_of_it_away() -> None:
    assert margin(0.5, 0.5) == 0
    assert margin(0.75, 0.5) == margin(0.25, 0.5, below=True) == margin(5, 0.5) == 1
    assert margin(0.6, 0.5) == margin(0.4, 0.5, below=True) == pytest.approx(0.4)
    assert margin(0.4, 0.5) == margin(0.6, 0.5, below=True) == 0


def _memory(mbu: float) -> Observation:
    return seen(figures(mbu=mbu), kernels=kernels())


@pytest.mark.parametrize(
    ("standing", "window", "worst", "best"),
    [
        ("memory_bound", _memory, 0.451, 0.9),
        ("compute_bound", lambda mfu: seen(figures(mbu=0.1, mfu=mfu), kernels=kernels()), 0.361, 0.9),
        ("inefficient_kernels", _memory, 0.54, 0.1),
        ("sync_bound", lambda gap: seen(figures(span=10 * (1 - gap), gap=10 * gap)), 0.181, 0.9),
    ],
)
def test_a_class_is_no_surer_where_only_hysteresis_holds_it(
    standing: str, window: Callable[[float], Observation], worst: float, best: float
) -> None:
    values = [worst + (best - worst) * part / 50 for part in range(51)]
    found = [classify(window(value), Thresholds(), standing) for value in values]
    assert {each.bottleneck for each in found} == {standing}
    sure = [each.confidence for each in found]
    assert sure == sorted(sure)


@settings(deadline=None)
@given(votes, st.floats(0, 1))
def test_it_is_a_ratio_and_none_without_support(cast: list[Vote], far: float) -> None:
    found = confidence(cast, far)
    assert 0 <= found <= 1
    if not any(vote.agrees for vote in cast):
        assert found == 0


@settings(deadline=None)
@given(votes, st.floats(0, 1), st.sampled_from(list(WEIGHTS)))
def test_support_never_lowers_and_objection_never_raises_it(cast: list[Vote], far: float, name) -> None:  # type: ignore[no-untyped-def]
    found = confidence(cast, far)
    assert confidence([*cast, Vote(name, True)], far) >= found - 1e-12
    assert confidence([*cast, Vote(name, False)], far) <= found + 1e-12


def test_ranks_that_agree_keep_the_surest() -> None:
    found = combine(
        [(9.0, verdict("memory_bound", confidence=0.7)), (9.0, verdict("memory_bound", confidence=0.8))]
    )
    assert found.confidence == 0.8


def test_ranks_that_differ_make_the_majority_less_sure_and_say_so() -> None:
    found = combine([(9.0, verdict("memory_bound")), (3.0, verdict("sync_bound", "sampling"))])
    assert found.bottleneck == "memory_bound"
    assert found.confidence == pytest.approx(0.8 * 0.75)
    assert "75% of the ranks' time agrees, the rest is sync_bound" in found.reason


def test_an_idle_rank_has_no_say() -> None:
    assert combine([(0.1, verdict("idle")), (5.0, verdict("memory_bound"))]).confidence == 0.8
    assert combine([(0.1, verdict("idle")), (0.0, verdict("idle"))]).bottleneck == "idle"
