"""Real ``generate`` calls of tiny random models, read back through the journal that they left."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmprobe.hooks import transformers as hooks
from llmprobe.hooks.probe import Probe
from llmprobe.record.journal import JournalReader, Load, Records
from llmprobe.record.layout import Flag, Phase
from llmprobe.settings import Settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from transformers.generation.utils import GenerationMixin  # noqa: E402

pytestmark = pytest.mark.integration

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(**changes: Any) -> Any:
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def prompt(rows: int = 1, length: int = 6) -> Any:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def endless(**changes: Any) -> dict[str, Any]:
    """Options under which a random model generates exactly ``max_new_tokens`` tokens."""
    return {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **changes}


class Recording:
    """The probe of one test, and what it has recorded so far."""

    def __init__(self, directory: Path, **environ: str) -> None:
        env = {"LLMPROBE": "1", "LLMPROBE_DIR": str(directory), "LLMPROBE_SERVER": "tests", **environ}
        self.probe = Probe(Settings.from_env(env))
        self._reader: JournalReader | None = None

    @property
    def reader(self) -> JournalReader:
        if self._reader is None:
            recorder = self.probe.recorder
            assert recorder is not None, "the probe did not arm"
            self._reader = JournalReader(recorder.writer.path, recorder.writer)
        return self._reader

    def records(self) -> Records:
        records = self.reader.read()
        assert records.lost == 0
        return records

    def facts(self) -> dict[str, Any]:
        return self.reader.facts()

    def counters(self) -> dict[str, int]:
        return self.reader.counters()

    def load(self) -> Load:
        load = self.reader.load()
        assert load is not None
        return load


def reraise(where: str, error: Exception) -> None:
    raise error


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """The hooks installed, with every swallowed error raised; afterwards nothing of them is left."""
    before = dict(vars(GenerationMixin))
    found = Recording(tmp_path / "probe")
    found.probe.guard.observers.append(reraise)
    hooks.install(found.probe)
    yield found
    found.probe.remove_patches()
    found.probe.disarm()
    assert dict(vars(GenerationMixin)) == before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("llmprobe")]


def phases(records: Records) -> list[str]:
    return [Phase(int(phase)).label for phase in records.steps["phase"]]


def column(records: Records, name: str) -> list[int]:
    return [int(value) for value in records.steps[name]]


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


def test_an_encoder_decoder_model_has_a_group_for_cross_attention(recording: Recording) -> None:
    torch.manual_seed(7)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    model.generate(prompt(2, 7), **endless())
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert column(records, "prompt_tokens") == [2, 0, 0, 0, 0]
    groups = recording.facts()["model"]["kv"]["groups"]
    assert [group["kind"] for group in groups] == ["full", "cross"]
    assert records.steps["context_decode"][1].tolist()[:2] == [4, 14]
    assert records.steps["pairs_prefill"][0].tolist()[:2] == [2, 14]
    assert records.requests["prompt_tokens"].tolist() == [7, 7]
    assert records.requests["generated_tokens"].tolist() == [5, 5]
    model_facts = recording.facts()["model"]
    assert any(part.startswith("encoder") for part in model_facts["unmodelled"])
    decoder = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith("decoder.") and parameter.dim() == 2 and "relative_attention_bias" not in name
    )
    assert model_facts["operators"]["linear"]["params"] == decoder


def test_a_sliding_window_clamps_context_and_pairs(recording: Recording) -> None:
    torch.manual_seed(7)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    model.generate(prompt(1, 6), **endless())
    records = recording.records()
    (group,) = recording.facts()["model"]["kv"]["groups"]
    assert (group["kind"], group["window"]) == ("sliding", 4)
    assert records.steps["context_prefill"][0, 0] == 6
    assert records.steps["pairs_prefill"][0, 0] == 1 + 2 + 3 + 4 + 4 + 4
    assert records.steps["context_decode"][1:, 0].tolist() == [4] * 4
    assert records.steps["pairs_decode"][1:, 0].tolist() == [4] * 4


def test_a_recurrent_model_has_a_state_for_each_request_and_no_context(recording: Recording) -> None:
    torch.manual_seed(7)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    ).eval()
    model.generate(prompt(2, 6), **endless())
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert not records.steps["context_decode"].any()
    assert [group["kind"] for group in recording.facts()["model"]["kv"]["groups"]] == ["recurrent"]


def test_an_exception_ends_the_request_as_aborted_and_is_not_swallowed(recording: Recording) -> None:
    class Fails(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return scores

    model = llama()
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt(), logits_processor=LogitsProcessorList([Fails()]), **endless())
    records = recording.records()
    assert phases(records) == ["prefill", "decode", "decode"]
    assert column(records, "new_tokens") == [1, 1, 0]
    assert recording.counters()["requests_aborted"] == 1
    assert recording.counters()["generated_tokens"] == 2
    assert records.pending["unfinished"].tolist() == [1, 0]
    model.generate(prompt(), **endless())
    assert phases(recording.records()) == ["prefill"] + ["decode"] * 4


def test_a_forward_that_fails_leaves_no_step_and_does_not_look_stalled(recording: Recording) -> None:
    model = llama()
    broken = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(prompt(), **endless())
    broken.remove()
    assert len(recording.records().steps) == 0
    recorder = recording.probe.recorder
    assert recorder is not None
    recorder.publish()
    progress = recording.reader.progress()
    assert progress is not None
    assert (progress.begun, progress.ended) == (1, 1)
    model.generate(prompt(), **endless())
    assert recording.records().steps["step"].tolist() == [2, 3, 4, 5, 6]


def test_four_threads_keep_their_requests_apart(recording: Recording) -> None:
    model = llama()
    errors: list[BaseException] = []

    def work(tokens: int) -> None:
        try:
            for _ in range(3):
                model.generate(prompt(2, 4), **endless(max_new_tokens=tokens))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(3 + index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    records = recording.records()
    counters = recording.counters()
    steps = 3 * (3 + 4 + 5 + 6)
    assert len(records.steps) == steps and phases(records).count("prefill") == 12
    assert sorted(column(records, "step")) == list(range(1, steps + 1))
    assert sorted(records.requests["generated_tokens"].tolist()) == sorted([3, 4, 5, 6] * 6)
    assert (counters["requests"], counters["prompt_tokens"]) == (24, 96)
    assert counters["generated_tokens"] == 2 * steps
    assert (records.pending["unfinished"][0] > 0) and records.pending["unfinished"][-1] == 0
    assert recording.load().running == 0


def test_custom_generate_is_followed_by_its_methods(recording: Recording) -> None:
    def custom(model: Any, input_ids: Any, **kwargs: Any) -> Any:
        return model._sample(input_ids, **{k: v for k, v in kwargs.items() if k != "tokenizer"})

    llama().generate(prompt(), custom_generate=custom, **endless())
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert recording.counters()["generated_tokens"] == 5


def test_a_decoding_loop_called_without_generate_is_a_request(recording: Recording) -> None:
    original: dict[str, Any] = {}

    def capture(model: Any, input_ids: Any, **kwargs: Any) -> Any:
        original.update(kwargs, input_ids=input_ids)
        return input_ids

    model = llama()
    model.generate(prompt(1, 6), custom_generate=capture, **endless())
    recording.records()
    model._sample(original.pop("input_ids"), **original)
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    (request,) = records.requests
    assert (request["prompt_tokens"], request["generated_tokens"]) == (6, 5)


def test_prepare_may_be_bypassed_by_a_method_on_the_instance(recording: Recording) -> None:
    model = llama()
    bound = GenerationMixin.prepare_inputs_for_generation.__wrapped__.__get__(model)  # type: ignore[attr-defined]
    model.prepare_inputs_for_generation = lambda *args, **kwargs: bound(*args, **kwargs)  # as PEFT does
    model.generate(prompt(1, 6), **endless())
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert column(records, "prompt_tokens")[0] == 6
    assert recording.counters()["generated_tokens"] == 5


def test_a_class_that_overrides_prepare_is_followed_once(recording: Recording) -> None:
    class Overriding(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    torch.manual_seed(7)
    own = vars(Overriding)["prepare_inputs_for_generation"]
    model = Overriding(LlamaConfig(**SIZES)).eval()
    model.generate(prompt(), **endless())
    assert phases(recording.records()) == ["prefill"] + ["decode"] * 4
    assert vars(Overriding)["prepare_inputs_for_generation"] is not own
    recording.probe.remove_patches()
    assert vars(Overriding)["prepare_inputs_for_generation"] is own


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_saved_file(recording: Recording, tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "saved")
    data = (tmp_path / "saved" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    saved = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    )
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    loaded.generate(prompt(), **endless())
    facts = recording.facts()["model"]
    table = VOCABULARY * 32 * 4
    assert facts["weights_bytes"] == saved
    assert facts["tied"] is tied
    assert facts["embedding_bytes"] == table
    assert facts["operators"]["head"] == {"bytes": table, "params": VOCABULARY * 32}
    assert facts["operators"]["linear"]["bytes"] == saved - (1 if tied else 2) * table
    assert recording.facts()["model_name"] == "saved"


def test_routed_experts_are_told_from_the_layers_that_every_token_takes(recording: Recording) -> None:
    torch.manual_seed(7)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()
    model.generate(prompt(), **endless())
    experts = recording.facts()["model"]["operators"]["experts"]
    params = 2 * 4 * 3 * 32 * 64  # layers, experts, projections
    assert experts == {"bytes": 4 * params, "params": params, "count": 4, "top_k": 2}


def test_models_one_after_the_other_are_described_in_their_time(recording: Recording) -> None:
    import gc

    first = llama()
    first.generate(prompt(), **endless())
    small = recording.facts()["model"]["weights_bytes"]
    del first
    gc.collect()
    second = llama(num_hidden_layers=4)
    second.generate(prompt(), **endless())
    assert recording.facts()["model"]["weights_bytes"] > small


def test_hooks_removed_and_applied_again_record_again(recording: Recording) -> None:
    model = llama()
    model.generate(prompt(), **endless())
    recording.records()
    recording.probe.enabled = False
    recording.probe.remove_patches()
    model.generate(prompt(), **endless())
    assert len(recording.records().steps) == 0
    recording.probe.enabled = True
    recording.probe.apply_patches()
    model.generate(prompt(), **endless())
    steps = recording.records().steps
    assert len(steps) == 5
    assert steps["flags"][0] & int(Flag.RESTARTED)


def test_switching_off_in_the_middle_of_a_call_stops_the_records_and_ends_the_load(
    recording: Recording,
) -> None:
    class Switch(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                recording.probe.enabled = False
                recording.probe.remove_patches()
            return scores

    model = llama()
    model.generate(prompt(), logits_processor=LogitsProcessorList([Switch()]), **endless())
    records = recording.records()
    assert phases(records) == ["prefill", "decode"]
    assert len(records.requests) == 0
    assert records.pending["unfinished"].tolist() == [1, 0]
    assert recording.load().running == 0
    recording.probe.enabled = True
    recording.probe.apply_patches()
    model.generate(prompt(), **endless())
    assert phases(recording.records()) == ["prefill"] + ["decode"] * 4


@pytest.mark.parametrize("name", ["generate", "_has_unfinished_sequences"])
def test_another_tools_wrapper_on_top_stays_and_ours_goes_silent(recording: Recording, name: str) -> None:
    calls: list[str] = []
    ours = vars(GenerationMixin)[name]

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return ours(self, *args, **kwargs)

    setattr(GenerationMixin, name, theirs)
    model = llama()
    try:
        model.generate(prompt(), **endless())
        assert len(recording.records().steps) == 5 and calls
        recording.probe.enabled = False
        recording.probe.remove_patches()
        assert vars(GenerationMixin)[name] is theirs
        calls.clear()
        model.generate(prompt(), **endless())
        assert calls and len(recording.records().steps) == 0
    finally:
        setattr(GenerationMixin, name, ours)


@pytest.mark.swallows
def test_ten_internal_errors_make_the_probe_inert_and_generate_goes_on(tmp_path: Path) -> None:
    found = Recording(tmp_path / "probe")
    hooks.install(found.probe)
    model = llama()
    try:
        model.generate(prompt(), **endless())
        recorder = found.probe.recorder
        assert recorder is not None

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("on purpose")

        recorder.begin = broken  # type: ignore[method-assign]
        expected = model.generate(prompt(), **endless(max_new_tokens=20))
        assert found.probe.guard.inert
        assert sum(found.probe.guard.errors.values()) == 10
        assert found.counters()["errors"] == 10
        assert torch.equal(expected, model.generate(prompt(), **endless(max_new_tokens=20)))
    finally:
        found.probe.remove_patches()
        found.probe.disarm()


def test_no_journal_means_no_hooks_and_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = Recording(tmp_path / "file" / "below")
    hooks.install(found.probe)
    try:
        llama().generate(prompt(), **endless())
        assert found.probe.recorder is None
    finally:
        found.probe.remove_patches()


def test_a_compiled_forward_has_the_graphs_it_has_without_hooks(recording: Recording) -> None:
    graphs = 0

    def backend(module: Any, inputs: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward  # type: ignore[no-any-return]

    def count() -> int:
        nonlocal graphs
        graphs = 0
        torch._dynamo.reset()
        model = llama(num_hidden_layers=1)
        model.forward = torch.compile(model.forward, backend=backend, dynamic=True, fullgraph=True)
        model.generate(prompt(), **endless())
        return graphs

    with_hooks = count()
    assert len(recording.records().steps) == 5
    recording.probe.remove_patches()
    assert with_hooks == count()
