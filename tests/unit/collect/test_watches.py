"""Host watches of live processes: found by their journal's lock, and going on after a restart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmprobe.agent.snapshot import build
from llmprobe.collect.host_cpu import ENGINE_CORE, FRONT_END
from llmprobe.collect.process import Process
from llmprobe.collect.watches import Watches, core_of
from llmprobe.record.journal_reader import JournalReader

WRITER = """
import os, sys, time
from pathlib import Path
from llmprobe.record.directory import prepare_directory
from llmprobe.record.recorder import Recorder
prepare_directory(Path(sys.argv[1]))
engine_core_pid = {"": None, "parent": os.getppid(), "other": 1}[os.environ.get("CORE", "")]
recorders = []
for argument in sys.argv[2:]:
    role, _, core = argument.partition("+")  # a front end, and whether its process holds an engine's core
    inside = {"": False, "core": True, "?": None}[core]
    facts = {"role": role, "started": time.time(), "engine_core_inside": inside}
    if role == "worker":
        facts["engine_core_pid"] = engine_core_pid
    recorders.append(Recorder.open(Path(sys.argv[1]), role, facts))
for recorder in recorders:
    os.write(1, f"{recorder.writer.path}\\n".encode())  # in one piece: others write there too
sys.stdin.read()
for recorder in recorders:
    recorder.close()
"""

#: An engine core: it starts two workers, which may outlive it, computes, and ends when told.
CORE = """
import os, subprocess, sys, threading
with open("/proc/self/comm", "w") as file:
    file.write("EngineCor")
command = [sys.executable, "-c", os.environ["WRITER"], sys.argv[1], "worker"]
workers = [subprocess.Popen(command, stdin=int(os.environ["UNTIL"])) for _ in range(2)]
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), ended.set())).start()
while not ended.is_set():
    sum(range(1000))
"""


def more(child: subprocess.Popen[str]) -> Process:
    """The process by the next journal that it has told of."""
    assert child.stdout is not None
    path = Path(child.stdout.readline().strip())
    return Process(path, JournalReader(path))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    children: list[subprocess.Popen[str]] = []

    def begin(*roles: str) -> tuple[subprocess.Popen[str], Process]:
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), *roles],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child, more(child)

    yield begin
    for child in children:
        child.communicate("", timeout=10)


def look(watches: Watches, process: Process, times: int = 3) -> None:
    for _ in range(times):
        watches.sample([process], time.monotonic_ns())
        time.sleep(0.3)


def test_a_worker_is_watched_by_the_pid_that_holds_its_lock(start) -> None:  # type: ignore[no-untyped-def]
    child, process = start("worker")
    watches = Watches()
    look(watches, process)
    signals, totals = watches.signals(process), watches.totals(process)
    assert signals is not None
    assert totals is not None
    assert signals.cpus_allowed >= 1
    assert totals.cpu_seconds["main"] > 0
    assert watches._watches[process.path].pid == child.pid
    process.close()


def test_totals_go_on_after_a_restart(start) -> None:  # type: ignore[no-untyped-def]
    _, process = start("worker")
    first = Watches()
    look(first, process)
    before = first.totals(process)
    again = Watches()
    again.restore(first.save([process]))
    look(again, process, times=1)
    after = again.totals(process)
    assert before is not None
    assert after is not None
    assert after.cpu_seconds["main"] >= before.cpu_seconds["main"]
    assert after.context_switches["voluntary"] >= before.context_switches["voluntary"]
    process.close()


def test_totals_of_an_engine_go_on_though_its_front_end_is_in_the_same_process(start) -> None:  # type: ignore[no-untyped-def]
    child, front = start("frontend", "worker")
    worker = more(child)
    before = Watches()
    for _ in range(2):
        before.sample([front, worker], time.monotonic_ns())
        time.sleep(0.1)
    saved = before.save([front, worker])
    saved[worker.identity]["other_seconds"] += 1000
    after = Watches()
    after.restore(saved)
    after.sample([front, worker], time.monotonic_ns())
    totals = after.totals(worker)
    assert totals is not None
    assert sum(totals.cpu_seconds.values()) > 1000
    for process in (front, worker):
        process.close()


def test_the_dead_are_not_watched(start) -> None:  # type: ignore[no-untyped-def]
    watches = Watches()
    child, worker = start("worker")
    look(watches, worker)
    child.communicate("", timeout=10)
    worker.poll(time.monotonic_ns())
    look(watches, worker, times=1)
    assert watches.signals(worker) is None
    worker.close()


def test_a_front_end_is_watched_apart_from_engines(start) -> None:  # type: ignore[no-untyped-def]
    _, front = start("frontend")
    _, worker = start("worker")
    watches = Watches()
    for _ in range(3):
        watches.sample([front, worker], time.monotonic_ns())
        time.sleep(0.3)
    assert watches.front_end(front) is not None
    assert watches.front_end(worker) is None
    assert set(watches.save([front, worker])) == {worker.identity}
    for process in (front, worker):
        process.close()


def test_journals_of_one_process_share_a_watch(start) -> None:  # type: ignore[no-untyped-def]
    """A front end has one for each engine; one that is in an engine's process too has no time of its own."""
    child, first = start("frontend", "frontend")
    second = more(child)
    watches = Watches()
    watches.sample([first, second], time.monotonic_ns())
    assert watches._watches[first.path] is watches._watches[second.path]
    child, both = start("frontend", "worker")
    worker = more(child)
    for _ in range(3):
        watches.sample([first, second, both, worker], time.monotonic_ns())
        time.sleep(0.3)
    assert watches.front_end(first) is not None
    assert watches.signals(worker) is not None
    assert watches.front_end(both) is None
    for process in (first, second, both, worker):
        process.close()


