"""What llmprobe costs a live vLLM server: the same server and load, with the probe off and on in turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from llmprobe.demo.server import VllmServer
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.window_file import WindowFileError, read_window, window_path
from support.agent_cost import AgentCost
from support.gpm import memory_used
from support.journals import Polling, StepLog, live_journals
from support.load import Load, Seen
from support.own_time import OwnTime
from support.paired import Difference, paired
from support.serving import NAME, running_server
from support.switch import switch, wait_known

_SETTLE_SECONDS = 1.0
_SWITCH_SECONDS = 0.5  # about
_POLLED_SECONDS = 1.0  # until a step is in the journal and read from it


@dataclass(frozen=True)
class Plan:
    """What to run."""

    pairs: int
    block_seconds: float
    warm_up_seconds: float
    concurrencies: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    model: Path | None
    flags: Sequence[str]
    env: Mapping[str, str]
    spread_seconds: float  # of the first requests, see `Load`
    most_pairs: int  # as long as `measure` is told that the pairs so far do not decide

    @property
    def seconds(self) -> float:
        """About how long it takes once the server is up, with requests of a second and no more pairs."""
        block = _SWITCH_SECONDS + _SETTLE_SECONDS + self.block_seconds
        pair = 2 * block + _POLLED_SECONDS + 1.0
        return len(self.concurrencies) * (self.warm_up_seconds + self.pairs * pair)


@dataclass(frozen=True)
class Block:
    """One stretch of the load, with the probe off or on."""

    on: bool
    begin_ns: int
    end_ns: int
    agent_cpu_seconds: float
    front_end_cpu_seconds: float
    engine_cpu_seconds: float
    gpu_bytes: int | None  # in use at its end

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end_ns - self.begin_ns) / 1e9


@dataclass(frozen=True)
class VllmCost:
    """One concurrency, pairs so far. Differences in seconds and tokens/s, own time in microseconds."""

    concurrency: int
    pairs: int
    requests: int
    steps_per_second: float
    tpot: Difference
    ttft: Difference
    throughput: Difference
    own: OwnTime
    windows: int  # kernel windows in the blocks with the probe on
    front_end_us_per_step: float
    front_end_cpu: Difference  # seconds of processor time a token, of all its threads
    engine_cpu: Difference  # the same of the thread that runs the worker's steps
    own_thread_us_per_step: float  # processor time of llmprobe's own thread in the worker
    #: Median difference of TPOT between neighbouring blocks of one kind, either way: the machine's own doing
    tpot_alike: float | None
    agent_core_ratio: float
    agent_core_ratio_off: float
    agent_resident_bytes: int
    gpu_memory: Difference | None  # bytes in use on the GPU at the end of a block
    blocks: list[tuple[bool, Seen]]  # in the order of time: whether the probe was on, what the client saw


def measure(plan: Plan, decided: Callable[[VllmCost], bool]) -> Iterator[VllmCost]:
    """Start a server, load it as the plan says, one concurrency after the other; switch, and compare.

    Yields after every pair of blocks what the pairs so far say of this concurrency.

    Args:
        plan: what to run.
        decided: whether what it is given needs no more pairs than the plan has, up to the most it allows.

    Raises:
        RuntimeError: the engine recorded steps while it was off: its methods were not restored. Or it
            recorded none while it was on.
    """
    with running_server(plan.model, plan.flags, plan.env) as server:
        wait_known(server.directory)
        for concurrency in plan.concurrencies:
            tokens = (plan.prompt_tokens, plan.output_tokens)
            load = Load(server.port, NAME, concurrency, *tokens, spread_seconds=plan.spread_seconds)
            steps = StepLog(live_journals(server.directory, "worker")[0])
            agent = AgentCost(server.directory)
            with load, Polling(steps):
                load.wait(plan.warm_up_seconds)
                for taken in _blocks(plan, server, load, agent):
                    load.wait(_POLLED_SECONDS + load.longest_seconds())  # the last requests of the last block
                    cost = _result(concurrency, taken, load, steps, agent.resident_bytes)
                    yield cost
                    if cost.pairs >= plan.pairs and decided(cost):
                        break


@dataclass
class _Taken:
    """The blocks, and what was counted in those with the probe on."""

    blocks: list[Block]
    front_end_ns: int = 0
    own_thread_ns: int = 0
    windows: int = 0


def _blocks(plan: Plan, server: VllmServer, load: Load, agent: AgentCost) -> Iterator[_Taken]:
    """Pairs of blocks, off-on and on-off in turns, so that drift cancels too; after each, all so far."""
    front_ends = live_journals(server.directory, "frontend")
    processes = [psutil.Process(pid) for pid in {reader.facts()["pid"] for reader in front_ends}]
    worker = live_journals(server.directory, "worker")[0]
    pid = worker.facts()["pid"]  # the worker's steps run in its process's first thread
    engine = Path(f"/proc/{pid}/task/{pid}/schedstat")
    taken = _Taken([])
    most = max(plan.pairs, plan.most_pairs)
    for pair in range(most):
        for on in (False, True) if pair % 2 == 0 else (True, False):
            switch(server.directory, on)
            load.wait(_SETTLE_SECONDS)
            own, windows = _own(front_ends, worker), _windows(worker.path)
            used, front, begin = agent.cpu_seconds(), _cpu_seconds(processes), time.monotonic_ns()
            thread = _thread_seconds(engine)
            load.wait(plan.block_seconds)
            end = time.monotonic_ns()
            front, thread = _cpu_seconds(processes) - front, _thread_seconds(engine) - thread
            spent = agent.cpu_seconds() - used
            taken.blocks.append(Block(on, begin, end, spent, front, thread, memory_used()))
            if on:
                front_end_ns, own_thread_ns = _own(front_ends, worker)
                taken.front_end_ns += front_end_ns - own[0]
                taken.own_thread_ns += own_thread_ns - own[1]
                taken.windows += _windows(worker.path) - windows
        print(f"{load.concurrency} at a time: pair {pair + 1} of {most}", file=sys.stderr, flush=True)
        yield taken


def _own(front_ends: list[JournalReader], worker: JournalReader) -> tuple[int, int]:
    """Nanoseconds so far: of the front ends' loops, and of llmprobe's thread in the worker."""
    loops = sum(reader.counters()["own_ns_request"] for reader in front_ends)
    return loops, worker.counters()["thread_ns_step"]


def _thread_seconds(schedstat: Path) -> float:
    """Processor time of one thread, as Linux counts it: in nanoseconds, not in ticks."""
    return int(schedstat.read_text().split()[0]) / 1e9


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(taken.user + taken.system for taken in times))


def _windows(journal: Path) -> int:
    """How many kernel windows the process of a journal has left so far."""
    try:
        return read_window(window_path(journal)).number
    except (OSError, WindowFileError):
        return 0


def _result(concurrency: int, taken: _Taken, load: Load, steps: StepLog, agent_resident: int) -> VllmCost:
    on = [block for block in taken.blocks if block.on]
    off = [block for block in taken.blocks if not block.on]
    if len(steps.own_ns([(block.begin_ns, block.end_ns) for block in off])):
        raise RuntimeError("the engine recorded steps while it was off")
    own = steps.own_ns([(block.begin_ns, block.end_ns) for block in on])
    if not len(own):
        raise RuntimeError("the engine recorded no step while it was on: its log says why")
    seen_off, seen_on = _seen(load, off), _seen(load, on)
    return VllmCost(
        concurrency=concurrency,
        pairs=len(on),
        windows=taken.windows,
        requests=sum(seen.requests for seen in seen_off + seen_on),
        steps_per_second=len(own) / sum(block.seconds for block in on),
        tpot=paired([s.tpot_seconds for s in seen_off], [s.tpot_seconds for s in seen_on]),
        ttft=paired([s.ttft_seconds for s in seen_off], [s.ttft_seconds for s in seen_on]),
        throughput=paired([s.tokens_per_second for s in seen_off], [s.tokens_per_second for s in seen_on]),
        own=OwnTime.of(own),
        front_end_us_per_step=taken.front_end_ns / len(own) / 1e3,
        front_end_cpu=paired(
            _a_token([block.front_end_cpu_seconds for block in off], off, seen_off),
            _a_token([block.front_end_cpu_seconds for block in on], on, seen_on),
        ),
        engine_cpu=paired(
            _a_token([block.engine_cpu_seconds for block in off], off, seen_off),
            _a_token([block.engine_cpu_seconds for block in on], on, seen_on),
        ),
        own_thread_us_per_step=taken.own_thread_ns / len(own) / 1e3,
        tpot_alike=_alike(taken.blocks, _seen(load, taken.blocks)),
        agent_core_ratio=_agent_ratio(on),
        agent_core_ratio_off=_agent_ratio(off),
        agent_resident_bytes=agent_resident,
        gpu_memory=_gpu_memory(off, on),
        blocks=list(zip((block.on for block in taken.blocks), _seen(load, taken.blocks), strict=True)),
    )


def _seen(load: Load, blocks: list[Block]) -> list[Seen]:
    return [load.seen(block.begin_ns, block.end_ns) for block in blocks]


def _gpu_memory(off: list[Block], on: list[Block]) -> Difference | None:
    used = [
        [float(block.gpu_bytes) for block in blocks if block.gpu_bytes is not None] for blocks in (off, on)
    ]
    return paired(*used) if used[0] else None


def _a_token(seconds: list[float], blocks: list[Block], seen: list[Seen]) -> list[float]:
    return [
        taken / block.seconds / found.tokens_per_second
        for taken, block, found in zip(seconds, blocks, seen, strict=True)
    ]


def _alike(blocks: list[Block], seen: list[Seen]) -> float | None:
    """Off-on is followed by on-off: the last block of a pair and the first of the next are of one kind."""
    tpot = [found.tpot_seconds for found in seen]
    differences = [
        abs(tpot[index + 1] - tpot[index])
        for index in range(len(blocks) - 1)
        if blocks[index].on == blocks[index + 1].on
    ]
    return float(np.median(differences)) if differences else None


def _agent_ratio(blocks: list[Block]) -> float:
    return sum(block.agent_cpu_seconds for block in blocks) / sum(block.seconds for block in blocks)
