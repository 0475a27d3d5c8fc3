"""Host signals, from files copied from a real machine (tests/data/host) and from this very process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.collect import cgroup, procfs
from llmprobe.collect.host import MAIN, MOST_LABELS, OTHER, HostTotals, HostWatch, lock_holder
from llmprobe.collect.host_threads import thread_label
from llmprobe.record.journal import JournalWriter
from llmprobe.record.journal_reader import JournalReader

DATA = Path(__file__).parents[2] / "data" / "host"
PID = 10948
BETWEEN_NS = 5_010_616_103  # between the two copies; see the README beside them


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system as it was when first copied; `later` brings it to the second copy."""
    shutil.copytree(DATA / "before", tmp_path / "root")
    return tmp_path / "root"


def later(root: Path) -> None:
    shutil.copytree(DATA / "after", root, dirs_exist_ok=True)


def watched(root: Path) -> HostWatch:
    watch = HostWatch(PID, root=root)
    assert watch.sample(0), watch.problem
    later(root)
    assert watch.sample(BETWEEN_NS), watch.problem
    return watch


def task(root: Path, name: str) -> Path:
    """The directory of the thread with that name."""
    (found,) = (
        path.parent for path in root.glob("proc/*/task/*/status") if f"Name:\t{name}\n" in path.read_text()
    )
    return found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, text
    path.write_text(text.replace(old, new))


def numbers(totals: HostTotals) -> dict[str, float]:
    """Every cumulative value under one name."""
    flat: dict[str, float] = {f"cpu {name}": value for name, value in totals.cpu_seconds.items()}
    flat.update({f"fault {name}": value for name, value in totals.page_faults.items()})
    flat.update({f"switch {name}": value for name, value in totals.context_switches.items()})
    flat["queue"] = totals.run_queue_seconds or 0.0
    return flat


def test_a_computing_thread_under_a_quota_is_seen_to_be_throttled_and_busiest(root: Path) -> None:
    signals = watched(root).signals()
    assert signals is not None
    busiest = signals.busiest
    assert busiest is not None
    assert busiest.name == "sampler_0"
    assert [thread.name for thread in signals.threads] == ["sampler_0", "loader_1"]
    # A quota of 0.3 of a core; what the cgroup says: 3.42 s in which it waited.
    assert signals.cpu_ratio == pytest.approx(0.3, abs=0.02)
    assert sum(thread.cpu_ratio for thread in signals.threads) == pytest.approx(signals.cpu_ratio, abs=0.01)
    assert signals.throttled_ratio == pytest.approx((4872333668 - 1450991971) / BETWEEN_NS)
    assert signals.window_seconds == pytest.approx(BETWEEN_NS / 1e9)


def test_pressure_is_that_of_the_own_group(root: Path) -> None:
    signals = watched(root).signals()
    assert signals is not None
    assert signals.cpu_pressure_ratio == pytest.approx((2686828 - 779196) / 1e6 / (BETWEEN_NS / 1e9))
    assert signals.memory_pressure_ratio == 0.0


def test_pressure_is_the_machines_where_the_group_counts_none(root: Path) -> None:
    watch = HostWatch(PID, root=root)
    for path in root.glob("sys/fs/cgroup/unified/*/*.pressure"):
        path.unlink()
    watch.sample(0)
    totals = [procfs.read(root / "proc/pressure/cpu")]
    shutil.copytree(DATA / "after" / "proc", root / "proc", dirs_exist_ok=True)
    watch.sample(BETWEEN_NS)
    totals.append(procfs.read(root / "proc/pressure/cpu"))
    before, after = (int(text.splitlines()[0].rpartition("total=")[2]) for text in totals)
    signals = watch.signals()
    assert signals is not None
    assert signals.cpu_pressure_ratio == pytest.approx((after - before) / 1e6 / (BETWEEN_NS / 1e9))


