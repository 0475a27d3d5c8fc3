"""Hugging Face ``generate`` on a GPU: exact steps, times as torch's own events have them, nothing broken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmprobe
from llmprobe.hooks import session
from llmprobe.record.journal_reader import JournalReader, Records
from llmprobe.record.layout import Clock, Flag, Phase

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from .limits import limited  # noqa: E402
from .watched_engine import Watch, watch_patches  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = "cuda"
PROMPT, TOKENS = 24, 32
#: How ``generate`` decodes. transformers compiles by itself where the cache is static.
MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
}
STEP_PATH = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_has_unfinished_sequences",
)


class Timed(LlamaForCausalLM):
    """A Llama with torch's own events around its forward.

    Not inside ``forward`` itself: that would change what is compiled.
    """

    #: (begin, end) of each forward since it was last emptied.
    events: list[list[Any]]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        self.events.append([self._now()])
        return inputs

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        self.events[-1].append(self._now())
        return super()._update_model_kwargs_for_generation(*args, **kwargs)

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def forward_ns(self) -> np.ndarray:
        """How long each forward took on the device."""
        torch.cuda.synchronize()
        found = [round(begin.elapsed_time(end) * 1e6) for begin, end in self.events]
        self.events.clear()
        return np.array(found)


@pytest.fixture(scope="module")
def model() -> Any:
    """Steps of some milliseconds: eight layers of a thousand columns."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 8192}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 512}
    made = Timed(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    made.events = []
    return made.to(DEVICE, torch.bfloat16).eval()


class Recording:
    """What the probe of this process has recorded."""

    def __init__(self) -> None:
        self._reader: JournalReader | None = None

    @property
    def reader(self) -> JournalReader:
        if self._reader is None:
            probe = session.current()
            assert probe is not None and probe.recorder is not None, "the probe did not arm"
            self._reader = JournalReader(probe.recorder.writer.path, probe.recorder.writer)
        return self._reader

    def steps(self, count: int) -> np.ndarray:
        """What is new; waits a little for as many steps."""
        found: list[Records] = []
        until = time.monotonic() + 3
        while sum(len(records.steps) for records in found) < count and time.monotonic() < until:
            found.append(self.reader.read())
            assert found[-1].lost == 0
            time.sleep(0.05)
        return np.concatenate([records.steps for records in found])


def enable(folder: Path) -> None:
    """As a user does in a program. Kernel windows have tests of their own."""
    llmprobe.enable(dir=str(folder / "probe"), agent="off", server="tests", kernel_windows="off")


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """The probe on; off again afterwards."""
    enable(tmp_path)
    yield Recording()
    probe = session.current()
    assert probe is not None
    errors = dict(probe.guard.errors)
    llmprobe.disable()
    assert errors == {}
    assert session.current() is None


def generate(model: Any, mode: str, seed: int = 3, rows: int = 1) -> Any:
    ids = torch.randint(3, 8000, (rows, PROMPT), generator=torch.Generator().manual_seed(seed))
    return model.generate(
        ids.to(DEVICE),
        attention_mask=torch.ones_like(ids).to(DEVICE),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **MODES[mode],
    )


@limited(240)  # compiling takes most of it
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_steps_tokens_and_phases_are_exact(model: Any, recording: Recording, mode: str, rows: int) -> None:
    for seed in range(2):  # a compiled call is made in the first
        generate(model, mode, seed, rows)
        steps = recording.steps(TOKENS)
        assert [Phase(int(phase)).label for phase in steps["phase"]] == ["prefill"] + ["decode"] * (
            TOKENS - 1
        )
        assert (steps["clock"] == int(Clock.CUDA)).all()
        assert steps["step"].tolist() == list(range(seed * TOKENS + 1, (seed + 1) * TOKENS + 1))
        assert steps["requests"].tolist() == [rows] * TOKENS
        assert steps["prompt_tokens"].tolist() == [rows * PROMPT] + [0] * (TOKENS - 1)
        assert steps["decode_tokens"].tolist() == [0] + [rows] * (TOKENS - 1)
        assert steps["new_tokens"].tolist() == [rows] * TOKENS
        contexts = [rows * (PROMPT + token) for token in range(1, TOKENS)]
        assert steps["context_decode"][1:, 0].tolist() == contexts
    assert recording.reader.facts()["clock"] == "cuda"
    counters = recording.reader.counters()
    assert (counters["requests"], counters["requests_aborted"]) == (2 * rows, 0)
    assert counters["generated_tokens"] == 2 * rows * TOKENS
    assert (counters["errors"], counters["dropped"]) == (0, 0)
    assert hasattr(model, "_compiled_call") or mode != "compiled"


@limited(180)
@pytest.mark.parametrize("mode", MODES)
def test_times_are_in_order_and_only_the_first_gap_is_unknown(
    model: Any, recording: Recording, mode: str
) -> None:
    begin = time.monotonic_ns()
    generate(model, mode)
    steps = recording.steps(TOKENS)
    assert (steps["e0"] < steps["e1"]).all() and (steps["e1"] <= steps["e3"]).all()
    assert (steps["e3"][:-1] <= steps["e0"][1:]).all()
    assert begin <= steps["e0"][0] and steps["e3"][-1] <= time.monotonic_ns()
    restarted = (steps["flags"] & int(Flag.RESTARTED)).astype(bool)
    assert restarted.tolist() == [True] + [False] * (TOKENS - 1)
    assert (steps["own_ns"] > 0).all()


@limited(180)
@pytest.mark.parametrize("mode", MODES)
def test_forwards_take_as_long_as_torch_s_events_say(model: Any, recording: Recording, mode: str) -> None:
    generate(model, mode)
    recording.steps(TOKENS)
    model.events.clear()
    generate(model, mode)
    steps, truth = recording.steps(TOKENS), model.forward_ns()
    assert len(truth) == len(steps) == TOKENS
    ours = (steps["e1"] - steps["e0"])[1:]
    off = np.abs(ours - truth[1:])
    allowed = np.maximum(0.05 * truth[1:], 50_000)
    rest = np.median((steps["e3"] - steps["e1"])[1:]) / 1e3
    print(f"{mode}: torch {np.median(truth[1:]) / 1e3:.1f} µs, the rest of a step {rest:.1f} µs")
    print(f"off by {np.median(off) / 1e3:.1f} µs, at most {off.max() / 1e3:.1f} µs")
    assert np.median(off - allowed) <= 0
    assert np.mean(off <= allowed) > 0.9


@limited(180)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_come_out_the_same_with_and_without_llmprobe(model: Any, tmp_path: Path, mode: str) -> None:
    generate(model, mode)
    without = generate(model, mode)
    enable(tmp_path)
    try:
        with_probe = generate(model, mode)
        assert len(Recording().steps(TOKENS)) == TOKENS
    finally:
        llmprobe.disable()
    assert torch.equal(without, with_probe)


@limited(180)
def test_forwards_are_compiled_no_more_often_with_llmprobe(model: Any, recording: Recording) -> None:
    generate(model, "compiled")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(3):
        generate(model, "compiled", seed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert not torch._dynamo.utils.counters["graph_break"]


@limited(180)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_ours_waits_for_the_device_or_asks_for_memory(
    model: Any, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        monkeypatch.setattr(owner, "synchronize", watch.checked(owner.synchronize))
    with watch_patches(watch, STEP_PATH):
        enable(tmp_path)
        try:
            assert watch.works()
            watch.sections = watch.allocations = 0
            for seed in range(3):
                generate(model, mode, seed)
            assert len(Recording().steps(3 * TOKENS)) == 3 * TOKENS
        finally:
            llmprobe.disable()
    assert watch.sections > 3 * 3 * TOKENS
    assert watch.allocations == 0


def test_what_is_left_behind_is_nothing(model: Any, tmp_path: Path) -> None:
    before: dict[type, dict[str, Callable[..., Any]]] = {
        cls: {name: vars(cls)[name] for name in (*STEP_PATH, "generate") if name in vars(cls)}
        for cls in type(model).__mro__
    }
    generate(model, "dynamic")  # what torch and cuBLAS keep for good is there now
    model.events.clear()
    allocated = torch.cuda.memory_allocated()
    enable(tmp_path)
    generate(model, "dynamic")
    model.events.clear()
    llmprobe.disable()
    for cls, methods in before.items():
        assert {name: vars(cls)[name] for name in methods} == methods
    assert torch.cuda.memory_allocated() == allocated
    assert not list((tmp_path / "probe" / "journals").iterdir())
