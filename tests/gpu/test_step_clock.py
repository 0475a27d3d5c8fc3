"""What the step clock may not do to an engine on a GPU, and whether its times add up to the wall clock's.

A real ``vllm.LLM`` with a tiny model of random weights, driven in its own process by ``watched_engine.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmprobe.collect.collector import Collector
from llmprobe.demo.model import make_model
from llmprobe.record.cuda_clock import CudaClock
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.layout import PHASES

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
HERE = Path(__file__).parent
#: Fresh for long enough that several bursts of steps lie in it: a fast GPU is idle for most of the time.
LOAD_SECONDS, ELAPSED_SECONDS, FRESH_SECONDS = 22.0, 10.0, 3.0
FIRST_STEP_SECONDS = 60.0  #: at most, from when the engine is ready
MOST_SECONDS = 300.0  #: of an engine, its start included: what hangs would hold the machine
ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "bfloat16",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.3,
    "enable_prefix_caching": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]},
    "seconds": LOAD_SECONDS,
}


@dataclass(frozen=True)
class Kind:
    """How an engine runs: options of ``vllm.LLM``, and which of its model runners."""

    options: dict[str, Any]
    runner: str = ""  #: "v1" or "v2"; empty: vLLM's choice

    @property
    def env(self) -> dict[str, str]:
        """As benchmarks/accuracy.py asks for a runner; a vLLM that has but one takes no notice."""
        return {"VLLM_USE_V2_MODEL_RUNNER": "1" if self.runner == "v2" else "0"} if self.runner else {}


#: Eager with whatever vLLM schedules by default; graphs step by step, and with schedules that overlap.
ENGINES = {
    "eager": Kind({"enforce_eager": True}),
    "graphs": Kind({"enforce_eager": False, "async_scheduling": False}),
    "graphs-async-v1": Kind({"enforce_eager": False, "async_scheduling": True}, "v1"),
    "graphs-async-v2": Kind({"enforce_eager": False, "async_scheduling": True}, "v2"),
}


@dataclass
class Ran:
    """What came of one run of ``watched_engine.py``."""

    said: dict[str, Any]
    facts: dict[str, Any]
    counters: dict[str, int]
    #: Seconds by phase and component that the collector added up, over so many seconds of the wall clock.
    elapsed: float
    components: dict[str, dict[str, float]] = field(default_factory=dict)


@pytest.fixture(scope="module", params=list(ENGINES))
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("engine")
    directory = Path(tempfile.mkdtemp(prefix="llmprobe-test-", dir="/dev/shm"))
    model = make_model(folder / "model")
    kind = ENGINES[request.param]
    try:
        with engine(model, {**ENGINE, **kind.options}, directory, folder / "log", **kind.env) as process:
            found = watch(process, directory, folder / "log")
            if kind.runner and found.facts["runner"] != kind.runner:
                pytest.skip(f"vLLM {found.facts['framework_version']} chose runner {found.facts['runner']}")
            yield found
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def engine(
    model: Path, options: dict[str, Any], directory: Path, log: Path, **more: str
) -> Iterator[subprocess.Popen[str]]:
    """The program, with this process's packages and ``more`` in its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
    environment = {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_GPU_SYNC_CHECK": "error",  # vLLM's own, where the release has it
        "LLMPROBE": "1",
        "LLMPROBE_DIR": str(directory),
        "LLMPROBE_AGENT": "off",
        **more,
    }
    command = [sys.executable, str(HERE / "watched_engine.py"), str(model), json.dumps(options)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        limit = threading.Timer(MOST_SECONDS, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def watch(process: subprocess.Popen[str], directory: Path, log: Path) -> Ran:
    """Add the components up while it runs, and read its journal when the load is over."""
    next_line(process, log, "READY")
    collector = Collector(directory)
    before = ahead(collector)
    until = before[1] + ELAPSED_SECONDS
    while time.monotonic() < until:
        collector.tick(final=True)
        time.sleep(0.2)
    after = ahead(collector)
    said = json.loads(next_line(process, log, "JSON "))
    (path,) = (directory / "journals").glob("worker-*.journal")
    reader = JournalReader(path)
    facts, counters = reader.facts(), reader.counters()
    reader.close()
    collector.close()
    assert facts is not None
    return Ran(said, facts, counters, after[1] - before[1], grown(before[2], after[2]))


def next_line(process: subprocess.Popen[str], log: Path, beginning: str) -> str:
    """The rest of the next line that begins so; vLLM prints others."""
    assert process.stdout is not None
    others: list[str] = []
    for line in process.stdout:
        if line.startswith(beginning):
            return line.removeprefix(beginning)
        others.append(line)
    process.wait()
    said = "".join(others)[-4000:]
    pytest.fail(f"the engine ended with {process.returncode}:\n{said}\n{log.read_text()[-4000:]}")


Components = dict[str, dict[str, float]]


def ahead(collector: Collector) -> tuple[float, float, Components]:
    """All components when their sum was furthest ahead of the clock, and that time.

    The engine's steps are written four times a second. Right after that the sum lags by one step. Without
    any step there is no sum yet: it begins with the first one, which may be long after the engine is ready.
    """
    looks: list[tuple[float, float, Components]] = []
    until = time.monotonic() + FIRST_STEP_SECONDS
    while (now := time.monotonic()) < until:
        collector.tick(final=True)
        (view,) = collector.views()
        (rank,) = view.ranks
        times = {phase: dict(parts) for phase, parts in rank.device_time.items()}
        if (so_far := total(times)) > 0:
            until = until if looks else now + FRESH_SECONDS
            looks.append((so_far - now, now, times))
        time.sleep(0.01)
    return max(looks, key=lambda look: look[0])


def total(components: Components) -> float:
    return sum(seconds for parts in components.values() for seconds in parts.values())


def grown(before: Components, after: Components) -> Components:
    return {
        phase: {name: value - before.get(phase, {}).get(name, 0.0) for name, value in parts.items()}
        for phase, parts in after.items()
    }


def test_schedules_overlap_where_they_are_asked_to(ran: Ran, request: pytest.FixtureRequest) -> None:
    kind = ENGINES[request.node.callspec.params["ran"]]
    if "async_scheduling" in kind.options:
        assert ran.facts["flags"].get("async_scheduling") is kind.options["async_scheduling"]


def test_nothing_of_ours_waits_for_the_device(ran: Ran) -> None:
    assert ran.said["control"], "a wait would not have been seen"
    assert ran.said["sections"] > 1000
    assert (ran.said["errors"], ran.said["inert"]) == ({}, False)
    assert ran.counters["errors"] == 0


def test_every_step_is_recorded_by_the_device_s_clock(ran: Ran) -> None:
    assert ran.facts["clock"] == "cuda"
    steps = sum(ran.counters[f"steps_{phase}"] for phase in PHASES)
    assert steps == ran.said["executed"] > 100
    assert ran.counters["dropped"] == 0
    assert ran.counters["step_prompt_tokens"] == ran.said["prompt_tokens"]
    # The first token of a request comes with its prompt. Overlapping schedules may run a step too many.
    least = ran.said["generated_tokens"] * (1 - 1 / 48)
    assert least <= ran.counters["step_decode_tokens"] <= least * 1.05


def test_nothing_of_ours_asks_torch_for_memory(ran: Ran) -> None:
    assert ran.said["allocations"] == 0


def test_components_add_up_to_the_wall_clock(ran: Ran) -> None:
    print(json.dumps(ran.components, indent=1), ran.elapsed)
    assert ran.elapsed >= ELAPSED_SECONDS
    assert total(ran.components) == pytest.approx(ran.elapsed, rel=0.01)
    assert all(seconds >= -1e-6 for parts in ran.components.values() for seconds in parts.values())


_EVENTS = """
import json, os, sys, time
import torch
from llmprobe.record.clocks import step_clock

STEPS = 400
device = torch.device("cuda", 0)
a = torch.randn(512, 512, device=device)
torch.cuda.synchronize()
clock = step_clock(device) if sys.argv[1] == "on" else None
harvested = 0
for step in range(STEPS):
    stamps = clock.begin(step) if clock else None
    if stamps is not None:
        clock.mark(stamps, 0)
    b = a @ a
    if stamps is not None:
        for index in (1, 2, 3):
            clock.mark(stamps, index)
        clock.finish(stamps)
    if clock and step % 50 == 49:
        torch.cuda.synchronize()
        harvested += len(clock.harvest())
torch.cuda.synchronize()
import pynvml
pynvml.nvmlInit()
gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
mine = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu) if p.pid == os.getpid()]
print(json.dumps({
    "harvested": harvested,
    "allocated": torch.cuda.memory_allocated(),
    "most": torch.cuda.max_memory_allocated(),
    "reserved": torch.cuda.memory_reserved(),
    "calls": torch.cuda.memory_stats()["allocation.all.allocated"],
    "nvml_process": mine[0] if mine else None,
    "nvml_device": pynvml.nvmlDeviceGetMemoryInfo(gpu).used,
}))
"""


@pytest.fixture(scope="module")
def without_and_with_events() -> tuple[dict[str, Any], dict[str, Any]]:
    """The same work without and with 400 steps' stamps."""

    def run(condition: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", _EVENTS, condition],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    off, on = run("off"), run("on")
    print("off", off, "\non ", on)
    return off, on


def test_events_take_no_memory_of_torch(
    without_and_with_events: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    off, on = without_and_with_events
    assert (off["harvested"], on["harvested"]) == (0, 400)
    by_torch = ("allocated", "most", "reserved", "calls")
    assert {name: on[name] - off[name] for name in by_torch} == dict.fromkeys(by_torch, 0)


def test_events_take_no_memory_of_the_process(
    without_and_with_events: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    off, on = without_and_with_events
    if on["nvml_process"] is None:
        pytest.skip("NVML lists no process of this namespace; of the whole device others use a part too")
    assert on["nvml_process"] == off["nvml_process"]


@pytest.mark.parametrize("others", [1, 3])
def test_a_step_that_ends_in_a_capture_is_left_out_and_those_beside_it_are_good(others: int) -> None:
    """An event recorded in a capture has no time, in whatever words the driver says it."""
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(256, 256, device=device)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        a @ a  # its library is loaded before the capture
    torch.cuda.synchronize()
    clock = CudaClock(device, 16, in_captures=False)
    graph = torch.cuda.CUDAGraph()

    def step(name: str, end_in: contextlib.AbstractContextManager[Any]) -> None:
        stamps = clock.begin(name)
        assert stamps is not None
        clock.mark(stamps, 0)
        with end_in:
            _ = a @ a
            clock.mark(stamps, 3)
        clock.finish(stamps)

    with torch.cuda.stream(side):
        for number in range(others):
            step(f"before {number}", contextlib.nullcontext())
        step("captured", torch.cuda.graph(graph, stream=side))
        for number in range(others):
            step(f"after {number}", contextlib.nullcontext())
    torch.cuda.synchronize()
    found, said = [], []
    for _ in range(4):
        try:
            found += [stamps.payload for stamps in clock.harvest()]
        except RuntimeError as error:
            said.append(str(error).splitlines()[0])
    assert found == [f"{when} {number}" for when in ("before", "after") for number in range(others)]
    assert clock.dropped == 1
    assert len(said) <= 1, said