@pytest.mark.parametrize("told", ["frontend+core", "frontend+?"])
def test_a_front_end_beside_an_engines_core_is_not_told_apart_though_workers_are_elsewhere(
    start, told
) -> None:  # type: ignore[no-untyped-def]
    """`vllm.LLM` with VLLM_ENABLE_V1_MULTIPROCESSING=0 and two workers: the core spins while these work."""
    _, front = start(told)
    _, worker = start("worker")
    watches = Watches()
    for _ in range(3):
        watches.sample([front, worker], time.monotonic_ns())
        time.sleep(0.3)
    assert watches.signals(front) is not None
    assert watches.front_end(front) is None
    for process in (front, worker):
        process.close()


@pytest.fixture
def start_core(tmp_path: Path) -> Iterator[object]:
    children: list[subprocess.Popen[str]] = []
    until, held = os.pipe()

    def begin(fact: str) -> tuple[subprocess.Popen[str], list[Process]]:
        child = subprocess.Popen(
            [sys.executable, "-c", CORE, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CORE": fact, "WRITER": WRITER, "UNTIL": str(until)},
            pass_fds=(until,),
        )
        children.append(child)
        return child, [more(child), more(child)]

    yield begin
    os.close(held)
    os.close(until)
    for child in children:
        child.communicate("end\n", timeout=10)


def test_an_engine_core_without_a_journal_is_watched_as_part_of_each_of_its_workers(start_core) -> None:  # type: ignore[no-untyped-def]
    child, workers = start_core("parent")
    watches = Watches()
    for _ in range(3):
        watches.sample(workers, time.monotonic_ns())
        time.sleep(0.3)
    for worker in workers:
        signals, totals = watches.signals(worker), watches.totals(worker)
        assert signals is not None
        assert next(thread.name for thread in signals.threads if thread.of_core) == "EngineCor"
        assert signals.cpu_ratio > 0
        assert totals == watches._watches[worker.path].totals()  # its own: those of ranks are added up
    assert {watch.pid for watch in watches._cores.values()} == {child.pid}
    assert len(set(map(id, watches._cores.values()))) == 1
    # What it leaves behind goes to another parent, which is no core.
    child.kill()
    child.wait(10)
    watches.sample(workers, time.monotonic_ns())
    again = Watches()
    for watched in (watches, again):
        for _ in range(3):
            watched.sample(workers, time.monotonic_ns())
            time.sleep(0.3)
        for worker in workers:
            signals = watched.signals(worker)
            assert signals is not None
            assert not signals.core_apart
    assert not again._cores
    for worker in workers:
        worker.close()


def test_a_parent_that_is_not_the_one_that_a_worker_tells_of_is_no_core(start_core) -> None:  # type: ignore[no-untyped-def]
    for fact in ("", "other"):
        _, workers = start_core(fact)
        watches = Watches()
        watches.sample(workers, time.monotonic_ns())
        assert len(watches._watches) == 2
        assert not watches._cores
        for worker in workers:
            worker.close()


@pytest.mark.parametrize(("own", "found"), [("NSpid:\t70\t7\n", 70), ("NSpid:\t70\n", None), ("", None)])
def test_a_core_in_a_namespace_of_its_own_is_told_by_what_it_calls_itself(
    tmp_path: Path, own: str, found: int | None
) -> None:
    for pid, parent in ((80, 70), (70, 60)):
        (tmp_path / f"proc/{pid}").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/stat").write_text(f"{pid} (a ) b) S {parent} " + "0 " * 50)
    (tmp_path / "proc/70/status").write_text(f"Name:\tVLLM\n{own}")
    assert core_of(80, {"engine_core_pid": 7}, tmp_path) == found
    assert core_of(80, {"engine_core_pid": 70}, tmp_path) == 70
    assert core_of(81, {"engine_core_pid": 70}, tmp_path) is None


