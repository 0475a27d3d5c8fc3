"""What is written much at once lies in the file as if written one by one, and no kill tears it."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.record import journal, layout
from llmprobe.record.journal import JournalWriter
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.recorder import Recorder

SLOTS = 5
SIZE = layout.RING_OFFSET + SLOTS * layout.RECORD_SIZE
TTFT = layout.HISTOGRAM_INDEX["time_to_first_token"]

durations = st.integers(0, 2 * 10**12)
observed = st.lists(
    st.tuples(st.integers(0, len(layout.HISTOGRAMS) - 1), durations | st.integers(10**7, 10**7 + 10**6)),
    max_size=40,
)


def ended(number: int) -> tuple[Any, ...]:
    return (number, int(layout.Kind.REQUEST), 0, 0, 0, 100 + number, *range(9))


def contents(writer: JournalWriter) -> bytes:
    """All but the header, whose id is random."""
    return writer.path.read_bytes()[layout.HEADER_SIZE :]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def make(folder: Path, name: str) -> JournalWriter:
    return JournalWriter.create(folder / f"{name}.journal", {}, SIZE)


@given(st.lists(st.tuples(observed, st.integers(0, 2 * SLOTS + 1)), max_size=4))
def test_the_file_is_the_same_to_the_byte(
    folder: Path, rounds: list[tuple[list[tuple[int, int]], int]]
) -> None:
    one_by_one, batch = make(folder, "one"), make(folder, "batch")
    try:
        for times, records in rounds:
            rows = [ended(number) for number in range(records)]
            for row in rows:
                one_by_one.append(layout.REQUEST_PACK, *row)
            batch.append_packed(
                [layout.REQUEST_PACK.pack(number, *row) for number, row in enumerate(rows, 7)]
            )
            for histogram, nanoseconds in times:
                batch.observe(histogram, nanoseconds)
                one_by_one.observe(histogram, nanoseconds)
                one_by_one.flush_steps()
                one_by_one.flush_requests()
            one_by_one._updates = batch._updates
            for writer in (one_by_one, batch):
                writer.flush_steps()
                writer.flush_requests()
        assert contents(one_by_one) == contents(batch)
    finally:
        one_by_one.close(remove=True)
        batch.close(remove=True)


class Killed(Exception):
    """The writer is gone."""


@given(st.data())
def test_a_writer_killed_at_any_byte_of_a_batch_leaves_every_count_as_it_was_or_as_it_will_be(
    folder: Path, data: st.DataObject
) -> None:
    writer = make(folder, "killed")
    reader = JournalReader(writer.path, writer)
    patch = pytest.MonkeyPatch()
    try:
        first = data.draw(st.lists(durations, max_size=20))
        then = data.draw(st.lists(durations, min_size=1, max_size=20))
        for nanoseconds in first:
            writer.observe(TTFT, nanoseconds)
        writer.flush_requests()
        before = reader.histogram("time_to_first_token").copy()
        left = data.draw(st.integers(0, 4096))

        def pwrite(fd: int, payload: Any, offset: int) -> int:
            nonlocal left
            some = bytes(payload)[:left]
            left -= len(some)
            os.pwrite(fd, some, offset)
            if len(some) < len(payload):
                raise Killed
            return len(some)

        patch.setattr(journal, "_pwrite", pwrite)
        after = before.copy()
        for nanoseconds in then:
            writer.observe(TTFT, nanoseconds)
            after[layout.bucket_of(nanoseconds)] += 1
        try:
            writer.flush_requests()
        except Killed:
            pass
        else:
            assert (reader.histogram("time_to_first_token") == after).all()
        found = reader.histogram("time_to_first_token")
        assert ((found == before) | (found == after)).all()
        patch.undo()
        writer.flush_requests()  # had it only failed: nothing is lost
        assert (reader.histogram("time_to_first_token") == after).all()
    finally:
        patch.undo()
        reader.close()
        writer.close(remove=True)


def test_a_quarter_second_of_a_loaded_front_end_takes_few_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder.open(tmp_path, "frontend", {})
    writes: list[int] = []

    def pwrite(fd: int, payload: Any, offset: int) -> int:
        writes.append(len(payload))
        return os.pwrite(fd, payload, offset)

    monkeypatch.setattr(journal, "_pwrite", pwrite)
    for number in range(25):
        milliseconds = 10 + number / 5
        recorder.tokens(
            inter_token_ns={round(milliseconds * 1e6): 128},
            first_token_ns=(round(milliseconds * 30e6),),
            later=True,
        )
        recorder.request(number, round(milliseconds * 1e8), tpot_ns=round(milliseconds * 1e6), later=True)
    recorder.publish()
    reader = JournalReader(recorder.writer.path, recorder.writer)
    try:
        assert len(writes) <= 6  # the records, the totals, and one for each histogram
        assert reader.counters()["requests"] == len(reader.read().requests) == 25
        assert int(reader.histogram("time_per_output_token").sum()) == 25
    finally:
        reader.close()
        recorder.close(remove=True)


def test_cells_are_written_once_and_little_around_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = make(tmp_path, "cells")
    writes: list[int] = []

    def pwrite(fd: int, payload: Any, offset: int) -> int:
        if layout.HISTOGRAMS_OFFSET <= offset < layout.RING_OFFSET:
            writes.append(len(payload))
        return os.pwrite(fd, payload, offset)

    monkeypatch.setattr(journal, "_pwrite", pwrite)
    try:
        writer.observe(TTFT, 10**3)
        writer.observe(TTFT, 10**12)
        writer.flush_requests()
        assert writes == [layout.CELL_PAIR] * 2  # nothing of what lies far between
        writer.flush_requests()
        assert len(writes) == 2
    finally:
        writer.close(remove=True)


def test_requests_left_for_later_are_written_before_one_that_is_not(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path, "frontend", {})
    reader = JournalReader(recorder.writer.path, recorder.writer)
    try:
        recorder.request(1, 100, later=True)
        assert (reader.counters()["requests"], len(reader.read().requests)) == (0, 0)
        recorder.request(2, 100)
        assert reader.counters()["requests"] == 2
        assert [int(row["time"]) for row in reader.read().requests] == [1, 2]
        recorder.request(3, 100, later=True)
        recorder.pending(4, 0)
        records = reader.read()
        assert [int(row["time"]) for row in records.requests] == [3]
        assert records.pending["seq"][0] > records.requests["seq"][0]
        for number in range(1000):  # nobody publishes
            recorder.request(number, 100, later=True)
        assert reader.counters()["requests"] > 500
    finally:
        reader.close()
        recorder.close(remove=True)


def test_a_request_that_does_not_fit_into_its_record_costs_none_of_the_others(tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path, "frontend", {})
    reader = JournalReader(recorder.writer.path, recorder.writer)
    try:
        recorder.request(1, 100, later=True)
        with pytest.raises(struct.error):
            recorder.request(2, 100, prompt_tokens=-1, later=True)
        recorder.request(3, 100, later=True)
        recorder.publish()
        assert [int(row["time"]) for row in reader.read().requests] == [1, 3]
        assert reader.counters()["requests"] == 2
    finally:
        reader.close()
        recorder.close(remove=True)
