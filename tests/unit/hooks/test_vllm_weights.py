"""vLLM's weights by operator, on modules that are named and laid out as vLLM's are.

Whole models run under the real engine in `tests/integration/test_vllm_model.py`; here stands what a CPU does
not have: packed formats, copies in other types, encoders, and models that look up more than tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from llmprobe.hooks.vllm.weights import weights  # noqa: E402

nn = torch.nn
HIDDEN, WORDS = 8, 32


class VocabParallelEmbedding(nn.Module):  # type: ignore[misc]
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.num_embeddings_per_partition, self.embedding_dim = rows, width
        self.weight = frozen(torch.zeros(rows, width, dtype=torch.bfloat16))


class ParallelLMHead(VocabParallelEmbedding):
    pass


class Linear(nn.Module):  # type: ignore[misc]
    """As vLLM's linear layers: sizes as attributes, weights in whatever form their method keeps."""

    def __init__(self, rows: int, columns: int, **tensors: Any) -> None:
        super().__init__()
        self.output_size_per_partition, self.input_size_per_partition = rows, columns
        for name, tensor in (tensors or {"weight": torch.zeros(rows, columns, dtype=torch.bfloat16)}).items():
            self.register_parameter(name, frozen(tensor))


class RoutedExperts(nn.Module):  # type: ignore[misc]
    """Experts of one rank of two: it has 4 of 8."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, gated: bool = True) -> None:
        super().__init__()
        self.hidden_size, self.intermediate_size_per_partition = 16, 4  # padded for a kernel
        self.local_num_experts, self.global_num_experts, self.top_k = 4, 8, 2
        self.moe_config = type(
            "FusedMoEConfig",
            (),
            {
                "hidden_dim_unpadded": HIDDEN,
                "intermediate_size_per_partition_unpadded": 4,
                "is_act_and_mul": gated,
            },
        )()
        self.w13_weight = frozen(torch.zeros(4, 8 if gated else 4, 16, dtype=dtype))
        self.w2_weight = frozen(torch.zeros(4, 16, 4, dtype=dtype))


class Model(nn.Module):  # type: ignore[misc]
    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(WORDS, HIDDEN)
        for name, module in parts.items():
            self.add_module(name, module)


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def measure(model: nn.Module, tied: bool = False, device_type: str = "cpu") -> dict[str, Any]:
    return weights(model, True, tied, device_type)


TABLE = WORDS * HIDDEN * 2


def test_a_head_of_its_own_and_one_that_is_the_embedding() -> None:
    untied = measure(Model(lm_head=ParallelLMHead(WORDS, HIDDEN)))
    assert (untied["tied"], untied["weights_bytes"]) == (False, 2 * TABLE)
    assert untied["operators"]["head"] == {"bytes": TABLE, "params": WORDS * HIDDEN}
    model = Model(lm_head=ParallelLMHead(WORDS, HIDDEN))
    model.lm_head.weight = model.embed_tokens.weight
    for one in (measure(model, True), measure(Model(), True)):  # two modules, or one that serves as both
        assert (one["tied"], one["weights_bytes"], one["embedding_bytes"]) == (True, TABLE, TABLE)
        assert one["operators"]["head"] == {"bytes": TABLE, "params": WORDS * HIDDEN}
        assert one["unmodelled"] == []
    assert measure(Model())["unmodelled"] == ["head: no output head was found on this rank"]


def test_a_tied_head_reads_the_words_and_no_other_table() -> None:
    found = measure(Model(embed_tokens_per_layer=VocabParallelEmbedding(WORDS, 10 * HIDDEN)), True)
    assert found["operators"]["head"] == {"bytes": TABLE, "params": WORDS * HIDDEN}
    assert found["weights_bytes"] == 11 * TABLE
    assert found["operators"]["linear"] == {"bytes": 0, "params": 0}


@pytest.mark.parametrize(
    ("tensors", "size", "dtype"),
    [
        ({"weight": torch.zeros(16, 8, dtype=torch.bfloat16)}, 256, None),
        ({"weight": torch.zeros(8, 16, dtype=torch.float8_e4m3fn)}, 128, "float8_e4m3fn"),
        ({"weight": torch.zeros(8, 16, dtype=torch.int8), "weight_scale": torch.zeros(16)}, 192, "int8"),
        # four bits, packed: products are of what is unpacked
        ({"weight_packed": torch.zeros(16, 1, dtype=torch.int32), "scales": torch.zeros(4)}, 80, None),
        # CPU kernels keep the weight to themselves
        ({"weight": torch.zeros(0, dtype=torch.bfloat16)}, 256, None),
        ({"weight": None, "weight_scale": torch.zeros(4)}, 16 + 128, None),
    ],
)
def test_a_layer_counts_as_it_is_stored_and_multiplies_its_logical_size(
    tensors: dict[str, Any], size: int, dtype: str | None
) -> None:
    layer = Linear(16, 8, **{name: tensor for name, tensor in tensors.items() if tensor is not None})
    for name, tensor in tensors.items():
        if tensor is None:
            layer.register_parameter(name, None)
    found = measure(Model(proj=layer, lm_head=ParallelLMHead(WORDS, HIDDEN)))
    assert found["operators"]["linear"] == {"bytes": size, "params": 128}
    assert found["matmul_dtype"] == dtype


@pytest.mark.parametrize(("gated", "matrices"), [(True, 3), (False, 2)])
def test_experts_of_a_shard_count_what_it_has_and_what_there_are(gated: bool, matrices: int) -> None:
    found = measure(Model(experts=RoutedExperts(torch.float8_e4m3fn, gated)), True)
    assert found["operators"]["experts"] == {
        "bytes": matrices * 4 * 4 * 16,  # with the padding
        "params": matrices * 4 * 4 * HIDDEN,  # without it
        "count": 8,
        "top_k": 2,
    }
    assert found["matmul_dtype"] == "float8_e4m3fn"


def test_experts_weigh_as_much_as_a_token_uses_of_them() -> None:
    """Two of eight, of which this rank has four: 96 of 384 parameters, beside 128 in the model's type."""
    found = measure(Model(proj=Linear(16, 8), experts=RoutedExperts(torch.float8_e4m3fn)), True)
    assert found["operators"]["experts"]["params"] == 384
    assert found["operators"]["linear"]["params"] == 128
    assert found["matmul_dtype"] is None


