"""The steps that are kept: whatever is added, their windows say what summing single steps would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.collect.kept import KeptSteps
from llmprobe.compute.sums import COLUMNS, INDEX, prefill_share


def rows(ends: list[int]) -> np.ndarray:
    """Steps with these ends, all columns different, some 0."""
    base = np.array(ends, dtype=float).reshape(-1, 1)
    made = base * 1e-3 * np.arange(1, len(COLUMNS) + 1)
    made[:, INDEX["host_gap"]] = base[:, 0] % 3 == 0
    made[:, INDEX["launch_gap"]] = 0
    made[:, INDEX["prompt_tokens"]] = base[:, 0] % 5
    made[:, INDEX["decode_tokens"]] = base[:, 0] % 7
    return made


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 50)), min_size=1, max_size=20),
    st.integers(1, 2000),
    st.integers(0, 500),
)
def test_a_window_is_the_sum_of_every_step_that_ended_in_it(
    batches: list[tuple[int, int]], keep: int, window: int
) -> None:
    kept, ends, now = KeptSteps(shared=True), [], 0
    for count, pace in batches:
        new = [now + pace * (number + 1) for number in range(count)]
        kept.add(np.array(new, dtype=np.int64), rows(new))
        ends += new
        now = ends[-1] if ends else 0
        kept.forget_before(now - keep)
        ends = [end for end in ends if end > now - keep]
        chosen = [end for end in ends if end > now - window]
        expected, seen = rows(chosen), kept.between(now - window, now)
        tokens = expected[:, INDEX["prompt_tokens"]] + expected[:, INDEX["decode_tokens"]]
        assert kept.tokens(now - window, now).tolist() == tokens.tolist()
        if not chosen:
            assert seen is None
            continue
        assert seen is not None
        assert seen.spans.tolist() == expected[:, INDEX["span"]].tolist()
        assert seen.rows() == pytest.approx(expected, rel=1e-9, abs=1e-6)
        assert seen.sums == pytest.approx(expected.sum(axis=0), rel=1e-9, abs=1e-6)
        assert seen.prefill == pytest.approx(prefill_share(expected) @ expected, rel=1e-9, abs=1e-6)
        assert seen.sums[INDEX["launch_gap"]] == 0


def test_a_window_without_a_share_that_it_need_not_know() -> None:
    kept = KeptSteps()
    kept.add(np.array([1, 2]), rows([1, 2]))
    seen = kept.between(0, 2)
    assert seen is not None
    assert not seen.prefill.any()


def test_what_is_0_in_a_window_is_exactly_0_whatever_came_before() -> None:
    kept = KeptSteps()
    before, after = rows([1, 2, 3]), rows([4, 5])
    before[:, INDEX["transfer"]] = 0.1
    after[:, INDEX["transfer"]] = 0
    kept.add(np.array([1, 2, 3]), before)
    kept.add(np.array([4, 5]), after)
    seen = kept.between(3, 5)
    assert seen is not None
    assert seen.sums[INDEX["transfer"]] == 0