def test_faults_and_switches_are_rates_of_what_the_kernel_counted(root: Path) -> None:
    old, new = (
        procfs.process_stat((DATA / side / f"proc/{PID}/stat").read_text()) for side in ("before", "after")
    )
    switches = {
        side: sum(
            procfs.thread_status(path.read_text()).involuntary_switches
            for path in (DATA / side).glob("proc/*/task/*/status")
        )
        for side in ("before", "after")
    }
    signals = watched(root).signals()
    assert signals is not None
    seconds = BETWEEN_NS / 1e9
    assert new.minor_faults > old.minor_faults
    assert signals.minor_faults_per_second == pytest.approx((new.minor_faults - old.minor_faults) / seconds)
    assert signals.involuntary_switches_per_second == pytest.approx(
        (switches["after"] - switches["before"]) / seconds
    )


def test_allowed_cores_and_their_numa_nodes_are_counted(root: Path) -> None:
    signals = watched(root_of_its_own(root)).signals()
    assert signals is not None
    assert (signals.cpus_allowed, signals.numa_nodes_allowed) == (2, 1)
    (root / "sys/devices/system/node/node0/cpulist").write_text("0\n")
    (root / "sys/devices/system/node/node1").mkdir()
    (root / "sys/devices/system/node/node1/cpulist").write_text("1\n")
    watch = HostWatch(PID, root=root)
    watch.sample(0)
    shutil.copytree(DATA / "after/proc", root / "proc", dirs_exist_ok=True)
    watch.sample(BETWEEN_NS)
    spread = watch.signals()
    assert spread is not None
    assert spread.numa_nodes_allowed == 2


def test_the_thread_that_waits_most_is_among_those_shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler beside a worker that spins on the only core: it uses little, and wants much."""
    watch = HostWatch(PID, root=root)
    watch.sample(0)
    later(root)
    edit(task(root, "loader_1") / "schedstat", "2925770764", str(840531955 + BETWEEN_NS * 9 // 10))
    watch.sample(BETWEEN_NS)
    for shown, names in ((8, ["sampler_0", "loader_1"]), (1, ["loader_1"])):
        monkeypatch.setattr("llmprobe.collect.host._SHOWN_THREADS", shown)
        signals = watch.signals()
        assert signals is not None
        assert [thread.name for thread in signals.threads] == names
        assert signals.run_queue_ratio == pytest.approx(0.9)
        assert signals.starved is not None
        assert signals.starved.name == "loader_1"


def test_what_the_kernel_does_not_tell_is_absent(root: Path) -> None:
    for pattern in ("proc/*/task/*/schedstat", "proc/pressure/*", "sys/fs/cgroup/**/*.pressure"):
        for path in root.glob(pattern):
            path.unlink()
    shutil.rmtree(root / "sys/devices")
    for path in root.glob("sys/fs/cgroup/**/cpu.stat"):
        path.unlink()
    watch = HostWatch(PID, root=root)
    watch.sample(0)
    for path in (DATA / "after").glob("proc/*/task/*/stat*"):
        if path.name != "schedstat":
            shutil.copy(path, root / path.relative_to(DATA / "after"))
    shutil.copy(DATA / f"after/proc/{PID}/stat", root / f"proc/{PID}/stat")
    watch.sample(BETWEEN_NS)
    signals, totals = watch.signals(), watch.totals()
    assert signals is not None
    assert totals is not None
    assert signals.run_queue_ratio is None
    assert signals.throttled_ratio is None
    assert signals.cpu_pressure_ratio is None
    assert signals.memory_pressure_ratio is None
    assert signals.numa_nodes_allowed is None
    assert totals.run_queue_seconds is None
    # CPU time of threads then comes in clock ticks.
    assert signals.busiest is not None
    assert signals.busiest.name == "sampler_0"
    assert signals.busiest.cpu_ratio == pytest.approx((203 - 60) / 100 / (BETWEEN_NS / 1e9))


def test_a_kernel_that_counts_no_switches_hides_no_thread(root: Path) -> None:
    """gVisor's ``status`` ends before them."""

    def strip() -> None:
        for path in root.glob("proc/*/task/*/status"):
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if not line.startswith(("Cpus_", *switches))))

    switches = ("voluntary_ctxt", "nonvoluntary_ctxt")
    strip()
    watch = HostWatch(PID, root=root)
    watch.sample(0)
    later(root)
    strip()
    watch.sample(BETWEEN_NS)
    signals, totals = watch.signals(), watch.totals()
    assert signals is not None
    assert totals is not None
    assert [thread.name for thread in signals.threads] == ["sampler_0", "loader_1"]
    assert totals.cpu_seconds["sampler"] > 2
    assert (signals.voluntary_switches_per_second, signals.involuntary_switches_per_second) == (None, None)
    assert totals.context_switches == {}
    assert (signals.cpus_allowed, signals.numa_nodes_allowed) == (None, None)
    again = HostWatch(PID, root=root)
    assert again.restore(json.loads(json.dumps(watch.save())))
    again.sample(BETWEEN_NS)
    assert again.totals() == totals


