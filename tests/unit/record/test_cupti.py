"""Records as CUPTI lays them out, decoded; the library itself is scripted here and real in tests/gpu."""

from __future__ import annotations

import ctypes
import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.record import cupti, cupti_records
from llmprobe.record.cupti import BUFFER_BYTES, MOST_BUFFERS, _Buffers
from llmprobe.record.cupti_memory import Recorded
from llmprobe.record.cupti_records import COPY, KERNEL, SET, Names, Records

#: CUpti_ActivityKind → bytes of a record in CUPTI 13; 17 (overhead) is a kind that nobody asked for.
SIZES = {10: 216, 1: 96, 2: 88, 17: 56}
KIND = {10: KERNEL, 1: COPY, 2: SET}
MESSAGES = [ctypes.create_string_buffer(name) for name in (b"_Z4gemmv", b"flash")]


class Library:
    """``cuptiActivityGetNextRecord`` as documented: from a record to the one after it."""

    def __init__(self) -> None:
        self.asked = 0

    def cuptiActivityGetNextRecord(self, buffer: Any, valid: Any, record: Any) -> int:
        self.asked += 1
        at = record._obj.value - buffer.value
        kind = ctypes.c_uint32.from_address(record._obj.value).value
        if at + SIZES[kind] >= valid.value:
            return 12  # CUPTI_ERROR_MAX_LIMIT_REACHED
        record._obj.value += SIZES[kind]
        return 0


def buffer_of(kinds: list[int]) -> tuple[np.ndarray, int]:
    memory = np.full(sum(SIZES[kind] for kind in kinds) + 8, 10, dtype=np.uint8)  # looks like kernels inside
    at = 0
    for index, kind in enumerate(kinds):
        record = memory[at : at + SIZES[kind]]
        record[:4].view("<u4")[0] = kind
        if kind in KIND:
            offsets = cupti_records._OFFSETS[KIND[kind]]
            record[offsets["begin"] :][:8].view("<u8")[0] = 1000 + index
            record[offsets["end"] :][:8].view("<u8")[0] = 2000 + index
            record[offsets["device"] :][:4].view("<u4")[0] = 3
            record[offsets["stream"] :][:4].view("<u4")[0] = 7
            if kind == 10:
                record[offsets["name"] :][:8].view("<u8")[0] = ctypes.addressof(MESSAGES[index % 2])
            if kind == 1:
                record[offsets["copy_kind"]] = 1
        at += SIZES[kind]
    return memory, at


@given(st.lists(st.sampled_from(sorted(SIZES)), max_size=60))
def test_every_record_of_any_mixture_is_found_once(kinds: list[int]) -> None:
    memory, valid = buffer_of(kinds)
    library, names = Library(), Names()
    found = Records(library).decode(memory, valid, names)
    rows = np.concatenate(found) if found else np.zeros(0, cupti_records.ACTIVITY)
    wanted = [(index, kind) for index, kind in enumerate(kinds) if kind in KIND]
    assert rows["begin"].tolist() == [1000 + index for index, _ in wanted]
    assert rows["end"].tolist() == [2000 + index for index, _ in wanted]
    assert rows["kind"].tolist() == [KIND[kind] for _, kind in wanted]
    assert set(rows["device"].tolist()) <= {3} and set(rows["stream"].tolist()) <= {7}
    said = [names.names[name] for name in rows["name"]]
    assert said == [
        {1: "memcpy HtoD", 2: "memset"}.get(kind) or MESSAGES[index % 2].value.decode()
        for index, kind in wanted
    ]
    # Once a kind, and once more for the last record, behind which nothing comes.
    assert library.asked <= len(set(kinds)) + 1


def test_a_buffer_that_ends_in_a_torn_record_gives_the_whole_ones() -> None:
    memory, valid = buffer_of([10, 10, 10])
    found = Records(Library()).decode(memory, valid - 50, Names())
    assert sum(map(len, found)) == 2


