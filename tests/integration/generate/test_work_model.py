"""Bytes and FLOPs of a step, for every kind of model: against the saved file, counted products and masks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))

from support.families import FAMILIES, Family  # noqa: E402
from support.work_truth import counted, file_bytes, kv_bytes_per_token  # noqa: E402
from tiny_models import Recording  # noqa: E402

from llmprobe.compute.facts import ATTENTION, ModelFacts  # noqa: E402
from llmprobe.compute.traffic import work  # noqa: E402

pytestmark = pytest.mark.integration

KINDS = [family for family in FAMILIES if not family.engine]  # the others differ in the engine alone


@pytest.mark.parametrize("family", KINDS, ids=lambda family: family.name)
def test_a_steps_bytes_and_flops_are_those_of_the_module(
    family: Family, recording: Recording, tmp_path: Path
) -> None:
    model = family.model()
    model.save_pretrained(tmp_path)
    ids = torch.arange(10, 50).repeat(2, 1)
    with counted(model) as truth:
        model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    said = recording.facts()["model"]
    assert said["unmodelled"] == []
    facts = ModelFacts.from_json(said)

    stored = file_bytes(tmp_path)
    assert facts.weights_bytes == stored["all"]
    assert facts.linear.bytes == stored["linear"]
    assert (facts.experts.bytes if facts.experts else 0) == stored["experts"]
    assert facts.head.bytes == (stored["head"] or stored["embedding"])
    assert sum(group.bytes_per_token for group in facts.kv_groups) == kv_bytes_per_token(
        model.config, 2, latent=True
    )

    flops = work(recording.records().steps, facts)
    assert len(flops) == len(truth) == 4
    for ours, true in zip(flops, truth, strict=True):
        assert ours.sum() - ours[ATTENTION] == pytest.approx(true.linear + true.experts + true.head, rel=0.01)
        assert ours[ATTENTION] == pytest.approx(true.attention, rel=0.01)
