"""What a vLLM worker says it cannot model, so that nobody shows an MBU of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from llmprobe.hooks.vllm import facts  # noqa: E402

from .test_vllm_weights import Model, ParallelLMHead, RoutedExperts  # noqa: E402


def unmodelled(
    monkeypatch: pytest.MonkeyPatch, *parts: Any, data_parallel: int = 1, text: Any = None, **settings: Any
) -> list[str]:
    """Of a model with ``parts`` under an engine with ``settings``."""
    monkeypatch.setattr(facts, "kv_cache", lambda worker, config: ({"groups": []}, []))
    model = Model(lm_head=ParallelLMHead(32, 8), **{f"part{at}": part for at, part in enumerate(parts)})
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text or SimpleNamespace(), dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=data_parallel),
        **settings,
    )
    worker = SimpleNamespace(
        vllm_config=config,
        model_runner=SimpleNamespace(get_model=lambda: model),
        device=torch.device("cpu"),
    )
    found: list[str] = facts.model_facts(worker, None)["unmodelled"]
    return found


def test_a_plain_engine_models_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unmodelled(monkeypatch, RoutedExperts()) == []


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("eagle3", ["drafts: the work of the draft model (eagle3) is not modelled"]),
        ("ngram", []),
        ("suffix", []),
    ],
)
def test_the_work_of_a_draft_model_is_not_modelled(
    monkeypatch: pytest.MonkeyPatch, method: str, said: list[str]
) -> None:
    assert unmodelled(monkeypatch, speculative_config=SimpleNamespace(method=method)) == said


def test_adapters_are_not_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unmodelled(monkeypatch, lora_config=None) == []
    (said,) = unmodelled(monkeypatch, lora_config=SimpleNamespace(max_loras=2))
    assert said.startswith("adapters: ")


def test_experts_that_serve_tokens_of_other_ranks_are_not_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unmodelled(monkeypatch, data_parallel=2) == []  # a dense model's ranks are independent
    (said,) = unmodelled(monkeypatch, RoutedExperts(), data_parallel=2)
    assert said == "experts: those of this rank also serve tokens of other data-parallel ranks"


def test_experts_of_which_no_number_serves_a_token_are_not_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = RoutedExperts()
    del experts.top_k
    (said,) = unmodelled(monkeypatch, experts)
    assert said == "experts: the configuration names no number of experts or experts per token"
    text = SimpleNamespace(num_experts=8, num_experts_per_tok=2)
    assert unmodelled(monkeypatch, experts, text=text) == []
