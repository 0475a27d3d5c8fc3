"""Tiny random models, and the probe's hooks around them: what the tests of transformers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprobe.hooks.probe import Probe
from llmprobe.record.journal_reader import JournalReader, Load, Records
from llmprobe.record.layout import Phase
from llmprobe.settings import Settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

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


def phases(records: Records) -> list[str]:
    return [Phase(int(phase)).label for phase in records.steps["phase"]]


def column(records: Records, name: str) -> list[int]:
    return [int(value) for value in records.steps[name]]
