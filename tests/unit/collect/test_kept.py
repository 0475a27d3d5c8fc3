"""The accounts that are kept: whatever is added, they show what a plain array would."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.collect.kept import KeptAccounts
from llmprobe.compute.accounting import StepAccounts


def rows(ends: list[int]) -> StepAccounts:
    """Accounts of steps with these ends; the flops tell them apart."""
    made = StepAccounts.none().take(np.zeros(0, dtype=int))
    columns = {
        name: np.zeros((len(ends), *value.shape[1:]), value.dtype)
        for name, value in vars(made).items()
        if isinstance(value, np.ndarray)
    }
    columns["end_ns"][:] = ends
    columns["flops"][:] = np.array(ends, dtype=float).reshape(-1, 1)
    return StepAccounts(**columns, cursor_ns=None, last_step=None)


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 50)), min_size=1, max_size=20),
    st.integers(1, 2000),
    st.integers(0, 500),
)
def test_a_window_shows_every_step_that_ended_in_it(
    batches: list[tuple[int, int]], keep: int, window: int
) -> None:
    kept, ends, now = KeptAccounts(), [], 0
    for count, pace in batches:
        new = [now + pace * (number + 1) for number in range(count)]
        kept.add(rows(new))
        ends += new
        now = ends[-1] if ends else 0
        kept.forget_before(now - keep)
        ends = [end for end in ends if end > now - keep]
        seen = kept.between(now - window, now)
        expected = [end for end in ends if end > now - window]
        assert seen.end_ns.tolist() == expected
        assert seen.flops[:, 0].tolist() == expected