def test_threads_of_one_kind_share_a_label_and_the_sum_is_that_of_the_process(root: Path) -> None:
    totals = watched(root).totals()
    assert totals is not None
    assert set(totals.cpu_seconds) == {MAIN, "sampler", OTHER}  # the loader used less than half a second
    stat = procfs.process_stat((DATA / f"after/proc/{PID}/stat").read_text())
    assert sum(totals.cpu_seconds.values()) == pytest.approx(stat.cpu_seconds, abs=0.02)
    assert totals.page_faults == {"minor": stat.minor_faults, "major": stat.major_faults}


def test_a_label_that_comes_late_takes_nothing_along(root: Path) -> None:
    """What a thread used while it was one of the others stays theirs: else it would all come once more."""
    stat = root / f"proc/{PID}/stat"
    ticks = stat.read_text().rpartition(")")[2].split()
    watch, sums = HostWatch(PID, root=root), []
    for look, (process, thread) in enumerate([(1000, 9), (1010, 9.9), (1011, 10.9), (1020, 11.9)]):
        own = " ".join([*ticks[:11], str(process * 100), "0", *ticks[13:]])
        stat.write_text(f"{PID} (python) {own}\n")
        (task(root, "loader_1") / "schedstat").write_text(f"{round(thread * 1e9)} 0 {look + 1}\n")
        watch.sample(look * 10**9)
        if look == 2:
            saved = json.loads(json.dumps(watch.save()))
            watch = HostWatch(PID, root=root)
            assert watch.restore(saved)
            watch.sample(look * 10**9)
        totals = watch.totals()
        assert totals is not None
        sums.append(sum(totals.cpu_seconds.values()))
    assert totals.cpu_seconds["loader"] == pytest.approx(1.0)
    assert sums == pytest.approx([1000, 1010, 1011, 1020])


def test_totals_do_not_fall_when_a_thread_ends(root: Path) -> None:
    watch = watched(root)
    before = watch.totals()
    assert before is not None
    shutil.rmtree(task(root, "sampler_0"))
    threads = procfs.process_stat((root / f"proc/{PID}/stat").read_text()).threads
    edit(root / f"proc/{PID}/stat", f" 20 0 {threads} 0 ", f" 20 0 {threads - 1} 0 ")
    assert watch.sample(BETWEEN_NS + 10**9)
    after = watch.totals()
    assert after is not None
    assert numbers(after) == numbers(before)


def test_a_thread_that_takes_a_used_number_is_a_new_one(root: Path) -> None:
    watch = watched(root)
    before = watch.totals()
    assert before is not None
    sampler = task(root, "sampler_0")
    (sampler / "schedstat").write_text("1000000 2000000 3\n")
    edit(sampler / "status", "sampler_0", "drafter_0")
    assert watch.sample(BETWEEN_NS + 10**9)
    after = watch.totals()
    assert after is not None
    assert all(numbers(after)[name] >= value for name, value in numbers(before).items())
    assert after.run_queue_seconds == pytest.approx((before.run_queue_seconds or 0) + 0.002)


def test_another_process_of_the_same_number_is_not_watched(root: Path) -> None:
    watch = watched(root)
    totals = watch.totals()
    stat = root / f"proc/{PID}/stat"
    start = procfs.process_stat(stat.read_text()).start_ticks
    edit(stat, f" {start} ", f" {start + 500} ")
    assert not watch.sample(BETWEEN_NS + 10**9)
    assert "another has its number" in watch.problem
    assert watch.signals() is None
    assert watch.totals() == totals


