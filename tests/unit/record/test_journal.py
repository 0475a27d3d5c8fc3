from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.record import journal as journal_module
from llmprobe.record import layout
from llmprobe.record.events import CountedStep
from llmprobe.record.journal import JournalError, JournalWriter
from llmprobe.record.journal_reader import JournalReader

SMALL = layout.RING_OFFSET + 8 * layout.RECORD_SIZE


def make(path: Path, size: int = SMALL) -> JournalWriter:
    return JournalWriter.create(path, {"role": "worker"}, size)


def request(writer: JournalWriter, number: int) -> None:
    writer.append(
        layout.REQUEST_PACK, number, int(layout.Kind.REQUEST), 0, 0, 0, *[number] * 4, *[number] * 6
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.journal"


def test_facts_come_back_and_the_newest_win(path: Path) -> None:
    writer = make(path)
    reader = JournalReader(path)
    assert reader.facts() == {"role": "worker"}
    for number in range(5):
        writer.set_facts({"number": number})
        assert reader.facts() == {"number": number}


def test_facts_that_changed_are_seen_and_damaged_ones_fall_back(path: Path) -> None:
    writer = make(path)
    reader = JournalReader(path, writer)
    for number in range(4):
        writer.set_facts({"number": number})
        assert reader.facts() == {"number": number}
        assert reader.facts() == {"number": number}
    writer.set_facts({"number": 4})
    slot = layout.FACTS_OFFSET + writer._facts_writes % 2 * layout.FACTS_SLOT
    whole = os.pread(writer.fileno(), 64, slot)
    os.pwrite(writer.fileno(), b"torn", slot + 12)
    assert reader.facts() == {"number": 3}
    os.pwrite(writer.fileno(), whole, slot)
    assert reader.facts() == {"number": 4}


def test_facts_hold_text_that_can_be_passed_on(path: Path) -> None:
    """Names of files need not be UTF-8, and one server's name stands on a page with all others."""
    writer = make(path)
    writer.set_facts({"model_name": os.fsdecode(b"modell\xff"), "server": "größer\n"})
    reader = JournalReader(path, writer)
    facts = reader.facts()
    assert facts == {"model_name": "modell?", "server": "größer\n"}
    assert json.dumps(facts, ensure_ascii=False).encode()
    reader.close()
    writer.close()


def test_facts_that_do_not_fit_are_refused_by_name(path: Path) -> None:
    with pytest.raises(JournalError, match="more than fit"):
        make(path).set_facts({"text": "x" * 70_000})


def test_records_come_back_once_and_in_order(path: Path) -> None:
    writer = make(path)
    reader = JournalReader(path)
    for number in range(5):
        request(writer, number)
    assert reader.read().requests["duration"].tolist() == [0, 1, 2, 3, 4]
    assert len(reader.read().requests) == 0
    request(writer, 5)
    assert reader.read().requests["duration"].tolist() == [5]


def test_a_slow_reader_is_told_how_many_records_it_lost(path: Path) -> None:
    writer = make(path)
    reader = JournalReader(path)
    for number in range(21):
        request(writer, number)
    records = reader.read()
    assert records.lost == 21 - 8
    assert records.requests["duration"].tolist() == list(range(13, 21))


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_every_record_is_read_or_counted_as_lost(bursts: list[int], slots: int) -> None:
    path = Path(f"/dev/shm/llmprobe-test-{os.getpid()}-{os.urandom(4).hex()}.journal")
    writer = make(path, layout.RING_OFFSET + slots * layout.RECORD_SIZE)
    try:
        reader = JournalReader(path)
        seen: list[int] = []
        lost = written = 0
        for burst in bursts:
            for _ in range(burst):
                request(writer, written)
                written += 1
            records = reader.read()
            lost += records.lost
            seen += records.requests["duration"].tolist()
        assert len(seen) + lost == written
        assert seen == sorted(set(seen))
        assert seen[-1:] == ([written - 1] if written else [])
    finally:
        writer.close(remove=True)


class Torn(Exception):
    """The writer dies in the middle of a write."""


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_writer_killed_at_any_byte_leaves_a_readable_journal(data: st.DataObject) -> None:
    """Of every write only a prefix reaches the file, once; readers see the state before it or after it."""
    path = Path(f"/dev/shm/llmprobe-test-{os.getpid()}-{os.urandom(4).hex()}.journal")
    writer = make(path)
    count = data.draw(st.integers(1, 30), label="operations before the last")
    try:
        for number in range(count):
            one_of_everything(writer, number)
        reader = JournalReader(path)
        before = snapshot(reader)
        nth = data.draw(st.integers(0, 6), label="write that is cut")
        cut = data.draw(st.integers(0, 511), label="bytes of it that arrive")
        real = os.pwrite
        calls = 0

        def torn(fd: int, payload: bytes, offset: int) -> int:
            nonlocal calls
            calls += 1
            if calls - 1 == nth:
                if cut:
                    real(fd, payload[:cut], offset)
                if cut < len(payload):
                    raise Torn
                return len(payload)
            return real(fd, payload, offset)

        saved = journal_module._pwrite
        journal_module._pwrite = torn
        try:
            one_of_everything(writer, count)
        except Torn:
            pass
        finally:
            journal_module._pwrite = saved
        after = snapshot(reader)
        fresh = snapshot(JournalReader(path))
        for name in before:
            assert after[name] in (before[name], expected(name, count + 1)), name
            assert fresh[name] in (before[name], expected(name, count + 1)), name
        records = JournalReader(path).read()
        values = records.requests["duration"].tolist()
        assert values == sorted(values)
        assert set(values) <= set(range(count + 1))
        assert len(values) >= min(count, 8) - 1  # at most the slot that was being written is gone
    finally:
        writer.close(remove=True)


def one_of_everything(writer: JournalWriter, number: int) -> None:
    request(writer, number)
    writer.progress(number + 1, number, number, 1, 1)
    writer.load(number, number + 1, 0, 0.5, 0, True, False)
    writer.counters[layout.COUNTER_INDEX["requests"]] += 1
    writer.observe(0, 5_000_000)
    writer.flush_requests()
    writer.counters[layout.COUNTER_INDEX["steps_decode"]] += 1
    writer.flush_steps()


def snapshot(reader: JournalReader) -> dict[str, int]:
    counters = reader.counters()
    progress, load = reader.progress(), reader.load()
    return {
        "progress": progress.begun if progress else 0,
        "load": load.running if load else 0,
        "requests": counters["requests"],
        "steps": counters["steps_decode"],
        "histogram": int(reader.histogram("time_to_first_token").sum()),
    }


def expected(name: str, operations: int) -> int:
    return operations


@given(st.integers(0, layout.RECORD_SIZE - 1), st.integers(1, 255), st.integers(0, 7))
@settings(deadline=None, max_examples=100)
def test_no_damaged_record_is_ever_accepted(byte: int, flip: int, slot: int) -> None:
    path = Path(f"/dev/shm/llmprobe-test-{os.getpid()}-{os.urandom(4).hex()}.journal")
    writer = make(path)
    try:
        for number in range(8):
            request(writer, number)
        at = layout.RING_OFFSET + slot * layout.RECORD_SIZE + byte
        old = os.pread(writer.fileno(), 1, at)[0]
        os.pwrite(writer.fileno(), bytes([old ^ flip]), at)
        reader = JournalReader(path)
        values = reader.read().requests["duration"].tolist()
        assert slot not in values
        assert set(values) <= set(range(8)) - {slot}
    finally:
        writer.close(remove=True)


@given(st.integers(0, layout.CELL_PAIR - 1), st.integers(1, 255))
@settings(deadline=None, max_examples=60)
def test_no_damaged_histogram_cell_is_counted(byte: int, flip: int) -> None:
    path = Path(f"/dev/shm/llmprobe-test-{os.getpid()}-{os.urandom(4).hex()}.journal")
    writer = make(path)
    try:
        writer.observe(0, 5_000_000, times=3)
        writer.flush_requests()
        at = layout.HISTOGRAMS_OFFSET + layout.bucket_of(5_000_000) * layout.CELL_PAIR + byte
        old = os.pread(writer.fileno(), 1, at)[0]
        os.pwrite(writer.fileno(), bytes([old ^ flip]), at)
        assert int(JournalReader(path).histogram("time_to_first_token").sum()) == 3  # the other copy
    finally:
        writer.close(remove=True)


def test_totals_count_steps_that_were_not_published_yet(path: Path) -> None:
    from llmprobe.record.recorder import Recorder

    recorder = Recorder(make(path, layout.DEFAULT_SIZE), {})
    reader = JournalReader(path)
    for number in range(10):
        step = recorder.begin(1, 1, number)
        recorder.step_counted(step, 0, 1, 0, 0, (10, 20, 20, 1_000_010), (1, 0, 0, 1, 0, 1), (0,) * 16, 7)
        if number == 4:
            recorder.publish()
        reader.read()
        counters = reader.counters()
        assert counters["steps_decode"] == counters["step_decode_tokens"] == number + 1
        assert counters["span_ns_decode"] == (number + 1) * 1_000_000
        assert counters["own_ns_step"] == 7 * (number + 1)
        assert int(reader.histogram("step_decode").sum()) == number + 1


def test_what_is_left_for_later_is_published_with_the_rest_or_with_the_next_request(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprobe.record import recorder as module
    from llmprobe.record.recorder import Recorder

    recorder = Recorder(make(path, layout.DEFAULT_SIZE), {})
    reader = JournalReader(path)

    def shown() -> tuple[int, int, int]:
        load = reader.load()
        gaps = int(reader.histogram("inter_token_latency").sum())
        return load.running if load else 0, reader.counters()["generated_tokens"], gaps

    recorder.load(1, 0, later=True)
    monkeypatch.setattr(module, "_LOAD_EVERY_NS", 1 << 62)  # all that follows is a moment
    recorder.load(3, 0, later=True)
    recorder.tokens(0, 3, inter_token_ns={1_000_000: 3}, later=True)
    assert shown() == (1, 0, 0)
    recorder.publish()
    assert shown() == (3, 3, 3)
    recorder.load(2, 0, later=True)
    recorder.tokens(0, 2, inter_token_ns={1_000_000: 1, 2_000_000: 1}, later=True)
    recorder.request(10, 10, generated_tokens=5)
    assert shown() == (3, 5, 5)
    recorder.status(armed=False, inert=False)
    assert shown() == (2, 5, 5)


def test_tokens_of_a_program_leave_its_steps_to_be_published_in_order(path: Path) -> None:
    from llmprobe.record.recorder import Recorder

    recorder = Recorder(make(path, layout.DEFAULT_SIZE), {})
    reader = JournalReader(path)
    for number in range(5):
        step = recorder.begin(1, 1, number)
        recorder.step_counted(step, 0, 1, 0, 0, (10, 20, 20, 1_000_010), (1, 0, 0, 1, 0, 1), (0,) * 16, 0)
        recorder.tokens(0, 1, inter_token_ns={1_000_000: 1})
        reader.read()
        assert int(reader.histogram("step_decode").sum()) == number + 1


def test_totals_survive_a_ring_that_came_round_unread(path: Path) -> None:
    from llmprobe.record.recorder import Recorder

    recorder = Recorder(make(path), {})
    for number in range(100):
        step = recorder.begin(1, 1, number)
        recorder.step_counted(step, 0, 1, 0, 0, (10, 20, 20, 1_000_010), (1, 0, 0, 1, 0, 1), (0,) * 16, 0)
    recorder.publish()
    reader = JournalReader(path)
    assert reader.read().lost == 92
    assert reader.counters()["steps_decode"] == 100
    assert int(reader.histogram("step_decode").sum()) == 100


@given(st.integers(0, 10**13))
@settings(max_examples=300)
def test_a_bucket_bounds_its_duration_within_one_percent(nanoseconds: int) -> None:
    bounds = layout.bucket_bounds_seconds()
    bucket = layout.bucket_of(nanoseconds)
    assert nanoseconds / 1e9 <= bounds[bucket] * (1 + 1e-9)
    if 0 < bucket < layout.BUCKETS - 1:
        assert nanoseconds / 1e9 > bounds[bucket - 1] * (1 - 1e-9)
        assert bounds[bucket] / bounds[bucket - 1] <= 1.0101


def test_liveness_ends_with_the_writer_however_it_dies(path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from llmprobe.record.journal import JournalWriter
        writer = JournalWriter.create(Path(sys.argv[1]), {})
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        reader = JournalReader(path)
        assert reader.alive()
        child.kill()
        child.wait()
        assert not reader.alive()


def test_reading_ones_own_journal_does_not_drop_its_lock(path: Path) -> None:
    writer = make(path)
    reader = JournalReader(path, writer)
    reader.read()
    reader.close()
    probe = (
        "import sys; from pathlib import Path; from llmprobe.record.journal_reader import JournalReader;"
        "sys.exit(0 if JournalReader(Path(sys.argv[1])).alive() else 1)"
    )
    assert subprocess.run([sys.executable, "-c", probe, str(path)], check=False).returncode == 0


def test_the_file_has_its_full_size_before_the_first_record(path: Path) -> None:
    make(path, layout.DEFAULT_SIZE)
    assert path.stat().st_size == layout.DEFAULT_SIZE
    assert path.stat().st_blocks * 512 >= layout.DEFAULT_SIZE
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["empty", "not a journal", "short"])
def test_what_is_not_a_whole_journal_is_refused(path: Path, damage: str) -> None:
    if damage == "short":
        make(path).close()
        os.truncate(path, layout.RING_OFFSET)
    else:
        path.write_bytes(b"" if damage == "empty" else b"x" * 4096)
    with pytest.raises(JournalError, match=r"journal|cut short"):
        JournalReader(path)


def test_a_read_only_directory_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "a.journal"
    with pytest.raises(JournalError, match="No such file"):
        JournalWriter.create(missing, {})


def test_layout_and_packing_agree() -> None:
    """What a struct writes, the numpy type of the same record reads."""
    step = layout.STEP_PACK.pack(1, 2, 3, 4, 5, 6, *range(7, 12), *range(12, 20), 20, 21, *range(22, 38))
    row = np.frombuffer(step + struct.pack("<I", 99), dtype=layout.STEP)[0]
    assert (row["seq"], row["time"], row["kind"], row["phase"], row["clock"], row["flags"]) == (
        1,
        2,
        3,
        4,
        5,
        6,
    )
    assert [int(row[name]) for name in ("step", "e0", "e1", "e2", "e3")] == list(range(7, 12))
    assert [int(row[n]) for n in ("requests", "prefill_requests", "own_ns", "encode_ns")] == [12, 13, 19, 21]
    assert row["context_prefill"].tolist() == list(range(22, 26))
    assert row["pairs_decode"].tolist() == list(range(34, 38))
    assert row["crc"] == 99


def test_a_step_histogram_never_runs_backwards_or_counts_twice_while_it_is_being_published(
    path: Path,
) -> None:
    """Readers look at every moment between the writes of one publication."""
    from llmprobe.record.recorder import Recorder

    recorder = Recorder(make(path, layout.DEFAULT_SIZE), {})
    reader = JournalReader(path)
    shown: list[int] = []
    written = 0

    def look() -> None:
        reader.read()
        shown.append(int(reader.histogram("step_decode").sum()))
        assert shown[-1] <= written
        assert shown == sorted(shown)

    real = journal_module._pwrite

    def looking(fd: int, payload: bytes, offset: int) -> int:
        look()
        count = real(fd, payload, offset)
        look()
        return count

    for number in range(40):
        step = recorder.begin(1, 1, number)
        span = 1_000_000 * (1 + number % 7)
        written += 1
        recorder.step_counted(step, 0, 1, 0, 0, (10, 20, 20, 10 + span), (1, 0, 0, 1, 0, 1), (0,) * 16, 0)
        if number % 9 == 8:
            journal_module._pwrite = looking
            try:
                recorder.publish()
            finally:
                journal_module._pwrite = real
    look()
    assert shown[-1] == 40


_COUNTS, _ATTENTION = (1, 0, 3, 1, 0, 1), tuple(range(16))


def _counted(number: int, e0: int, span: int, phase: int, flags: int, own_ns: int) -> CountedStep:
    times = (e0, e0 + 1, e0 + 1, e0 + span)
    return CountedStep(number, number, phase, 2, flags, times, _COUNTS, _ATTENTION, own_ns, encode_ns=5)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 5_000_000),  # span
            st.integers(0, 9_000_000),  # gap
            st.integers(0, len(layout.PHASES) - 1),
            st.sampled_from([0, int(layout.Flag.RESTARTED)]),
            st.sampled_from([7, 1 << 40]),
        ),
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_several_steps_at_once_are_those_steps(rows: list[tuple[int, ...]], at_once: int) -> None:
    """As if each had been written by itself, also where the ring comes round."""
    from llmprobe.record.recorder import Recorder

    steps, end = [], 1000
    for number, (span, gap, phase, flags, own_ns) in enumerate(rows, 1):
        steps.append(_counted(number, end + gap, span, phase, flags, own_ns))
        end += gap + span
    with tempfile.TemporaryDirectory() as folder:
        seen = []
        for name in ("one", "several"):
            path = Path(folder) / name
            recorder = Recorder(make(path), {})
            reader = JournalReader(path)
            for first in range(0, len(steps), at_once):
                some = steps[first : first + at_once]
                if name == "several":
                    recorder.steps(some, [step.packed() for step in some])
                else:
                    for step in some:
                        recorder.step_counted(*step[:10], encode_ns=step.encode_ns)
            recorder.publish()
            histograms = {
                of: reader.histogram(of).tolist() for of in layout.HISTOGRAMS if of.startswith("step_")
            }
            seen.append(
                (repr(reader.read().steps.tolist()), reader.counters(), reader.progress(), histograms)
            )
            reader.close()
            recorder.close()
    assert seen[0] == seen[1]


