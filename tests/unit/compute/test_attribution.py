"""The parts of a step's time sum to the step, whatever is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.compute import intervals
from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS, StepAccounts, account
from llmprobe.compute.attribution import PARTS, attribute
from llmprobe.compute.evidence import KernelEvidence
from llmprobe.compute.facts import ModelFacts
from llmprobe.compute.sums import by_phase
from llmprobe.record.layout import Phase

from .builders import PEAKS, SECOND, facts, group, steps
from .verdicts import kernels

MODEL = ModelFacts.from_json(facts(group(bytes_per_token=10, flops_per_pair=50)))
IDLE = [COMPONENTS.index(name) for name in IDLE_COMPONENTS]


def accounts(*rows: dict[str, object], model: ModelFacts | None = MODEL) -> StepAccounts:
    return account(
        steps(*rows),
        cursor_ns=0,
        last_step=0,
        pending=np.array([[0, intervals.OPEN]]),
        model=model,
        peaks=PEAKS,
    )


def decode(begin: float, **changes: object) -> dict[str, object]:
    """A step of 1 s, 0.1 s of it between forward and sampling, for 4 requests with 2 tokens of context."""
    times = tuple(int((begin + at) * SECOND) for at in (0, 0.7, 0.8, 1.0))
    row = {
        "times": times,
        "requests": 4,
        "decode_tokens": 4,
        "sampled": 4,
        "context_decode": [8],
        "pairs_decode": [8],
    }
    return {**row, **changes}


def total(rows: StepAccounts) -> float:
    return float(np.delete(rows.components, IDLE, axis=1).sum())


def test_the_floor_is_told_by_operator_and_roof() -> None:
    (found,) = attribute(by_phase(accounts(decode(0)), PEAKS)).values()
    # 200 bytes of linear weights at 1 kB/s; 40 of the head; 8 + 4 tokens of cache at 10 bytes
    assert found.seconds["memory.linear"] == pytest.approx(0.2)
    assert found.seconds["memory.head"] == pytest.approx(0.04)
    assert found.seconds["memory.attention"] == pytest.approx(0.12)
    assert found.seconds["compute.linear"] == 0
    assert found.seconds["sample"] == pytest.approx(0.1)
    assert found.seconds["remainder"] == pytest.approx(1 - 0.36 - 0.1)
    assert found.total_seconds == pytest.approx(1)


def test_without_kernel_windows_slow_kernels_and_bubbles_stay_together() -> None:
    (found,) = attribute(by_phase(accounts(decode(0)), PEAKS)).values()
    assert found.seconds["inefficiency"] == found.seconds["launch"] == 0
    assert found.kernels_age_seconds is None


def test_kernel_windows_split_the_remainder() -> None:
    (found,) = attribute(by_phase(accounts(decode(0)), PEAKS), {"decode": kernels(0.2, 0.05)}).values()
    assert found.seconds["launch"] == pytest.approx(0.2)
    assert found.seconds["communication"] == pytest.approx(0.05)
    assert found.seconds["inefficiency"] == pytest.approx(1 - 0.36 - 0.1 - 0.25)
    assert found.seconds["remainder"] == pytest.approx(0)
    assert found.kernels_age_seconds == 5.0


def test_bubbles_are_of_the_steps_own_time_where_their_work_is_that_of_the_windows() -> None:
    """Steps of 0.36 s of floor are busy for 0.9 s; in the windows kernels ran for twice the floor."""
    work = {"busy_per_floor": 2.0, "floor_step_seconds": 0.36, "step_tokens": 4.0}
    seconds = {}
    for tokens in (4.0, 40.0):  # as many as here, and in another batch
        seen = kernels(0.1, **{**work, "step_tokens": tokens})
        (found,) = attribute(by_phase(accounts(decode(0), decode(1)), PEAKS), {"decode": seen}).values()
        seconds[tokens] = found.seconds["launch"]
        assert found.total_seconds == pytest.approx(2.0)
    assert seconds == {4.0: pytest.approx(2 * (0.9 - 0.72), rel=0.01), 40.0: pytest.approx(2 * 0.1)}


def test_windows_that_see_more_than_there_is_take_what_there_is() -> None:
    (found,) = attribute(by_phase(accounts(decode(0)), PEAKS), {"decode": kernels(0.9)}).values()
    assert found.seconds["launch"] == pytest.approx(1 - 0.36 - 0.1)
    assert found.seconds["inefficiency"] == found.seconds["remainder"] == pytest.approx(0)


def test_a_gap_before_a_step_is_the_hosts() -> None:
    (found,) = attribute(by_phase(accounts(decode(2)), PEAKS)).values()
    assert found.seconds["host"] == pytest.approx(2)
    assert found.step_seconds["host"] == pytest.approx(2)


def test_a_mixed_step_is_split_by_token_share() -> None:
    mixed = decode(0, phase=Phase.MIXED, prompt_tokens=12, prefill_requests=1)
    found = attribute(by_phase(accounts(mixed), PEAKS))
    assert set(found) == {"prefill", "decode"}
    assert found["prefill"].total_seconds == pytest.approx(0.75)
    assert found["decode"].total_seconds == pytest.approx(0.25)
    assert found["prefill"].steps == pytest.approx(0.75)


def test_without_a_model_all_busy_time_is_remainder() -> None:
    (found,) = attribute(by_phase(accounts(decode(0), model=None), None)).values()
    assert found.seconds["remainder"] == pytest.approx(0.9)


def test_nothing_gives_nothing() -> None:
    assert attribute(by_phase(StepAccounts.none(), PEAKS)) == {}


ratio = st.floats(0, 1)
row = st.fixed_dictionaries(
    {
        "phase": st.sampled_from([Phase.PREFILL, Phase.DECODE, Phase.MIXED, Phase.DRAFT, Phase.DUMMY]),
        "gap": st.integers(0, 3 * SECOND),
        "forward": st.integers(0, 3 * SECOND),
        "sample_gap": st.integers(0, SECOND),
        "sample": st.integers(0, SECOND),
        "prompt_tokens": st.integers(0, 200),
        "decode_tokens": st.integers(0, 50),
    }
)


@settings(deadline=None)
@given(
    st.lists(row, max_size=8),
    st.booleans(),
    st.none()
    | st.dictionaries(st.sampled_from(["prefill", "decode", "mixed"]), st.tuples(ratio, ratio, ratio)),
)
def test_parts_sum_to_the_steps_and_none_is_negative(
    drawn: list[dict[str, int]], with_model: bool, windows: dict[str, tuple[float, float, float]] | None
) -> None:
    rows, at = [], 0
    for one in drawn:
        e0 = at + one["gap"]
        e1 = e0 + one["forward"]
        e2 = e1 + one["sample_gap"]
        at = e2 + one["sample"]
        tokens = one["prompt_tokens"] + one["decode_tokens"]
        rows.append(
            {
                "phase": one["phase"],
                "times": (e0, e1, e2, at),
                "requests": 1,
                "prompt_tokens": one["prompt_tokens"],
                "decode_tokens": one["decode_tokens"],
                "sampled": 1,
                "context_decode": [tokens],
                "pairs_decode": [tokens],
            }
        )
    accounted = accounts(*rows, model=MODEL if with_model else None)
    seen = None
    if windows is not None:
        seen = {
            phase: KernelEvidence(20, launch, communication, transfer, 1.0)
            for phase, (launch, communication, transfer) in windows.items()
        }
    found = attribute(by_phase(accounted, PEAKS), seen)
    assert "mixed" not in found
    for one_phase in found.values():
        assert set(one_phase.seconds) == set(PARTS)
        assert min(one_phase.seconds.values()) >= -1e-9
        assert sum(one_phase.seconds.values()) == pytest.approx(one_phase.total_seconds, abs=1e-9)
    assert sum(one_phase.total_seconds for one_phase in found.values()) == pytest.approx(
        total(accounted), rel=1e-12, abs=1e-9
    )