def test_a_process_that_started_after_the_engine_is_not_taken_for_it(root: Path) -> None:
    stat = procfs.process_stat((root / f"proc/{PID}/stat").read_text())
    began = procfs.started_unix(stat, (root / "proc/stat").read_text())
    assert began is not None
    assert HostWatch(PID, root=root, started=began + 1).sample(0)
    late = HostWatch(PID, root=root, started=began - 60)
    assert not late.sample(0)
    assert "another process" in late.problem


def test_a_dead_process_ends_the_watch_and_keeps_its_totals(root: Path) -> None:
    watch = watched(root)
    totals = watch.totals()
    shutil.rmtree(root / f"proc/{PID}")
    assert not watch.sample(BETWEEN_NS + 10**9)
    assert watch.problem == f"process {PID} ended"
    assert watch.totals() == totals


def test_totals_go_on_after_a_restart_of_the_watch(root: Path) -> None:
    first = HostWatch(PID, root=root)
    first.sample(0)
    saved = json.loads(json.dumps(first.save()))
    second = HostWatch(PID, root=root)
    assert second.restore(saved)
    later(root)
    second.sample(BETWEEN_NS)
    expected = watched(root_of_its_own(root)).totals()
    found = second.totals()
    assert expected is not None
    assert found is not None
    assert numbers(found) == pytest.approx(numbers(expected))


def root_of_its_own(root: Path) -> Path:
    return Path(shutil.copytree(DATA / "before", root.with_name("another")))


def test_what_was_saved_of_another_process_is_left_alone(root: Path) -> None:
    first = HostWatch(PID, root=root)
    first.sample(0)
    assert not HostWatch(PID, root=root).restore({**first.save(), "start_ticks": 1})


