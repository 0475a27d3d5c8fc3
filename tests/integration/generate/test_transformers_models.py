"""Kinds of models: their caches, weights and phases, through real ``generate`` calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    SIZES,
    VOCABULARY,
    Recording,
    column,
    endless,
    llama,
    phases,
    prompt,
)
from transformers import (  # noqa: E402
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

pytestmark = pytest.mark.integration


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
