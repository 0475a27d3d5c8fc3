"""What of a model or its cache cannot be read costs that, and no step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.hooks import transformers as hooks
from llmprobe.hooks import transformers_program, transformers_tracker
from llmprobe.hooks.probe import Probe
from llmprobe.record.journal_reader import JournalReader
from llmprobe.settings import Settings

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from .tiny_llama import tiny_llama  # noqa: E402

TOKENS = 20


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Probe]:
    made = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    hooks.install(made)
    yield made
    made.remove_patches()
    made.disarm()


def steps(probe: Probe, model: Any) -> int:
    model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=TOKENS, eos_token_id=None)
    assert probe.recorder is not None
    reader = JournalReader(probe.recorder.writer.path, probe.recorder.writer)
    try:
        return len(reader.read().steps)
    finally:
        reader.close()


@pytest.mark.swallows
def test_a_cache_that_cannot_be_read(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cache: Any, length: int) -> None:
        raise AttributeError("of a later release")

    monkeypatch.setattr(transformers_tracker, "measure_cache", refuse)
    assert steps(probe, tiny_llama()) == TOKENS
    assert sum(probe.guard.errors.values()) == 1  # it is not tried at every step


def test_without_room_for_a_journal_the_model_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes milliseconds, and the program waits for them."""
    described = []
    monkeypatch.setattr(transformers_program, "describe", lambda model: described.append(model))
    (tmp_path / "file").touch()
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path / "file" / "probe")}))
    hooks.install(probe)
    try:
        made = tiny_llama()
        for _ in range(3):
            made.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, eos_token_id=None)
    finally:
        probe.remove_patches()
    assert probe.recorder is None
    assert len(described) == 1


@pytest.mark.swallows
def test_a_parameter_without_a_shape(probe: Probe) -> None:
    made = tiny_llama()
    made.unused = torch.nn.LazyLinear(4)
    assert steps(probe, made) == TOKENS
    assert probe.recorder is not None
    assert probe.recorder.facts["model"] is None