def test_memory_is_bounded_and_a_full_window_says_so() -> None:
    buffers = _Buffers()
    given_out = []
    for _ in range(MOST_BUFFERS + 2):
        buffer, size, most = (ctypes.c_void_p * 1)(), (ctypes.c_size_t * 1)(), (ctypes.c_size_t * 1)(9)
        buffers.requested(buffer, size, most)
        assert most[0] == 0
        given_out.append((buffer[0], size[0]))
    assert [size for _, size in given_out] == [BUFFER_BYTES] * MOST_BUFFERS + [0, 0]
    assert len({address for address, _ in given_out[:MOST_BUFFERS]}) == MOST_BUFFERS
    assert all(address % 8 == 0 for address, _ in given_out[:MOST_BUFFERS])
    assert (buffers.refused, buffers.left) == (2, 0)
    for address, _ in given_out[:MOST_BUFFERS]:
        buffers.completed(None, 0, address, BUFFER_BYTES, 100)
    buffers.completed(None, 0, 12345, BUFFER_BYTES, 100)  # somebody else's
    taken = buffers.take()
    assert (len(taken), buffers.left) == (MOST_BUFFERS, 0)  # not to be overwritten while they are read
    for address, _, _ in taken:
        buffers.free(address)
    assert buffers.left == MOST_BUFFERS
    buffers.reset()
    assert (buffers.refused, buffers.take()) == (0, [])


def test_the_library_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 42    /usr/lib/libcuda.so.1\n"
        "7f02-7f03 r-xp 00000000 08:01 43    /opt/my torch/lib/libcupti.so.13\n"
        "7f04-7f05 rw-p 00000000 00:00 0 \n"
    )
    assert cupti.loaded_library(maps) == "/opt/my torch/lib/libcupti.so.13"
    maps.write_text("7f00-7f01 r-xp 00000000 08:01 42    /usr/lib/libcuda.so.1\n")
    assert cupti.loaded_library(maps) is None
    assert cupti.loaded_library(tmp_path / "none") is None


@pytest.mark.parametrize(
    "name", ["CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID"]
)
def test_an_injected_tool_is_noticed(name: str) -> None:
    assert cupti.injected({name: "/x", "PATH": "/bin"}) == f"{name} is set"
    assert cupti.injected({"PATH": "/bin", name: ""}) is None


