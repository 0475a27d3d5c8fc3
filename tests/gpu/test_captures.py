"""Captures that an engine makes itself, on a real GPU: torch's profiler and CUPTI see the same loop alike.

The agent's side runs here too: what comes out is what `llmprobe capture` would fetch. Where a test fails,
what the engine's side said is in its output. All limits together are less than six minutes.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.analysis import Report, analyze
from llmprobe.analysis.report import KernelRow
from llmprobe.capture.asking import AskingTool, Options
from llmprobe.capture.tool import ToolError, Worker
from llmprobe.capture.work import finish
from llmprobe.record import kernel_trace
from llmprobe.record.asked import Ask, Paths, Said, read_said, write
from llmprobe.record.asked_capture import AskedCaptures
from llmprobe.record.clocks import step_clock
from llmprobe.record.kernels import KernelWindowThread
from llmprobe.record.layout import Phase
from llmprobe.record.recorder import Recorder
from llmprobe.settings import KernelWindows

from .limits import limited

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYERS = 40
SIZE = 2048  #: a product takes the device longer than the host takes to launch it, with a profiler too
IDLE_SECONDS = 0.002
ID = "20261126-104500-abcdef"


class Engine:
    """A loop of steps on the GPU, recorded with the step clock, that answers asks as an engine does.

    A step is 40 products and 40 sums of bfloat16; between steps the host sleeps.
    """

    def __init__(self, directory: Path) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.clock = step_clock(device)
        self.recorder = Recorder.open(directory, "worker", {"role": "worker", "clock": self.clock.name})
        self.failures: list[Exception] = []
        self.profiler: str | None = None
        self.steps_ns: list[int] = []
        self._over = threading.Event()
        self._a, self._b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self._captures = AskedCaptures(
            self.recorder,
            profiler=lambda: self.profiler,
            failed=lambda where, error: self.failures.append(error),
        )
        targets = (self._run, self._keep_house)
        self._threads = [threading.Thread(target=self._guarded, args=(one,), daemon=True) for one in targets]

    @property
    def worker(self) -> Worker:
        properties = torch.cuda.get_device_properties(0)
        refusals = self.recorder.facts.get("captures", {})
        device = {"name": properties.name, "index": torch.cuda.current_device()}
        return Worker(self.recorder.writer.path, "rank0", 0, refusals, device)

    def start(self) -> None:
        self._captures.look()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(10)
        self._captures.close()
        self.recorder.close(remove=True)

    def describe(self) -> str:
        """What the engine's side knows, for a test that failed."""
        said = read_said(Paths.of(self.recorder.writer.path).said)
        facts = {
            name: self.recorder.facts.get(name) for name in ("captures", "captures_unsafe", "kernel_windows")
        }
        known = {
            "facts": facts,
            "said": None if said is None else dataclasses.asdict(said),
            "steps begun": self.recorder.begun,
            "torch": torch.__version__,
            "GPU": torch.cuda.get_device_name(),
        }
        errors = ["".join(traceback.format_exception(error)) for error in self.failures]
        return "\n".join(["the engine's side:", json.dumps(known, indent=1), *errors])

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:
            self.failures.append(error)

    def _run(self) -> None:
        while not self._over.is_set():
            entered = time.monotonic_ns()
            number = self.recorder.begin(int(Phase.DECODE), 4, entered)
            stamps = self.clock.begin((number, entered))
            if stamps is not None:
                self.clock.mark(stamps, 0)
            x = self._a
            for _ in range(LAYERS):
                x = (x @ self._b).add_(1.0)
            if stamps is not None:
                for index in (1, 2, 3):
                    self.clock.mark(stamps, index)
                self.clock.finish(stamps)
            time.sleep(IDLE_SECONDS)
            self._harvest()
            self.steps_ns.append(time.monotonic_ns() - entered)
        torch.cuda.synchronize()

    def _harvest(self) -> None:
        for done in self.clock.harvest():
            number, entered = done.payload
            self.recorder.step(
                number,
                entered,
                int(Phase.DECODE),
                self.clock.kind,
                0,
                done.times,
                requests=4,
                prefill_requests=0,
                prompt_tokens=0,
                decode_tokens=4,
            )

    def _keep_house(self) -> None:
        while not self._over.wait(0.1):
            self._captures.look()
            self.recorder.publish()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(tmp_path / "shared")
    made.start()
    try:
        wait(lambda: made.recorder.begun > 50)  # the first products set cuBLAS up
        yield made
    finally:
        print(made.describe())  # seen where the test failed
        made.close()
    assert not made.failures, made.describe()


