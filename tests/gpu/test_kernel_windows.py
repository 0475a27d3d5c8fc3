"""Kernel windows on a real GPU, held against torch's own profiler and against work of a known size."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmprobe.compute.intervals import union
from llmprobe.record.cupti import Cupti, of_process
from llmprobe.record.cupti_records import COPY, KERNEL, SET, Window
from llmprobe.record.kernels import KernelWindowThread, profiling
from llmprobe.record.recorder import Recorder
from llmprobe.record.window_file import read_window, window_path
from llmprobe.settings import KernelWindows

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYERS = 20


@pytest.fixture(scope="module")
def cupti() -> Cupti:
    torch.cuda.init()
    return of_process()


@pytest.fixture(scope="module")
def work() -> Callable[[], object]:
    """20 products, 20 sums, one copy to the device and one set."""
    a, b = (torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    host, target = torch.ones(1 << 16).pin_memory(), torch.empty(1 << 16, device="cuda")

    def once() -> None:
        x = a
        for _ in range(LAYERS):
            x = (x @ b).add_(1.0)
        target.copy_(host, non_blocking=True)
        target.zero_()

    once()
    torch.cuda.synchronize()
    return once


def window_of(cupti: Cupti, work: Callable[[], object], times: int = 1) -> Window:
    cupti.open()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return cupti.close()


def busy_ns(window: Window) -> int:
    rows = np.stack((window.activities["begin"], window.activities["end"]), axis=1)
    busy = union(rows)
    return int((busy[:, 1] - busy[:, 0]).sum())


def test_every_kernel_is_seen_once_at_its_time(cupti: Cupti, work: Callable[[], object]) -> None:
    for _ in range(3):  # a second window must be as good as the first
        window = window_of(cupti, work, 10)
        rows = window.activities
        names = np.array(window.names)[rows["name"]]
        assert window.dropped == 0
        assert (rows["begin"] >= window.begin_ns).all() and (rows["end"] <= window.end_ns).all()
        assert (rows["end"] > rows["begin"]).all()
        products = sum("gemm" in name or "nvjet" in name or "cutlass" in name for name in names.tolist())
        assert products == 10 * LAYERS
        assert (rows["kind"] == COPY).sum() == 10 and "memcpy HtoD" in window.names
        # torch fills with a memset or with a kernel
        assert (rows["kind"] == KERNEL).sum() + (rows["kind"] == SET).sum() == 10 * (2 * LAYERS + 1)
        assert set(rows["device"].tolist()) == {0}


def test_graphs_show_their_kernels(cupti: Cupti, work: Callable[[], object]) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    plain, replayed = window_of(cupti, work, 5), window_of(cupti, graph.replay, 5)
    assert (replayed.activities["kind"] == KERNEL).sum() == (plain.activities["kind"] == KERNEL).sum()


def test_busy_time_agrees_with_torchs_profiler(cupti: Cupti, work: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity, profile

    before = window_of(cupti, work, 50)
    with profile(activities=[ProfilerActivity.CUDA]) as theirs:
        assert profiling()
        for _ in range(50):
            work()
        torch.cuda.synchronize()
    assert not profiling()
    after = window_of(cupti, work, 50)  # windows work again once a profiler has run
    kernels = [event for event in theirs.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(event.device_time_total for event in kernels) * 1e3
    assert len(after.activities) == len(before.activities) == len(kernels)
    assert busy_ns(before) == pytest.approx(total, rel=0.05)
    assert busy_ns(after) == pytest.approx(total, rel=0.05)


def test_a_kernel_of_known_length_lies_where_the_host_saw_it(cupti: Cupti) -> None:
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    cupti.open()
    begin = time.monotonic_ns()
    torch.cuda._sleep(20_000_000)  # some 10 ms
    torch.cuda.synchronize()
    end = time.monotonic_ns()
    window = cupti.close()
    (row,) = window.activities
    assert begin <= row["begin"] < row["end"] <= end
    assert (end - begin) - (row["end"] - row["begin"]) < 2_000_000  # launch and wake-up, of some 10 ms


def test_a_window_that_overflows_says_so_and_the_next_is_whole(cupti: Cupti) -> None:
    x = torch.zeros(1, device="cuda")

    def many() -> None:
        for _ in range(200_000):
            x.add_(1)

    cupti.open()
    many()
    torch.cuda.synchronize()
    assert cupti.filling
    assert cupti.close().dropped > 0
    window = window_of(cupti, lambda: x.add_(1), 100)
    assert (window.dropped, len(window.activities)) == (0, 100)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    opened = Recorder.open(tmp_path, "worker", {"clock": "cuda"})
    yield opened
    opened.close(remove=True)


def test_the_thread_leaves_windows_while_steps_run(recorder: Recorder, work: Callable[[], object]) -> None:
    failures: list[Exception] = []
    thread = KernelWindowThread(
        recorder,
        KernelWindows(0.02, 0.1),
        active=lambda: True,
        failed=lambda where, error: failures.append(error),
    )
    thread.start()
    path = window_path(recorder.writer.path)
    numbers = set()
    end = time.monotonic() + 20
    while len(numbers) < 5 and time.monotonic() < end:
        recorder.begin(1, 1, time.monotonic_ns())
        work()
        torch.cuda.synchronize()
        if path.exists():
            seen = read_window(path)
            numbers.add(seen.number)
            assert len(seen.window.activities) > LAYERS
    assert len(numbers) >= 5
    assert recorder.facts["kernel_windows"]["on"] is True
    assert failures == []
    recorder.close(remove=True)
    thread.join(5)
    assert not thread.is_alive()
    assert list(path.parent.iterdir()) == []


def test_no_window_opens_after_a_death_in_one(recorder: Recorder) -> None:
    folder = window_path(recorder.writer.path).parent
    folder.mkdir()
    (folder / "worker-1.open").touch()
    thread = KernelWindowThread(
        recorder, KernelWindows(0.02, 0.1), active=lambda: True, failed=lambda where, error: None
    )
    thread.run()
    assert recorder.facts["kernel_windows"]["on"] is False
    assert "worker-1.open" in recorder.facts["kernel_windows"]["reason"]


def test_windows_beside_a_busy_thread_lose_nothing(cupti: Cupti, work: Callable[[], object]) -> None:
    """As in an engine: kernels are launched by another thread than the one that opens windows."""
    stop = threading.Event()
    launched: list[int] = []

    def engine() -> None:
        while not stop.is_set():
            work()
            torch.cuda.synchronize()
            launched.append(time.monotonic_ns())

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        for _ in range(20):
            cupti.open()
            time.sleep(0.02)
            window = cupti.close()
            done = [at for at in launched if window.begin_ns <= at <= window.end_ns]
            whole = len(done) - 1  # the first may have begun before the window
            rows = window.activities
            between = rows[(rows["begin"] >= done[0]) & (rows["end"] <= done[-1])]
            assert len(between) == whole * (2 * LAYERS + 2)
    finally:
        stop.set()
        thread.join()