class Wrapped:
    """As ``triton_kernels.tensor.Tensor``: data in the order of a kernel, no tensor itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = SimpleNamespace(data=tensor)


class PrecisionConfig:
    """As ``triton_kernels.matmul_ogs.PrecisionConfig``."""

    def __init__(self, **scales: Any) -> None:
        self.flex_ctx = SimpleNamespace()
        self.__dict__.update(scales)


def swizzled(scale: str, modular: bool = False) -> nn.Module:
    """Experts in MXFP4 as vLLM's Triton path leaves them: no parameter but the biases is left."""
    experts = RoutedExperts()
    del experts.w13_weight, experts.w2_weight
    experts.w13_weight = Wrapped(torch.zeros(4, 8, 16 // 2, dtype=torch.uint8))
    experts.w2_weight = Wrapped(torch.zeros(4, 16, 4 // 2, dtype=torch.uint8))
    experts.w13_bias = frozen(torch.zeros(4, 8))
    method: Any = SimpleNamespace(
        w13_precision_config=PrecisionConfig(**{scale: Wrapped(torch.zeros(4, 8, dtype=torch.uint8))}),
        w2_precision_config=PrecisionConfig(**{scale: torch.zeros(4, 16, dtype=torch.uint8)}),
    )
    experts.quant_method = SimpleNamespace(old_quant_method=method) if modular else method
    return experts


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(("scale", "modular"), [("weight_scale", False), ("b_mx_scale", True)])
def test_experts_that_are_no_parameters_any_more_count_as_their_kernel_keeps_them(
    scale: str, modular: bool, device_type: str
) -> None:
    found = measure(Model(experts=swizzled(scale, modular)), True, device_type)
    assert found["operators"]["experts"] == {
        "bytes": 4 * (8 * 8 + 16 * 2) + 4 * (8 + 16) + 4 * 4 * 8,
        "params": 3 * 4 * 4 * HIDDEN,
        "count": 8,
        "top_k": 2,
    }
    assert found["unmodelled"] == []
    assert found["matmul_dtype"] is None


def test_weights_that_are_nowhere_to_be_found_are_said_unless_a_cpu_keeps_copies() -> None:
    layers = [Linear(16, 8, weight=torch.zeros(0, dtype=torch.bfloat16)) for _ in range(2)]
    experts = RoutedExperts()
    del experts.w13_weight, experts.w2_weight
    model = Model(first=layers[0], second=layers[1], experts=experts)
    elsewhere = measure(model, True, "cuda")
    assert elsewhere["unmodelled"] == [
        "linear: where Linear keeps its weights is not known",
        "experts: where RoutedExperts keeps its weights is not known",
    ]
    assert elsewhere["weights_bytes"] == TABLE  # only what was seen
    cpu = measure(model, True, "cpu")
    assert cpu["unmodelled"] == []
    assert cpu["operators"]["experts"]["bytes"] == 2 * cpu["operators"]["experts"]["params"]


def test_shared_experts_beside_routed_ones_are_for_every_token() -> None:
    experts = RoutedExperts()
    experts.shared_experts = Linear(16, 8)
    found = measure(Model(experts=experts), True)
    assert found["operators"]["linear"] == {"bytes": 256, "params": 128}


def latent_attention(copied: bool, as_parameters: bool) -> nn.Module:
    """Two heads that expand latents of 8 to keys of 3 and values of 5."""

    class MLAAttention(nn.Module):  # type: ignore[misc]
        pass

    module = MLAAttention()
    module.kv_b_proj = Linear(16, 8)
    source = module.kv_b_proj.weight.T
    split = (source.clone() if copied else source).view(8, 2, 8).split([3, 5], dim=-1)
    for name, tensor in (("W_UK_T", split[0].permute(1, 2, 0)), ("W_UV", split[1].transpose(0, 1))):
        setattr(module, name, frozen(tensor) if as_parameters else tensor)
    return module


@pytest.mark.parametrize("as_parameters", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_of_latent_attention_a_step_reads_one_form_of_its_projection(
    copied: bool, as_parameters: bool
) -> None:
    found = measure(Model(attention=latent_attention(copied, as_parameters)), True)
    assert found["operators"]["linear"] == {"bytes": 256, "params": 128}
    assert found["weights_bytes"] == TABLE + (512 if copied else 256)


def test_an_encoder_is_in_memory_but_not_in_a_step() -> None:
    class Seeing(Model):
        def get_language_model(self) -> nn.Module:
            language: nn.Module = self.language_model
            return language

    model = Seeing(visual=Linear(64, 64), language_model=Model(proj=Linear(16, 8)))
    model.language_model.embed_tokens = model.embed_tokens
    found = measure(model, True)
    assert found["operators"]["linear"] == {"bytes": 256, "params": 128}
    assert found["weights_bytes"] == TABLE + 256 + 2 * 64 * 64


def test_an_encoder_that_vllm_cannot_tell_apart_is_said() -> None:
    class Seeing(Model):
        def get_language_model(self) -> nn.Module:
            raise NotImplementedError

    (problem,) = measure(Seeing(visual=Linear(64, 64)), True)["unmodelled"]
    assert problem.startswith("encoder: ")


def test_layers_with_different_experts_are_not_modelled() -> None:
    other = RoutedExperts()
    other.top_k = 4
    found = measure(Model(first=RoutedExperts(), second=other), True)
    assert found["unmodelled"] == ["experts: layers differ in how many there are or how many serve a token"]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["first", "mlp.experts"])
def test_what_vllm_puts_round_a_layer_for_adapters_is_no_layer_of_its_own(
    device_type: str, name: str
) -> None:
    """With ``--enable-lora`` each is wrapped, adapters or not, and the wrapper has the sizes too."""

    class WithLoRA(nn.Module):  # type: ignore[misc]
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer
            for size, value in vars(base_layer).items():
                if not size.startswith("_") and size != "training":
                    setattr(self, size.removesuffix("_per_partition") if name == "first" else size, value)
            self.lora_a_stacked = (torch.zeros(1, 1, 4, 16),)

    def measured(put: Any) -> dict[str, Any]:
        model = Model(lm_head=ParallelLMHead(WORDS, HIDDEN), mlp=nn.Module())
        model.set_submodule(name, put(Linear(16, 8) if name == "first" else RoutedExperts()))
        return measure(model, device_type=device_type)

    assert measured(WithLoRA) == measured(lambda layer: layer)