def capture(
    engine: Engine,
    folder: Path,
    tool: str,
    seconds: float = 30.0,
    steps: int | None = None,
    options: Options | None = None,
) -> Report:
    """From the ask to the report, as the agent does it. Raises ToolError."""
    folder.mkdir()
    asking = AskingTool(
        tool,
        ID,
        folder,
        lambda: [engine.worker],
        seconds=seconds,
        steps=steps,
        interrupted=lambda: False,
        options=options,
    )
    try:
        asking.check()
        asking.start(seconds, steps)
        asking.resume()
        while not asking.ended():
            time.sleep(0.05)
        print(tool, "notes", asking.collect())
    except ToolError:
        print(tool, engine.describe())
        raise
    finally:
        asking.forget()
    finish(folder)
    suffix = "json.gz" if tool == "torch" else "npz"
    report = analyze(folder / f"{tool}-rank0.{suffix}")
    print(report.to_text())
    return report


def products(report: Report) -> list[KernelRow]:
    """Of matrices, however this version of cuBLAS calls them."""
    words = ("gemm", "nvjet", "cutlass", "xmma")
    return [row for row in report.kernels if any(word in row.name.lower() for word in words)]


def check(report: Report, steps: int) -> None:
    """What both tools must say about the loop."""
    (gpu,) = report.gpus
    assert report.trust.verdict != "untrusted", report.trust
    (decode,) = [row for row in report.phases if row.part is None]
    assert decode.name == "decode"
    # The first and the last may be cut off, and it ends some 10 ms after the last, or when it gets the lock.
    assert steps - 4 <= decode.steps <= steps + 40
    assert decode.tokens == 4 * decode.steps
    # Of no step may kernels be missing; what runs until the tool has ended belongs to none.
    assert -4 <= sum(row.count for row in products(report)) / LAYERS - decode.steps <= 40
    assert -4 <= gpu.kernels / (2 * LAYERS) - decode.steps <= 40
    assert decode.busy_ratio is not None and decode.sync_gap_ratio is not None
    assert decode.busy_ratio > 0.3
    assert decode.sync_gap_ratio > 0.1  # the host sleeps between steps


@limited(45)
def test_both_tools_see_the_same_loop(engine: Engine, tmp_path: Path) -> None:
    assert engine.recorder.facts["captures"] == {"torch": None, "kernels": None}
    by_kernels = capture(engine, tmp_path / "kernels", "kernels", steps=100)
    by_torch = capture(engine, tmp_path / "torch", "torch", steps=100)
    again = capture(engine, tmp_path / "again", "kernels", steps=100)
    for report in (by_kernels, by_torch, again):
        check(report, 100)
    means = [products(report)[0].mean_seconds for report in (again, by_torch)]
    assert means[1] == pytest.approx(means[0], rel=0.25)  # clocks of the device move meanwhile


@limited(30)
def test_torch_with_operators_on_the_host(engine: Engine, tmp_path: Path) -> None:
    report = capture(engine, tmp_path / "files", "torch", steps=50, options=Options(cpu=True))
    check(report, 50)
    operators = {row.name: row.count for row in report.host_operators}
    steps = next(row.steps for row in report.phases if row.part is None)
    assert -4 <= operators["aten::mm"] / LAYERS - steps <= 40


@limited(30)
def test_seconds_end_it_too_and_long_ones_are_drained(engine: Engine, tmp_path: Path) -> None:
    report = capture(engine, tmp_path / "files", "kernels", seconds=6.0)
    (gpu,) = report.gpus
    assert report.trust.verdict != "untrusted", report.trust
    assert gpu.seconds > 5.5


@limited(20)
def test_more_than_is_held_ends_early_and_loses_nothing_before(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_trace, "MOST_ACTIVITIES", 20_000)
    report = capture(engine, tmp_path / "files", "kernels", seconds=60.0)
    (gpu,) = report.gpus
    assert gpu.kernels >= 20_000
    assert gpu.seconds < 50
    assert not [reason for reason in report.trust.reasons if reason.check == "lost_events"]