def test_hundreds_of_sleeping_threads_are_read_in_turn_and_a_busy_one_is_found(root: Path) -> None:
    template = next(root.glob(f"proc/{PID}/task/*"))
    for number in range(600):
        sleeping = root / f"proc/{PID}/task/{200000 + number}"
        shutil.copytree(template, sleeping)
        (sleeping / "schedstat").write_text("5000 1000 1\n")
    stat = root / f"proc/{PID}/stat"
    threads = procfs.process_stat(stat.read_text()).threads
    edit(stat, f" 20 0 {threads} 0 ", f" 20 0 {threads + 600} 0 ")
    watch = HostWatch(PID, root=root)
    watch.sample(0)
    reads: list[str] = []
    original = procfs.read

    def counted(path: str | Path, dir_fd: int | None = None) -> str:
        reads.append(str(path))
        return original(path, dir_fd)

    late = root / f"proc/{PID}/task/200599"
    (late / "schedstat").write_text("900005000 1000 9\n")
    edit(late / "status", procfs.thread_status((late / "status").read_text()).name, "late_9")
    fields = stat.read_text().split(" ")
    fields[13] = str(int(fields[13]) + 90)  # utime, in ticks
    stat.write_text(" ".join(fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(procfs, "read", counted)
        watch.sample(10**9)
        first_reads = len(reads)
        for second in range(2, 7):
            watch.sample(second * 10**9)
    assert first_reads < 200
    signals = watch.signals()
    assert signals is not None
    assert [thread.name for thread in signals.threads] == ["late_9"]


@settings(deadline=None)
@given(st.text(max_size=15))
def test_any_thread_name_makes_a_label(name: str) -> None:
    label = thread_label(name)
    assert label
    assert not any(character.isspace() or character in '"\\\n{}' for character in label)


def test_labels_are_few_however_many_names_there_are(root: Path) -> None:
    template = task(root, "loader_1")
    for number in range(100):
        letters = f"{chr(97 + number // 26)}{chr(97 + number % 26)}"
        other = Path(shutil.copytree(template, root / f"proc/{PID}/task/{300000 + number}"))
        edit(other / "status", "loader_1", f"worker-{letters}")
        (other / "schedstat").write_text(f"{10**9 + number} 0 1\n")
    watch = HostWatch(PID, root=root)
    watch.sample(0)
    totals = watch.totals()
    assert totals is not None
    assert len(totals.cpu_seconds) == MOST_LABELS


def test_version_2_of_control_groups_counts_in_microseconds_and_any_level_may_throttle(root: Path) -> None:
    # The format is that of cgroup-v2.rst; the figures are made up.
    (root / "proc/self/mountinfo").write_text(
        "41 31 0:38 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
    )
    (root / f"proc/{PID}/cgroup").write_text("0::/kubepods/pod1/inner\n")
    base = root / "sys/fs/cgroup"
    (base / "inner").mkdir()
    stat = "usage_usec 9\nuser_usec 5\nsystem_usec 4\nnr_periods {}\nnr_throttled {}\nthrottled_usec {}\n"
    (base / "inner/cpu.stat").write_text(stat.format(0, 0, 0))
    (base / "cpu.stat").write_text(stat.format(100, 10, 4_000_000))
    (base / "cpu.max").write_text("200000 50000\n")
    groups = cgroup.Groups(root, PID)
    before = groups.throttled()
    # Eight cores waited at once: 16 s in 40 periods of 50 ms, which are 2 s.
    (base / "cpu.stat").write_text(stat.format(200, 50, 20_000_000))
    assert cgroup.throttled_ratio(before, groups.throttled(), 10.0) == pytest.approx(0.2)


def test_a_group_of_another_namespace_stands_for_the_mount(root: Path) -> None:
    (root / f"proc/{PID}/cgroup").write_text("1:cpu:/../../elsewhere\n")
    throttled = cgroup.Groups(root, PID).throttled()
    assert throttled is not None
    assert [level.periods for level in throttled] == [0]


def test_it_watches_a_real_process_down_to_the_thread_that_works() -> None:
    code = (
        "import ctypes, sys, threading\n"
        "def work():\n"
        "    ctypes.CDLL(None).prctl(15, b'cruncher', 0, 0, 0)\n"
        "    while True: pass\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "print(flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        watch = HostWatch(child.pid, started=time.time())
        assert watch.sample(time.monotonic_ns()), watch.problem
        cpu = procfs.process_stat(procfs.read(f"/proc/{child.pid}/stat")).cpu_seconds
        while (signals := watch.signals()) is None or procfs.process_stat(
            procfs.read(f"/proc/{child.pid}/stat")
        ).cpu_seconds < cpu + 0.3:
            time.sleep(0.1)
            assert watch.sample(time.monotonic_ns()), watch.problem
        assert signals.busiest is not None
        assert signals.busiest.name == "cruncher"
        assert signals.cpus_allowed == len(os.sched_getaffinity(child.pid))
        totals = watch.totals()
        assert totals is not None
        assert sum(totals.cpu_seconds.values()) > 0.3
    finally:
        child.kill()
        child.wait()
    assert not watch.sample(time.monotonic_ns())


def test_the_lock_tells_which_process_writes_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "worker.journal"
    code = (
        "import sys; from pathlib import Path; from llmprobe.record.journal_reader import JournalWriter\n"
        "writer = JournalWriter.create(Path(sys.argv[1]), {})\n"
        "print(flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.readline()
    reader = JournalReader(path)
    fd = os.open(path, os.O_RDWR)
    try:
        assert lock_holder(fd) == child.pid
        child.stdin.close()
        child.wait()
        assert lock_holder(fd) is None
    finally:
        os.close(fd)
        reader.close()


def test_asking_for_the_lock_leaves_it_in_place(tmp_path: Path) -> None:
    writer = JournalWriter.create(tmp_path / "j", {})
    try:
        assert lock_holder(writer.fileno()) is None  # one's own lock is no obstacle
        code = (
            "import fcntl, sys\n"
            "try: fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except OSError: print('held')"
        )
        asked = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "j")], capture_output=True, text=True, timeout=60
        )
        assert asked.stdout == "held\n"
    finally:
        writer.close(remove=True)


def test_it_may_be_used_beside_other_threads() -> None:
    """Threads that come and go while they are listed do not disturb a sample."""
    stop = threading.Event()

    def spawn() -> None:
        while not stop.is_set():
            threading.Thread(target=lambda: None).start()

    spawner = threading.Thread(target=spawn)
    spawner.start()
    try:
        watch = HostWatch(os.getpid())
        before: dict[str, float] = {}
        for number in range(50):
            assert watch.sample(number * 10**9), watch.problem
            totals = watch.totals()
            assert totals is not None
            now = numbers(totals)
            assert all(now[name] >= value for name, value in before.items())
            before = now
    finally:
        stop.set()
        spawner.join()
