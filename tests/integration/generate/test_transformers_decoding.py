"""Every way of decoding: real ``generate`` calls, read back through the journal that they left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmprobe.record.layout import Flag, Phase

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    Recording,
    column,
    endless,
    llama,
    phases,
    prompt,
)
from transformers import (  # noqa: E402
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402

pytestmark = pytest.mark.integration


def test_greedy_search_is_one_prefill_and_a_decode_step_for_each_further_token(recording: Recording) -> None:
    llama().generate(prompt(1, 6), **endless())
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert column(records, "prompt_tokens") == [6, 0, 0, 0, 0]
    assert column(records, "decode_tokens") == [0, 1, 1, 1, 1]
    assert column(records, "new_tokens") == [1] * 5
    assert column(records, "sampled") == [1] * 5
    assert records.steps["context_prefill"][:, 0].tolist() == [6, 0, 0, 0, 0]
    assert records.steps["context_decode"][:, 0].tolist() == [0, 7, 8, 9, 10]
    assert records.steps["pairs_prefill"][:, 0].tolist() == [21, 0, 0, 0, 0]
    assert records.steps["pairs_decode"][:, 0].tolist() == [0, 7, 8, 9, 10]
    assert column(records, "step") == [1, 2, 3, 4, 5]


def test_step_times_are_in_order_and_only_the_first_gap_is_unknown(recording: Recording) -> None:
    llama().generate(prompt(), **endless())
    steps = recording.records().steps
    assert (steps["e0"] < steps["e1"]).all() and (steps["e1"] <= steps["e3"]).all()
    assert (steps["e2"] == steps["e1"]).all() and (steps["flags"] & int(Flag.NO_SAMPLE)).all()
    assert (steps["e3"][:-1] <= steps["e0"][1:]).all()
    assert (steps["time"] <= steps["e0"]).all()
    assert (steps["flags"] & int(Flag.RESTARTED)).astype(bool).tolist() == [True] + [False] * 4
    assert (steps["own_ns"] > 0).all()


def test_a_request_is_counted_with_its_times_and_tokens(recording: Recording) -> None:
    llama().generate(prompt(1, 6), **endless())
    records = recording.records()
    (request,) = records.requests
    assert (request["prompt_tokens"], request["generated_tokens"]) == (6, 5)
    start = records.pending["time"][0]
    assert records.pending["unfinished"].tolist() == [1, 0]
    assert records.steps["e3"][0] <= start + request["ttft"] <= records.steps["e0"][1]
    spent = request["ttft"] + 4 * request["tpot"]
    assert 0 < spent <= request["duration"]
    counters = recording.counters()
    assert (counters["requests"], counters["requests_aborted"]) == (1, 0)
    assert (counters["prompt_tokens"], counters["generated_tokens"]) == (6, 5)
    assert recording.reader.histogram("time_to_first_token").sum() == 1
    assert recording.reader.histogram("inter_token_latency").sum() == 4
    assert recording.reader.histogram("time_per_output_token").sum() == 1
    assert (recording.load().running, recording.load().unfinished) == (0, 0)


def test_tokens_come_out_the_same_with_and_without_the_hooks(recording: Recording) -> None:
    model = llama()
    with_hooks = model.generate(prompt(2, 5), **endless(max_new_tokens=9))
    recording.probe.remove_patches()
    assert torch.equal(with_hooks, model.generate(prompt(2, 5), **endless(max_new_tokens=9)))


def test_sampling_counts_rows_of_several_returned_sequences(recording: Recording) -> None:
    llama().generate(prompt(2, 4), **endless(do_sample=True, num_return_sequences=3))
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert column(records, "requests") == [6] * 5
    assert column(records, "prompt_tokens")[0] == 24
    assert records.requests["generated_tokens"].tolist() == [15, 15]
    assert recording.counters()["generated_tokens"] == 30
    assert recording.counters()["prompt_tokens"] == 8


def test_padding_behind_the_end_of_a_sequence_is_not_counted(recording: Recording) -> None:
    model = llama()
    plain = model.generate(prompt(3, 5), **endless(max_new_tokens=12))[:, 5:]
    stop = int(plain[0, 3])  # makes the first row end early
    expected = [row.tolist().index(stop) + 1 if stop in row.tolist() else 12 for row in plain]
    recording.records()
    before = recording.counters()["generated_tokens"]
    model.generate(prompt(3, 5), **endless(max_new_tokens=12, eos_token_id=stop))
    records = recording.records()
    assert min(expected) <= 4
    assert records.requests["generated_tokens"].tolist() == expected
    assert recording.counters()["generated_tokens"] - before == sum(expected)
    assert len(records.steps) == max(expected)


def test_padding_before_a_prompt_is_not_counted(recording: Recording) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :4] = 0
    llama().generate(prompt(2, 6), attention_mask=mask, **endless())
    assert recording.records().requests["prompt_tokens"].tolist() == [6, 2]


def test_beam_search_works_on_a_row_for_each_beam(recording: Recording) -> None:
    result = llama().generate(prompt(2, 4), **endless(num_beams=3, max_new_tokens=4))
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 3
    assert column(records, "requests") == [6] * 4
    assert column(records, "decode_tokens") == [0, 6, 6, 6]
    assert records.steps["context_decode"][:, 0].tolist() == [0, 30, 36, 42]
    assert records.requests["generated_tokens"].tolist() == [result.shape[1] - 4] * 2


def test_assisted_decoding_tells_draft_steps_from_verification(recording: Recording) -> None:
    model, assistant = llama(), llama(num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    model.generate(prompt(1, 6), assistant_model=assistant, **endless(max_new_tokens=8))
    records = recording.records()
    seen = phases(records)
    steps = records.steps
    draft, verify = steps["phase"] == Phase.DRAFT, steps["phase"] == Phase.DECODE
    assert seen[0] == "draft" and seen.count("prefill") == 1
    assert draft.sum() >= 3 and verify.sum() >= 1
    assert steps["new_tokens"][~draft].sum() == 8
    first = steps[steps["phase"] == Phase.PREFILL][0]
    assert first["prompt_tokens"] == 6 + first["draft_tokens"]
    assert (steps["decode_tokens"][verify] == steps["draft_tokens"][verify] + 1).all()
    assert (steps["sampled"][verify] == steps["decode_tokens"][verify]).all()
    # A verification sees what was accepted before it and its own queries.
    accepted = 6 + np.cumsum(steps["new_tokens"][~draft])[:-1] - 1
    expected = accepted + steps["decode_tokens"][verify]
    assert steps["context_decode"][verify][:, 0].tolist() == expected.tolist()
    assert not steps["context_decode"][draft].any()
    assert recording.counters()["generated_tokens"] == 8
    assert len(records.requests) == 1
    assert recording.facts()["model"] is not None


def test_prompt_lookup_needs_no_second_model(recording: Recording) -> None:
    repeated = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    llama().generate(repeated, prompt_lookup_num_tokens=2, **endless(max_new_tokens=6))
    records = recording.records()
    assert "draft" not in phases(records) and phases(records)[0] == "prefill"
    assert records.steps["new_tokens"].sum() == 6
    assert recording.counters()["generated_tokens"] == 6


def test_a_static_cache_has_its_size_from_the_first_step(recording: Recording) -> None:
    llama().generate(prompt(1, 6), **endless(cache_implementation="static", disable_compile=True))
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert records.steps["context_decode"][:, 0].tolist() == [0, 7, 8, 9, 10]
    used = column(records, "kv_used_bytes")
    slots = 6 + 5 - 1
    assert len(set(used)) == 1
    assert used[0] >= 2 * 2 * slots * 2 * 8 * 4


def test_a_growing_cache_is_followed_to_the_byte(recording: Recording) -> None:
    sizes: list[int] = []

    class Measure(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            sizes.append(input_ids.shape[1])
            return scores

    model = llama()
    model.generate(prompt(3, 6), logits_processor=LogitsProcessorList([Measure()]), **endless())
    records = recording.records()
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    assert column(records, "kv_used_bytes") == [3 * per_token * length for length in sizes]


def test_without_a_cache_every_step_reads_the_whole_sequence(recording: Recording) -> None:
    llama().generate(prompt(1, 6), **endless(use_cache=False))
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert column(records, "decode_tokens") == [0, 7, 8, 9, 10]
    assert records.steps["context_decode"][:, 0].tolist() == [0, 7, 8, 9, 10]
    assert records.steps["pairs_decode"][:, 0].tolist() == [0, 28, 36, 45, 55]


def test_a_conversation_that_goes_on_counts_what_the_cache_held(recording: Recording) -> None:
    model = llama()
    first = model.generate(prompt(1, 6), **endless(return_dict_in_generate=True))
    recording.records()
    longer = torch.cat([first.sequences, prompt(1, 3)], dim=1)
    model.generate(longer, past_key_values=first.past_key_values, **endless())
    records = recording.records()
    held = 6 + 5 - 1
    assert column(records, "prompt_tokens")[0] == 14 - held
    assert records.steps["context_prefill"][0, 0] == 14
    assert records.steps["context_decode"][1, 0] == 15
    (request,) = records.requests
    assert (request["prompt_tokens"], request["cached_tokens"]) == (14, held)


def test_chunks_of_a_prompt_are_prefill_steps_of_their_own(recording: Recording) -> None:
    llama().generate(prompt(1, 10), **endless(prefill_chunk_size=4))
    records = recording.records()
    assert phases(records) == ["prefill"] * 3 + ["decode"] * 4
    assert column(records, "prompt_tokens")[:3] == [4, 4, 2]
    assert records.steps["context_prefill"][:3, 0].tolist() == [4, 8, 10]
    assert column(records, "new_tokens") == [0, 0, 1, 1, 1, 1, 1]


def test_a_streamer_may_generate_with_another_model_in_between(recording: Recording) -> None:
    other = llama(num_hidden_layers=1)

    class Nested(BaseStreamer):
        calls = 0

        def put(self, value: Any) -> None:
            self.calls += 1
            if self.calls == 3:
                other.generate(prompt(), **endless(max_new_tokens=2))

        def end(self) -> None:
            pass

    llama().generate(prompt(), streamer=Nested(), **endless())
    records = recording.records()
    assert len(records.steps) == 5 + 2
    assert len(records.requests) == 1
    assert recording.counters()["generated_tokens"] == 5
    assert recording.facts()["model"] is None
    assert "several models" in recording.facts()["notes"][0]
