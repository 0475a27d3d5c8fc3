"""What a real vLLM worker says of its weights and KV cache, against its checkpoint and configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine import offline_environment

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from support.families import FAMILIES  # noqa: E402
from support.work_truth import absorbed_flops_per_pair, file_bytes, kv_bytes_per_token  # noqa: E402

from llmprobe.hooks.vllm.kv_cache import kv_cache  # noqa: E402

pytestmark = pytest.mark.integration


def test_latent_attention_and_experts_are_told_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "latent attention")
    path = family.make(tmp_path / "model")
    environment = offline_environment(tmp_path / "probe")
    program = [sys.executable, str(BENCHMARKS / "support" / "vllm_facts.py"), str(path), "{}"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("JSON ")), None)
    assert line is not None, (done.stdout + done.stderr)[-3000:]
    (worker,) = json.loads(line.removeprefix("JSON "))["workers"]
    model, stored, config = worker["facts"]["model"], file_bytes(path), family.config()
    assert model["unmodelled"] == []
    assert model["weights_bytes"] == pytest.approx(stored["all"], rel=1e-4)  # and the bias of the routers
    assert model["operators"]["linear"]["bytes"] == pytest.approx(stored["linear"], rel=1e-4)
    assert model["operators"]["head"]["bytes"] == stored["head"]
    assert model["operators"]["experts"] == {
        "bytes": stored["experts"],
        "params": stored["experts"] // 2,
        "count": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
    }
    (group,) = model["kv"]["groups"]
    assert (group["kind"], group["layers"]) == ("mla", config.num_hidden_layers)
    assert group["bytes_per_token"] == kv_bytes_per_token(config, 2, latent=True)
    assert group["flops_per_pair"] == config.num_hidden_layers * absorbed_flops_per_pair(config)
    assert model["kv"]["blocks"] * model["kv"]["block_bytes"] == model["kv"]["capacity_bytes"]


def said(*specs: Any, **layers: Any) -> tuple[dict[str, Any], list[str]]:
    """Of layers with ``specs``, in a worker that has these ``layers`` (4 query heads each, unless given)."""
    names = [f"layer{index}" for index in range(len(specs))]
    known = {name: SimpleNamespace(num_heads=4) for name in names} | layers
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(kv_caches=[]),
        vllm_config=SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=known),
            cache_config=SimpleNamespace(cache_dtype="auto"),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        ),
    )
    groups = [
        SimpleNamespace(kv_cache_spec=spec, layer_names=[name])
        for spec, name in zip(specs, names, strict=True)
    ]
    return kv_cache(worker, SimpleNamespace(kv_cache_groups=groups, num_blocks=1))


def attention(kind: str = "FullAttentionSpec", **changes: Any) -> Any:
    from vllm.v1 import kv_cache_interface

    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16, **changes}
    return getattr(kv_cache_interface, kind)(**sizes)


def test_a_quantised_cache_counts_what_it_stores() -> None:
    from vllm.v1.kv_cache_interface import KVQuantMode

    half, _ = said(attention())
    eight, _ = said(attention(dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR))
    scaled, problems = said(
        # 64 bytes of keys and values, and two float32 scales, for each head
        attention(dtype=torch.int8, state_content_bytes=64 + 8, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)
    )
    sizes = [cache["groups"][0]["bytes_per_token"] for cache in (half, eight, scaled)]
    assert sizes == [2 * 2 * 32 * 2, 2 * 2 * 32, 2 * (64 + 8)]
    assert {cache["groups"][0]["flops_per_pair"] for cache in (half, eight, scaled)} == {2 * 4 * (32 + 32)}
    assert problems == []


def test_padding_is_neither_read_nor_written() -> None:
    padded, _ = said(attention(page_size_padded=8192))
    assert padded["groups"][0]["bytes_per_token"] == 2 * 2 * 32 * 2


def test_layers_are_grouped_by_what_they_see() -> None:
    window = attention("SlidingWindowSpec", sliding_window=64)
    merged = attention(sliding_window=64)  # a window kept in a cache for everything
    cache, problems = said(attention(), window, merged)
    assert [(group["kind"], group["window"], group["layers"]) for group in cache["groups"]] == [
        ("full", None, 1),
        ("sliding", 64, 2),
    ]
    assert problems == []


def test_a_layer_that_reads_anothers_cache_writes_nothing() -> None:
    sharing = SimpleNamespace(num_heads=8, kv_sharing_target_layer_name="layer0")
    cache, problems = said(attention(), reader=sharing)
    (group,) = cache["groups"]
    assert (group["layers"], group["bytes_per_token"], group["bytes_written_per_token"]) == (2, 512, 256)
    assert group["flops_per_pair"] == 2 * (4 + 8) * (32 + 32)
    assert problems == []


def test_recurrent_state_counts_without_the_padding_of_its_page() -> None:
    from vllm.v1.kv_cache_interface import MambaSpec

    state = MambaSpec(
        block_size=16, shapes=((3, 8), (4, 5)), dtypes=(torch.bfloat16, torch.float32), page_size_padded=4096
    )
    cache, _ = said(state)
    assert cache["groups"][0]["bytes_per_request"] == 3 * 8 * 2 + 4 * 5 * 4


@pytest.mark.parametrize(
    ("spec", "layer", "problem"),
    [
        ({"kind": "ChunkedLocalAttentionSpec", "attention_chunk_size": 64}, {}, "in chunks"),
        ({"kind": "SinkFullAttentionSpec", "sink_len": 4}, {}, "SinkFullAttentionSpec is not known"),
        ({"kind": "MLAAttentionSpec", "num_kv_heads": 1}, {"indexer": object()}, "sparse"),
        ({"kind": "MLAAttentionSpec", "num_kv_heads": 1, "tokens_per_state": 4}, {}, "one state for several"),
        ({}, {"num_heads": 0}, "number of query heads"),
    ],
)
def test_what_is_not_modelled_is_said(spec: dict[str, Any], layer: dict[str, Any], problem: str) -> None:
    spec = dict(spec)
    _, problems = said(
        attention(spec.pop("kind", "FullAttentionSpec"), **spec),
        layer0=SimpleNamespace(num_heads=4, **layer)
        if "num_heads" not in layer
        else SimpleNamespace(**layer),
    )
    (only,) = problems
    assert problem in only