@pytest.mark.parametrize(
    ("variables", "library", "said"),
    [
        ({}, "/usr/lib/libcudart.so.13", None),
        ({}, "/opt/torch/lib/libcupti.so.13", None),
        ({"CUDA_INJECTION64_PATH": ""}, "/usr/lib/libcudart.so.13", None),
        ({"CUDA_INJECTION64_PATH": "/x.so"}, "", "CUDA_INJECTION64_PATH is set"),
        ({"NSYS_PROFILING_SESSION_ID": "7"}, "", "NSYS_PROFILING_SESSION_ID is set"),
        ({}, "/opt/nsys/target-linux-x64/libToolsInjection64.so", "libToolsInjection64.so is loaded"),
        ({}, "/opt/ncu/libcuda-injection.so", "libcuda-injection.so is loaded"),
        ({}, "/home/me/my-injection.so", None),
    ],
)
def test_tools_that_were_injected_are_named(
    tmp_path: Path, variables: dict[str, str], library: str, said: str | None
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(f"7f0000000000-7f0000001000 r-xp 00000000 08:01 1234    {library}\n[vdso]\n")
    assert cupti.injected(variables, maps) == said
    assert cupti.injected(variables, tmp_path / "missing") == (said if variables else None)


class Refusing:
    """A library that records, and fails at one call."""

    def __init__(self, failing: str) -> None:
        self._failing = failing
        self.enabled: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuptiGetVersion":
                arguments[0]._obj.value = 26
            if name == self._failing and (name != "cuptiActivityEnable" or self.enabled):
                return 999
            if name == "cuptiActivityEnable":
                self.enabled.add(arguments[0].value)
            if name == "cuptiActivityDisable":
                self.enabled.discard(arguments[0].value)
            return 0

        return call


@pytest.mark.parametrize("failing", ["cuptiActivityEnable", "cuptiGetTimestamp"])
def test_what_did_not_open_records_nothing(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Refusing(failing)
    monkeypatch.setattr(cupti, "loaded_library", lambda: "libcupti.so")
    monkeypatch.setattr(cupti.ctypes, "CDLL", lambda path: library)
    made = cupti.Cupti()
    with pytest.raises(cupti.CuptiError, match=failing):
        made.open()
    assert library.enabled == set()


class Recording(Refusing):
    """Hands over one buffer of kernels as it is flushed; of each its begin and end from then, or zeros."""

    def __init__(
        self,
        times: list[tuple[int, int]],
        stamps: Callable[[], int] = time.monotonic_ns,
        says: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``stamps``: the clock of the kernels' times. ``says``: the one that it says it has."""
        super().__init__("")
        self._times = times
        self._stamps, self._says = stamps, says
        self._next = Library().cuptiActivityGetNextRecord

    def __getattr__(self, name: str) -> Any:
        if name == "cuptiActivityGetNextRecord":
            return self._next
        if name == "cuptiActivityRegisterCallbacks":
            return self._keep
        if name == "cuptiGetTimestamp":
            return self._now
        if name == "cuptiActivityFlushAll":
            return self._flush
        return super().__getattr__(name)

    def _keep(self, requested: Any, completed: Any) -> int:
        self._requested, self._completed = requested, completed
        return 0

    def _now(self, stamp: Any) -> int:
        stamp._obj.value = self._says()
        return 0

    def _flush(self, flags: Any) -> int:
        records, length = buffer_of([10] * len(self._times))
        offsets, now = cupti_records._OFFSETS[KERNEL], self._stamps()
        for index, (begin, end) in enumerate(self._times):
            for name, value in (("begin", begin), ("end", end)):
                at = index * SIZES[10] + offsets[name]
                records[at : at + 8].view("<u8")[0] = now + value if value else 0
        buffer, size, most = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        self._requested(ctypes.pointer(buffer), ctypes.pointer(size), ctypes.pointer(most))
        if buffer.value is None:
            return 0
        ctypes.memmove(buffer.value or 0, records.ctypes.data, length)
        self._completed(None, 0, buffer.value, size.value, length)
        return 0


def recorded(
    times: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, *clocks: Callable[[], int]
) -> cupti_records.Window:
    monkeypatch.setattr(cupti, "loaded_library", lambda: "libcupti.so")
    monkeypatch.setattr(cupti.ctypes, "CDLL", lambda path: Recording(times, *clocks))
    made = cupti.Cupti()
    made.open()
    return made.close()


def test_kernels_that_had_not_run_are_left_out_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that runs ahead leaves more of them than have run."""
    before = Recorded.kernels
    window = recorded([(10, 20), (30, 40), *[(0, 0)] * 6], monkeypatch)
    assert (len(window.activities), window.dropped, Recorded.kernels - before) == (2, 0, 8)


def test_a_window_nearly_all_of_whose_kernels_have_no_times_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the rest of its time would be told to be launch bubbles."""
    assert recorded([(10, 20), *[(0, 0)] * 18, (60, 50)], monkeypatch).dropped == 19


def ticks() -> int:
    return 3 * time.monotonic_ns()


def test_kernels_are_seen_though_cupti_does_not_stamp_them_by_its_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after two of torch's recordings; they were far behind the window, and all of it seemed idle."""
    before = time.monotonic_ns()
    window = recorded([(1000, 2000), (3000, 9000)], monkeypatch, time.time_ns, ticks)
    lengths = window.activities["end"] - window.activities["begin"]
    assert (lengths.tolist(), window.dropped) == ([1000, 6000], 0)
    assert before <= window.activities["begin"].min() <= time.monotonic_ns() + 1_000_000


@pytest.mark.parametrize(("stamps", "says"), [(lambda: 5 * 10**18, ticks), (ticks, time.time_ns)])
def test_a_window_whose_kernels_are_stamped_by_no_clock_says_nothing(
    monkeypatch: pytest.MonkeyPatch, stamps: Callable[[], int], says: Callable[[], int]
) -> None:
    """Neither far behind it, nor far before."""
    window = recorded([(10, 20), (30, 40)], monkeypatch, stamps, says)
    assert (len(window.activities), window.dropped) == (0, 2)


def test_what_cannot_be_read_costs_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupti, "loaded_library", lambda: "libcupti.so")
    monkeypatch.setattr(cupti.ctypes, "CDLL", lambda path: Recording([(10, 20)]))
    made = cupti.Cupti()
    decode = made._records.decode
    for failing in (True, False):

        def decoded(*arguments: Any, failing: bool = failing) -> Any:
            if failing:
                raise MemoryError("no room")
            return decode(*arguments)

        monkeypatch.setattr(made._records, "decode", decoded)
        made.open()
        if failing:
            with pytest.raises(MemoryError):
                made.close()
        else:
            assert len(made.close().activities) == 1
        assert made._buffers.held == 0


def test_what_cupti_was_given_lives_as_long_as_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls back, and writes, also after the last recording: into memory of ours, or of nobody."""
    library = Recording([(10, 20)])
    monkeypatch.setattr(cupti, "loaded_library", lambda: "libcupti.so")
    monkeypatch.setattr(cupti.ctypes, "CDLL", lambda path: library)
    monkeypatch.setattr(cupti._Process, "cupti", None)
    one = cupti.of_process()
    one.open()
    one.close()
    registered = [weakref.ref(call) for call in (library._requested, library._completed)]
    buffer, size, most = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    library._requested(ctypes.pointer(buffer), ctypes.pointer(size), ctypes.pointer(most))
    del one, library._requested, library._completed
    gc.collect()
    assert [call() is None for call in registered] == [False, False]
    assert cupti.of_process()._buffers.held == 1
    ctypes.memset(buffer.value or 0, 7, size.value)
    registered[1]()(None, 0, buffer.value, size.value, 0)
    other = cupti.of_process()
    other.open()
    assert (other._buffers.held, other.close().dropped) == (0, 0)


def ask(buffers: cupti._Buffers) -> int:
    buffer, size, most = (ctypes.c_void_p * 1)(), (ctypes.c_size_t * 1)(), (ctypes.c_size_t * 1)()
    buffers.requested(buffer, size, most)
    return int(buffer[0] or 0)


def test_buffers_that_do_not_come_back_are_no_loss_for_a_while() -> None:
    buffers = cupti._Buffers()
    for lost in range(cupti.MOST_BUFFERS + 1):
        buffers.reset()
        assert (buffers.held, buffers.left) == (lost, cupti.MOST_BUFFERS)
        assert ask(buffers)
    buffers.reset()
    assert buffers.left == cupti.MOST_BUFFERS - 1
    while address := ask(buffers):
        last = address
    assert (len(buffers._made), buffers.refused) == (2 * cupti.MOST_BUFFERS, 1)
    buffers.completed(None, 0, last, cupti.BUFFER_BYTES, 0)
    buffers.completed(None, 0, 12345, cupti.BUFFER_BYTES, 0)  # another profiler's
    buffers.reset()
    assert buffers.left == 1
    assert ask(buffers) == last


def test_nothing_opens_without_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupti, "loaded_library", lambda: "libcupti.so")
    monkeypatch.setattr(cupti.ctypes, "CDLL", lambda path: Recording([(10, 20)]))
    made = cupti.Cupti()
    for _ in range(2):
        made._buffers.reset()
        while ask(made._buffers):
            pass
    with pytest.raises(cupti.CuptiError, match="gave back none of 16 buffers"):
        made.open()
    held = list(made._buffers._made)[:3]

    def flush(*arguments: Any) -> None:
        if arguments[0] == "cuptiActivityFlushAll":
            while held:
                made._buffers.completed(None, 0, held.pop(), BUFFER_BYTES, 0)

    monkeypatch.setattr(made, "_check", flush)  # who is asked for them gives some back
    made.open()
    assert made._buffers.left == 3


def test_without_memory_cupti_is_refused_and_nothing_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise MemoryError

    buffers = cupti._Buffers()
    monkeypatch.setattr(cupti.np, "empty", full)
    assert (ask(buffers), buffers.refused) == (0, 1)
