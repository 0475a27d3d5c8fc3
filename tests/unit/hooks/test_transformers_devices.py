"""Which device's clock times a model, where a program has several devices or one that no clock is for."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.hooks import transformers_model, transformers_program
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.transformers_tracker import Tracker
from llmprobe.record.clock import HostClock
from llmprobe.settings import Settings

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from .tiny_llama import tiny_llama_on as model  # noqa: E402


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA devices that a clock was made for, each one that works here."""
    made: list[str] = []
    real = transformers_program.step_clock

    def step_clock(device: Any) -> Any:
        if device.type != "cuda":
            return real(device)
        made.append(str(device))
        return HostClock()

    monkeypatch.setattr(transformers_program, "step_clock", step_clock)
    for module in (transformers_program, transformers_model):
        monkeypatch.setattr(module, "device_facts", lambda device: {"type": device.type, "name": str(device)})
    return made


@pytest.fixture
def tracker(tmp_path: Path, clocks: list[str]) -> Iterator[Tracker]:
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path)}))
    yield Tracker(probe)
    probe.disarm()


def followed(tracker: Tracker, model: Any) -> bool:
    """Whether a call of ``generate`` is."""
    call = tracker.enter(model, (torch.ones(1, 4, dtype=torch.long),), {})
    if call is None:
        return False
    tracker.pop(call)
    tracker.leave(call, None, True)
    return True


def facts(tracker: Tracker) -> dict[str, Any]:
    recorder = tracker._probe.recorder
    assert recorder is not None
    return recorder.facts


def test_a_model_on_another_gpu_is_not_timed_by_the_stream_of_the_first(
    tracker: Tracker, clocks: list[str]
) -> None:
    first, second = model("cuda:0"), model("cuda:1")
    assert [followed(tracker, one) for one in (first, second, first, second)] == [True, False, True, False]
    assert clocks == ["cuda:0"]
    assert facts(tracker)["notes"] == ["a model on cuda:1 is not followed beside the one on cuda:0"]
    assert facts(tracker)["model"] is not None  # of the first, which alone is followed


def test_a_model_that_comes_after_another_has_the_clock_of_its_own_gpu(
    tracker: Tracker, clocks: list[str]
) -> None:
    first = model("cuda:0")
    assert followed(tracker, first)
    del first
    gc.collect()
    second = model("cuda:1")
    assert followed(tracker, second)
    assert clocks == ["cuda:0", "cuda:1"]
    assert facts(tracker)["device"]["name"] == "cuda:1"
    second.at = torch.device("cuda:2")  # moved
    assert followed(tracker, second)
    assert clocks == ["cuda:0", "cuda:1", "cuda:2"]


def test_where_a_device_has_no_clock_nothing_is_recorded_and_that_is_said_once(
    tracker: Tracker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the host's clock a device that works on its own would seem to wait for the host."""
    other = model("xpu:0")
    monkeypatch.setattr(logging.getLogger("llmprobe"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="llmprobe"):
        assert [followed(tracker, other) for _ in range(3)] == [False] * 3
    assert tracker._probe.recorder is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("steps on xpu:0 are not recorded")


def test_a_model_that_moves_to_a_device_without_a_clock_is_left_out_until_it_is_back(
    tracker: Tracker,
) -> None:
    moving = model("cpu")
    assert followed(tracker, moving)
    moving.at = torch.device("xpu:0")
    assert not followed(tracker, moving)
    assert facts(tracker)["device"]["name"] == "cpu"
    assert facts(tracker)["notes"][0].startswith("steps on xpu:0 are not recorded")
    moving.at = torch.device("cpu")
    assert followed(tracker, moving)


def test_weights_that_change_between_calls_are_described_anew(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `model.half()`, at once; and what leaves the model's type as it is, at the end of a call."""
    now = 10**12
    monkeypatch.setattr(transformers_program, "_now", lambda: now)
    changing = model("cpu")

    def described() -> tuple[int, str]:
        assert followed(tracker, changing)
        said = facts(tracker)["model"]
        return said["weights_bytes"], said["compute_dtype"]

    whole, dtype = described()
    assert dtype == facts(tracker)["flags"]["dtype"] == "float32"
    changing.half()
    assert described() == (whole // 2, "float16")
    assert facts(tracker)["flags"]["dtype"] == "float16"
    changing.resize_token_embeddings(2 * 97, mean_resizing=False)
    assert described() == (whole // 2, "float16")  # not looked at each time
    now += 3 * 10**9
    more = 2 * 97 * 32 * 2  # of the table and of the head, in two bytes each
    assert described() == (whole // 2 + more, "float16")


def test_a_model_whose_weights_take_long_to_look_at_is_looked_at_seldom(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of experts, each with parameters of its own: no more than a thousandth of the time."""
    now, looks = 10**12, 0
    monkeypatch.setattr(transformers_program, "_now", lambda: now)
    many = model("cpu")
    assert followed(tracker, many)

    def slowly(of: Any) -> int | None:
        nonlocal now, looks
        now, looks = now + 10**8, looks + 1
        return tracker._program._described_bytes if tracker._program is not None else None

    monkeypatch.setattr(transformers_program, "parameter_bytes", slowly)
    for _ in range(190):
        now += 10**9
        assert followed(tracker, many)
    assert looks == 2