def test_several_steps_take_one_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprobe.record.recorder import Recorder

    recorder = Recorder(make(path, layout.DEFAULT_SIZE), {})
    written: list[int] = []
    real = journal_module._pwrite

    def counting(fd: int, payload: bytes, offset: int) -> int:
        written.append(offset)
        return real(fd, payload, offset)

    monkeypatch.setattr(journal_module, "_pwrite", counting)
    steps = [_counted(number, number * 1000, 900, 1, 0, 7) for number in range(1, 28)]
    recorder.steps(steps, [step.packed() for step in steps])
    assert len(written) == 1
    assert len(JournalReader(path).read().steps) == 27


def test_of_several_steps_those_that_were_written_count_where_the_others_fail(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the ring comes round there are two writes, and here the second one fails."""
    from llmprobe.record.recorder import Recorder

    recorder = Recorder(make(path), {})
    real, written = journal_module._pwrite, list[int]()

    def once(fd: int, payload: bytes, offset: int) -> int:
        written.append(offset)
        if len(written) == 2:
            raise OSError(28, "no room")
        return real(fd, payload, offset)

    first = [_counted(number, number * 1000, 900, 1, 0, 7) for number in range(1, 6)]
    recorder.steps(first, [step.packed() for step in first])
    monkeypatch.setattr(journal_module, "_pwrite", once)
    more = [_counted(number, number * 1000, 900, 1, 0, 7) for number in range(6, 12)]
    with pytest.raises(OSError, match="no room"):
        recorder.steps(more, [step.packed() for step in more])
    monkeypatch.setattr(journal_module, "_pwrite", real)
    recorder.publish()
    reader = JournalReader(path)
    assert reader.read().steps["step"].tolist() == list(range(1, 9))
    assert reader.counters()["steps_decode"] == int(reader.histogram("step_decode").sum()) == 8
