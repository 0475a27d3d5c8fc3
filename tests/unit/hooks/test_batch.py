from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmprobe.hooks.attention import visible_attention
from llmprobe.hooks.vllm.batch import BatchReader
from llmprobe.record.layout import Phase

from .scheduled import New, Scheduled, cached, new, noted


def read(reader: BatchReader, scheduled: Scheduled) -> Any:
    batch = reader.read(noted(scheduled))
    assert batch is not None
    return batch


def test_a_lone_prompt_is_prefill_and_samples_once() -> None:
    batch = read(BatchReader(), new("a", 10))
    assert batch.phase == Phase.PREFILL
    assert batch.counts == (1, 1, 10, 0, 0, 1)
    assert batch.attention[0] == 10  # context
    assert batch.attention[8] == 55  # pairs 1 + 2 + … + 10


def test_decodes_see_their_whole_context_once_each() -> None:
    reader = BatchReader()
    reader.read(noted(new("a", 10)))
    reader.read(noted(new("b", 20)))
    batch = read(reader, cached(a=(10, 1), b=(20, 1)))
    assert batch.phase == Phase.DECODE
    assert batch.counts == (2, 0, 0, 2, 0, 2)
    assert batch.attention[4] == batch.attention[12] == 11 + 21


def test_a_prompt_among_decodes_is_mixed_and_both_are_told_apart() -> None:
    reader = BatchReader()
    reader.read(noted(new("a", 10)))
    step = cached(a=(10, 1))
    step.scheduled_new_reqs = [New("b", [1] * 4)]
    step.num_scheduled_tokens["b"] = 4
    batch = read(reader, step)
    assert batch.phase == Phase.MIXED
    assert batch.counts == (2, 1, 4, 1, 0, 2)
    assert (batch.attention[0], batch.attention[4]) == (4, 11)
    assert (batch.attention[8], batch.attention[12]) == (10, 11)


def test_chunks_are_prefill_until_the_last_and_only_the_last_samples() -> None:
    reader = BatchReader()
    first = read(reader, new("a", 10, scheduled=4))
    second = read(reader, cached(a=(4, 4)))
    third = read(reader, cached(a=(8, 2)))
    assert [batch.phase for batch in (first, second, third)] == [Phase.PREFILL] * 3
    assert [batch.counts[5] for batch in (first, second, third)] == [0, 0, 1]
    assert first.attention[8] + second.attention[8] + third.attention[8] == 55
    assert read(reader, cached(a=(10, 1))).phase == Phase.DECODE


def test_a_last_chunk_of_one_token_is_still_prefill() -> None:
    reader = BatchReader()
    reader.read(noted(new("a", 5, scheduled=4)))
    batch = read(reader, cached(a=(4, 1)))
    assert batch.phase == Phase.PREFILL
    assert batch.counts == (1, 1, 1, 0, 0, 1)


def test_a_prefix_cache_hit_computes_only_the_rest_but_reads_all_keys() -> None:
    batch = read(BatchReader(), new("a", 10, computed=8))
    assert batch.phase == Phase.PREFILL
    assert batch.counts[2] == 2
    assert batch.attention[0] == 10
    assert batch.attention[8] == 9 + 10


def test_a_resumed_request_is_prefill_again_in_either_runner() -> None:
    v1 = BatchReader()
    v1.read(noted(new("a", 10)))
    v1.read(noted(cached(a=(10, 1))))
    step = cached(a=(0, 12))
    step.scheduled_cached_reqs.resumed_req_ids = {"a"}
    step.scheduled_cached_reqs.num_output_tokens = [2]
    assert read(v1, step).phase == Phase.PREFILL
    assert read(v1, cached(a=(12, 1))).phase == Phase.DECODE

    v2 = BatchReader()
    v2.read(noted(new("a", 10)))
    v2.read(noted(cached(a=(10, 1))))
    again = Scheduled({"a": 12}, [New("a", [1] * 10, 0, prefill_token_ids=[1] * 12)])
    assert read(v2, again).phase == Phase.PREFILL
    assert read(v2, cached(a=(12, 1))).phase == Phase.DECODE


def test_drafts_are_decode_however_many_tokens_are_scheduled() -> None:
    reader = BatchReader()
    reader.read(noted(new("a", 10)))
    step = cached(a=(10, 4))
    step.scheduled_spec_decode_tokens = {"a": [7, 8, 9]}
    batch = read(reader, step)
    assert batch.phase == Phase.DECODE
    assert batch.counts == (1, 0, 0, 4, 3, 4)


def test_a_flush_is_no_step_and_finished_requests_are_forgotten() -> None:
    reader = BatchReader()
    reader.read(noted(new("a", 10, scheduled=4)))
    assert reader.read(noted(Scheduled({}, finished_req_ids={"a"}))) is None
    assert not reader._prefilling
    assert not reader._prompt


def test_requests_that_came_while_switched_off_are_judged_by_what_is_scheduled() -> None:
    reader = BatchReader()
    assert read(reader, cached(a=(100, 1))).phase == Phase.DECODE
    assert read(reader, cached(b=(100, 50))).phase == Phase.PREFILL


def one_by_one(
    windows: list[int | None], rows: list[tuple[int, int, int, bool]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Counts and attention of (before, query, drafted, prefilling) rows, the plain way."""
    groups = 4
    context, pairs = ([0] * groups, [0] * groups), ([0] * groups, [0] * groups)
    tokens = [0, 0]
    for before, query, _, prefilling in rows:
        tokens[not prefilling] += query
        for group, window in enumerate(windows):
            visible, seen = visible_attention(before, query, window)
            context[not prefilling][group] += visible
            pairs[not prefilling][group] += seen
    drafted = sum(row[2] for row in rows)
    prompts = sum(row[3] for row in rows)
    counts = (len(rows), prompts, tokens[0], tokens[1], drafted, len(rows) + drafted)
    return counts, (*context[0], *context[1], *pairs[0], *pairs[1])


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 3)), max_size=20),
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60)), max_size=12),
    st.lists(st.none() | st.integers(1, 300), min_size=1, max_size=4),
    st.booleans(),
)
def test_however_a_batch_is_counted_the_sums_are_those_of_its_requests(
    decodes: list[tuple[int, int]], prompts: list[tuple[int, int]], windows: list[int | None], drafting: bool
) -> None:
    if not decodes and not prompts:
        return
    reader = BatchReader(tuple(windows))
    decodes = [(before, drafted if drafting else 0) for before, drafted in decodes]
    for number, (before, query) in enumerate(prompts):  # prompts of which a first chunk is computed already
        if before:
            reader.read(noted(new(f"p{number}", before + query, scheduled=before)))
    step = cached(
        **{f"d{n}": (before, 1 + drafted) for n, (before, drafted) in enumerate(decodes)},
        **{f"p{n}": (before, query) for n, (before, query) in enumerate(prompts) if before},
    )
    step.scheduled_spec_decode_tokens = {
        f"d{n}": [7] * drafted for n, (_, drafted) in enumerate(decodes) if drafted
    }
    for number, (before, query) in enumerate(prompts):
        if not before:
            step.scheduled_new_reqs.append(New(f"p{number}", [1] * query))
            step.num_scheduled_tokens[f"p{number}"] = query
    rows = [(before, 1 + drafted, drafted, False) for before, drafted in decodes]
    rows += [(before, query, 0, True) for before, query in prompts]
    batch = read(reader, step)
    assert (batch.counts, batch.attention) == one_by_one(windows, rows)
    assert not reader._prefilling
