"""The hooks around ``generate``, installed for one test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import Recording, reraise

from llmprobe.hooks import transformers as hooks

torch = pytest.importorskip("torch")

from transformers.generation.utils import GenerationMixin  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
