"""Quantised models of transformers as its own classes store them: kernels need a GPU, modules do not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

from llmprobe.hooks import transformers as hooks  # noqa: E402
from llmprobe.hooks.probe import Probe  # noqa: E402
from llmprobe.hooks.transformers_model import describe  # noqa: E402
from llmprobe.settings import Settings  # noqa: E402

LAYERS, EXPERTS, WIDTH = 2, 8, 64
NUMBERS = LAYERS * EXPERTS * 3 * WIDTH * WIDTH
SCALES = NUMBERS // 32  # one byte for 32 numbers
BIASES = LAYERS * EXPERTS * (2 * WIDTH + WIDTH) * 4


class PrecisionConfig:
    """As ``triton_kernels.matmul_ogs.PrecisionConfig``."""

    def __init__(self, weight_scale: Any) -> None:
        self.weight_scale = weight_scale


def gpt_oss() -> Any:
    """gpt-oss with experts in MXFP4, before its weights are loaded."""
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.experts = mxfp4.Mxfp4GptOssExperts(config)
    return model


def swizzle(model: Any, keep: Any) -> None:
    """As ``swizzle_mxfp4_convertops`` leaves a model. ``keep``: how a module holds a tensor."""
    for layer in model.model.layers:
        module = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            blocks = module._parameters.pop(name)
            scales = torch.zeros(blocks.shape[:-1], dtype=torch.uint8)
            setattr(module, name, keep(blocks))
            setattr(module, f"{name}_precision_config", PrecisionConfig(keep(scales)))


def experts_of(model: Any) -> tuple[dict[str, Any], list[str]]:
    facts = describe(model).facts
    return facts["operators"]["experts"], facts["unmodelled"]


def test_experts_in_mxfp4_count_as_swizzled_and_multiply_their_logical_size() -> None:
    model = gpt_oss()
    swizzle(model, lambda tensor: SimpleNamespace(storage=SimpleNamespace(data=tensor.detach())))
    found, unmodelled = experts_of(model)
    assert found["bytes"] == NUMBERS // 2 + SCALES + BIASES
    assert (found["params"], found["count"], found["top_k"]) == (NUMBERS, EXPERTS, 2)
    assert unmodelled == []
    assert describe(model).facts["compute_dtype"] == "bfloat16"


def test_packed_experts_that_are_parameters_multiply_their_logical_size() -> None:
    found, unmodelled = experts_of(gpt_oss())
    assert (found["bytes"], found["params"]) == (NUMBERS // 2 + BIASES, NUMBERS)
    assert unmodelled == []


def test_experts_of_which_only_the_biases_are_found_are_said_once() -> None:
    model = gpt_oss()
    swizzle(model, lambda tensor: SimpleNamespace(kept_elsewhere=tensor))
    found, unmodelled = experts_of(model)
    assert found["bytes"] == BIASES
    assert unmodelled == ["experts: where Mxfp4GptOssExperts keeps its weights is not known"]


def test_packed_experts_that_do_not_tell_their_sizes_are_said() -> None:
    model = gpt_oss()
    for layer in model.model.layers:
        del layer.mlp.experts.num_experts
    _, unmodelled = experts_of(model)
    assert unmodelled == ["experts: how many parameters Mxfp4GptOssExperts multiplies by is not known"]


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def quantise(model: Any, only: str) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and only in name and name != "lm_head":
            quantised = fp8.FP8Linear(module.in_features, module.out_features, block_size=(128, 128))
            model.set_submodule(name, quantised)


@pytest.mark.parametrize(
    ("quantised", "dtype"), [("", "float8_e4m3fn"), ("mlp", "float8_e4m3fn"), ("k_proj", "bfloat16")]
)
def test_flops_are_held_against_the_type_that_most_products_compute_in(quantised: str, dtype: str) -> None:
    model = llama()
    plain = describe(model).facts
    assert plain["compute_dtype"] == "bfloat16"
    quantise(model, quantised)
    found = describe(model).facts
    assert found["compute_dtype"] == dtype
    assert found["operators"]["linear"]["params"] == plain["operators"]["linear"]["params"]
    assert found["operators"]["linear"]["bytes"] < plain["operators"]["linear"]["bytes"]
    assert found["unmodelled"] == []


@pytest.mark.parametrize(("top_k", "dtype"), [(1, "bfloat16"), (4, "float8_e4m3fn")])
def test_experts_weigh_as_much_as_a_token_uses_of_them(top_k: int, dtype: str) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=top_k,
    )
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        if ".experts." in name:
            owner, _, own = name.rpartition(".")
            eight_bits = torch.nn.Parameter(parameter.to(torch.float8_e4m3fn), requires_grad=False)
            setattr(model.get_submodule(owner), own, eight_bits)
    facts = describe(model).facts
    attention = LAYERS * 3 * 32 * 32
    assert facts["operators"]["experts"]["params"] == LAYERS * EXPERTS * 3 * 32 * 16 > 2 * attention
    assert facts["compute_dtype"] == dtype


def test_numbers_that_are_only_stored_in_eight_bits_compute_in_the_models_type() -> None:
    class EetqLinear(torch.nn.Module):  # type: ignore[misc]
        """As ``transformers.integrations.eetq``: int8 weights, half activations."""

        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(
                torch.zeros(rows, columns, dtype=torch.int8), requires_grad=False
            )
            self.in_features, self.out_features = rows, columns

    class Linear8bitLt(EetqLinear):
        """As bitsandbytes': activations are quantised too."""

    for cls, dtype in ((EetqLinear, "bfloat16"), (Linear8bitLt, "int8")):
        model = llama()
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                model.set_submodule(name, cls(module.in_features, module.out_features))
        assert describe(model).facts["compute_dtype"] == dtype


@pytest.mark.parametrize(
    ("weights", "activations", "stored"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "channel"}, {"num_bits": 8, "type": "float"}, 1.0),
        ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, None, 0.5),
    ],
)
def test_weights_that_the_first_forward_unpacks_are_described_anew(
    tmp_path: Path, weights: dict[str, Any], activations: dict[str, Any] | None, stored: float
) -> None:
    """As transformers loads a checkpoint of compressed-tensors, unless told to unpack it at once."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = llama().eval()
    plain = describe(model).facts["operators"]["linear"]
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            torch.nn.init.constant_(module.weight_scale, 0.01)
    ModelCompressor(config).compress_model(model)
    assert describe(model).facts["operators"]["linear"]["bytes"] < 1.5 * stored * plain["params"]

    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    hooks.install(probe)
    try:
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, eos_token_id=None)
        assert probe.recorder is not None
        found = probe.recorder.facts["model"]
    finally:
        probe.remove_patches()
        probe.disarm()
    assert found == describe(model).facts
    assert found["compute_dtype"] == "bfloat16"
    assert found["operators"]["linear"]["params"] == plain["params"]
    assert found["operators"]["linear"]["bytes"] >= plain["bytes"]
