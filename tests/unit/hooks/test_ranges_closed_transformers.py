"""However a call of ``generate`` ends, its NVTX ranges are closed: real models, a profiler that listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.hooks import transformers as hooks
from llmprobe.hooks.probe import Probe
from llmprobe.record.journal_reader import JournalReader
from llmprobe.settings import Settings

from .listening import Domain, listen

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from .tiny_llama import tiny_llama  # noqa: E402


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Domain:
    return listen(monkeypatch)


@pytest.fixture
def probe(domain: Domain, tmp_path: Path) -> Iterator[Probe]:
    made = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    hooks.install(made)
    yield made
    made.remove_patches()
    made.disarm()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


class At(transformers.LogitsProcessor):  # type: ignore[misc]
    """Does something while the third token is sampled."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._calls += 1
        if self._calls == 3:
            self._act()
        return scores


def generate(model: Any, act: Callable[[], None] = lambda: None) -> None:
    model.generate(
        torch.ones(1, 4, dtype=torch.long),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=transformers.LogitsProcessorList([At(act)]),
    )


def test_steps_are_ranges_of_their_phase_with_their_parts_inside(
    probe: Probe, domain: Domain, model: Any
) -> None:
    inside: list[list[str]] = []
    generate(model)  # the probe arms
    domain.seen.clear()
    generate(model, lambda: inside.append(list(domain.open)))
    assert inside == [["decode", "sample"]]
    assert [name for name, _ in domain.seen] == ["prefill", "forward", "sample"] + [
        "decode",
        "forward",
        "sample",
    ] * 4
    assert [tokens for name, tokens in domain.seen if name in ("prefill", "decode")] == [4, 1, 1, 1, 1]
    assert domain.open == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "sampling"])
def test_a_call_that_raises(
    probe: Probe,
    domain: Domain,
    model: Any,
    where: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate(model)

    def fail(*arguments: Any) -> None:
        assert domain.open
        raise error

    if where == "forward":
        monkeypatch.setattr(model.model.norm, "forward", fail)
    with pytest.raises(error):
        generate(model, fail)
    assert domain.open == []


@pytest.mark.parametrize("how", ["off", "gives up", "disabled"])
@pytest.mark.parametrize("where", ["forward", "sampling"])
def test_the_probe_goes_in_the_middle_of_a_call(
    probe: Probe, domain: Domain, model: Any, how: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(model)
    assert probe.recorder is not None
    reader = JournalReader(probe.recorder.writer.path, probe.recorder.writer)
    went: list[None] = []

    def go() -> None:
        if went:
            return
        went.append(None)
        assert domain.open
        if how == "gives up":
            probe.guard.inert = True
        else:
            probe.enabled = False
            probe.remove_patches()
        if how == "disabled":
            probe.disarm()

    if where == "forward":
        monkeypatch.setattr(model.model.norm, "forward", lambda x: go() or x)
        generate(model)
    else:
        generate(model, go)
    assert domain.open == []
    if how != "disabled":
        load, pending = reader.load(), reader.read().pending
        assert load is not None
        assert load.running == 0, "the call is over, whatever the probe is"
        assert pending["unfinished"].tolist() == [1, 0, 1, 0]


@pytest.mark.swallows
@pytest.mark.parametrize("index", [1, 3])
def test_a_mark_fails_in_the_middle_of_a_call(
    probe: Probe, domain: Domain, model: Any, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(model)
    tracker: Any = next(write.__self__ for write in probe.writers if hasattr(write, "__self__"))
    clock = tracker._program.clock
    mark = clock.mark

    def refuse(stamps: Any, at: int) -> None:
        if at == index:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        mark(stamps, at)

    monkeypatch.setattr(clock, "immediate", False)  # as a device's, whose marks can fail
    monkeypatch.setattr(clock, "mark", refuse)
    generate(model)
    assert probe.guard.errors
    assert domain.open == []