@limited(40)
def test_more_than_all_buffers_hold_is_drained_without_a_loss(tmp_path: Path) -> None:
    """400 000 kernels, where the buffers hold 150 000."""
    recorder = Recorder.open(tmp_path, "worker", {"role": "worker", "clock": "cuda"})
    try:
        trace = kernel_trace.KernelTrace(recorder)
        x = torch.zeros(1, device="cuda")
        x.add_(1)
        torch.cuda.synchronize()
        over = threading.Event()

        def launch() -> None:
            for _ in range(400_000):
                x.add_(1)
            torch.cuda.synchronize()
            over.set()

        trace.start()
        thread = threading.Thread(target=launch, daemon=True)
        thread.start()
        while not over.wait(0.05):
            assert trace.look() is None
        thread.join()
        trace.stop()
        window = trace._window
        assert window is not None
        assert (window.dropped, len(window.activities)) == (0, 400_000)
        trace.forget()
    finally:
        recorder.close(remove=True)


@limited(20)
def test_nothing_is_recorded_beside_another_profiler(engine: Engine, tmp_path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):
        for tool in ("torch", "kernels"):
            with pytest.raises(ToolError, match="a torch profiler runs"):
                capture(engine, tmp_path / tool, tool, seconds=1.0)
    engine.profiler = "vLLM's own profiler runs"
    wait(lambda: engine.recorder.facts["captures"]["torch"] == engine.profiler)
    with pytest.raises(ToolError, match="vLLM's own"):
        capture(engine, tmp_path / "vllm", "torch", seconds=1.0)


@limited(40)
def test_captures_and_windows_take_turns(engine: Engine, tmp_path: Path) -> None:
    thread = KernelWindowThread(
        engine.recorder,
        KernelWindows(0.05, 0.1),
        active=lambda: True,
        failed=lambda where, error: engine.failures.append(error),
    )
    thread.start()
    for number in range(3):
        for tool in ("kernels", "torch"):
            check(capture(engine, tmp_path / f"{tool}{number}", tool, steps=60), 60)
    assert engine.recorder.facts["kernel_windows"]["on"] is True


@limited(20)
def test_calling_it_off_leaves_nothing(engine: Engine) -> None:
    paths = Paths.of(engine.recorder.writer.path)
    for number, tool in enumerate(("kernels", "torch")):
        write(paths.ask, Ask(f"{ID[:-1]}{number}", tool, 30.0, None, False, False, time.monotonic_ns()))
        said = wait(lambda: read_said(paths.said))
        assert said.state == "recording"
        paths.ask.unlink()
        wait(lambda: not list(paths.ask.parent.iterdir()))


@limited(60)
def test_the_engine_goes_on_while_a_trace_is_put_together(engine: Engine, tmp_path: Path) -> None:
    """Printed, not judged: how long the longest step was before and during a capture."""
    time.sleep(2)
    before = sorted(engine.steps_ns[-400:])
    engine.steps_ns.clear()
    capture(engine, tmp_path / "first", "torch", seconds=3.0)
    first = sorted(engine.steps_ns)
    engine.steps_ns.clear()
    capture(engine, tmp_path / "second", "torch", seconds=3.0)
    second = sorted(engine.steps_ns)
    for name, steps in (("before", before), ("first", first), ("second", second)):
        middle, longest = steps[len(steps) // 2] / 1e6, steps[-1] / 1e6
        print(f"{name}: {len(steps)} steps, median {middle:.2f} ms, longest {longest:.1f} ms")
    assert len(first) > 100 and len(second) > 100


def wait(ready: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@limited(15)
def test_an_answer_says_what_was_recorded(engine: Engine) -> None:
    paths = Paths.of(engine.recorder.writer.path)
    write(paths.ask, Ask(ID, "kernels", 1.0, None, False, False, time.monotonic_ns()))

    def done() -> Said | None:
        said = read_said(paths.said)
        return said if said is not None and said.state in ("done", "failed") else None

    said = wait(done)
    assert said.state == "done", said
    assert said.steps > 10
    assert paths.result.stat().st_mode & 0o777 == 0o600
    paths.remove()