def test_cpu_time_beside_ranks_is_that_of_front_ends_and_of_cores(start, start_core) -> None:  # type: ignore[no-untyped-def]
    front_process, front = start("frontend")
    core, workers = start_core("parent")
    child, inside = start("frontend", "worker")
    beside = more(child)
    watches = Watches()
    everything = [front, *workers, inside, beside]
    watches.sample(everything, time.monotonic_ns())
    used, ranks = watches.beside_ranks(everything)
    assert {(name.partition("-")[0], of.kind) for name, of in used.items()} == {
        (str(front_process.pid), FRONT_END),
        (str(core.pid), ENGINE_CORE),
    }
    assert all(of.seconds > 0 for of in used.values())
    assert len(ranks) == 3
    assert f"{child.pid}-" in " ".join(ranks)
    for process in everything:
        process.close()


def test_a_core_beside_its_front_end_is_part_of_it(start_core) -> None:  # type: ignore[no-untyped-def]
    """`vllm.LLM` with VLLM_ENABLE_V1_MULTIPROCESSING=0 and two workers."""
    _, workers = start_core("parent")
    watches = Watches()
    watches.sample(workers, time.monotonic_ns())
    front = SimpleNamespace(
        path=Path("front"), role="frontend", alive=True, facts={"engine_core_inside": False}
    )
    watches._watches[front.path] = watches._cores[workers[0].path]
    for order in ([front, *workers], [*workers, front]):
        used, _ = watches.beside_ranks(order)
        assert [of.kind for of in used.values()] == [FRONT_END]
    watches.sample([front, *workers], time.monotonic_ns())
    assert watches.front_end(front) is None
    for process in workers:
        process.close()


def test_a_snapshot_sees_the_core_too(start_core, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, workers = start_core("parent")
    saved = build(tmp_path, no_status="nobody answers", host_seconds=0.6)
    assert len(saved["processes"]) == 2
    for process in saved["processes"]:
        assert process["host"]["core_apart"]
        assert "EngineCor" in {thread["name"] for thread in process["host"]["threads"] if thread["of_core"]}
    for process in workers:
        process.close()
