"""What counts as a death in a kernel window, and what does not; the library that records is scripted here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from llmprobe.record import kernels, latch
from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.kernels import KernelWindowThread
from llmprobe.record.latch import Latch, ProgramEndsError, died_in_a_window
from llmprobe.record.recorder import Recorder
from llmprobe.record.window_file import FOLDER
from llmprobe.settings import KernelWindows

#: A program with a scripted library, which ends while something records.
_PROGRAM = """
import sys, threading, time
from pathlib import Path
import numpy as np
from llmprobe.record import kernel_trace, kernels, latch
from llmprobe.record.asked import Ask, Paths, write
from llmprobe.record.asked_capture import AskedCaptures
from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.recorder import Recorder
from llmprobe.record.window_file import FOLDER
from llmprobe.settings import KernelWindows

folder, what, hangs = Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3
recorder = Recorder.open(folder, "program", {"clock": "cuda"})
opened = 0

class Scripted:
    filling = False
    def open(self):
        global opened
        opened += 1
    def drain(self):
        return 0
    def close(self):
        if hangs and threading.current_thread() is not threading.main_thread() and opened > first:
            threading.Event().wait()
        print("closed", opened, flush=True)
        return Window(1, 2, np.zeros(0, ACTIVITY), [], 0)

def failed(where, error):
    print("failed", where, repr(error), flush=True)

if what == "window":
    first = 1  # the one that sets CUPTI up
    kernels.of_process = Scripted
    def engine():
        while True:
            recorder.begin(1, 1, time.monotonic_ns())
            time.sleep(0.001)
    threading.Thread(target=engine, daemon=True).start()
    plan = KernelWindows(600.0, 0.01, False)
    kernels.KernelWindowThread(recorder, plan, active=lambda: True, failed=failed).start()
else:
    first = 0
    scripted = Scripted()
    kernel_trace.of_process = lambda: scripted
    kernel_trace.loaded_library = lambda *a: "libcupti.so"
    paths = Paths.of(recorder.writer.path)
    write(paths.ask, Ask("20260101-000000-abcdef", "kernels", 60.0, None, False, False, time.monotonic_ns()))
    asked = AskedCaptures(recorder, profiler=lambda: None, failed=failed)
    asked.look()
if hangs:
    latch._LAST_SECONDS = 0.1
while opened <= first or not list((folder / FOLDER).glob("*.open")):
    time.sleep(0.001)
print("ends", flush=True)
"""


def ended(folder: Path, *arguments: str) -> list[str]:
    """What such a program prints, once it has ended in the ordinary way."""
    command = [sys.executable, "-c", _PROGRAM, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("what", "opened"), [("window", 2), ("capture", 1)])
def test_a_program_that_ends_in_the_ordinary_way_did_not_die_in_its_window(
    tmp_path: Path, what: str, opened: int
) -> None:
    lines = ended(tmp_path, what)
    assert lines[-2:] == ["ends", f"closed {opened}"]
    assert not any(line.startswith("failed") for line in lines)
    assert died_in_a_window(tmp_path / FOLDER) is None
    assert not list((tmp_path / FOLDER).glob("*.open"))


@pytest.mark.parametrize("what", ["window", "capture"])
def test_a_library_that_hangs_holds_no_program_up_and_counts_as_a_death(tmp_path: Path, what: str) -> None:
    assert ended(tmp_path, what, "hangs")[-1] == "ends"
    assert died_in_a_window(tmp_path / FOLDER) is not None


def test_a_window_ends_with_its_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()

    class Scripted:
        filling = False
        windows = 0

        def open(self) -> None:
            self.windows += 1
            if self.windows > 1:
                opened.set()

        def close(self) -> Window:
            return Window(1, 2, np.zeros(0, ACTIVITY), [], 0)

    monkeypatch.setattr(kernels, "of_process", Scripted)
    recorder = Recorder.open(tmp_path, "worker", {})
    thread = KernelWindowThread(
        recorder, KernelWindows(600.0, 0.01, False), active=lambda: True, failed=lambda where, error: None
    )
    thread.start()
    while not opened.wait(0.001):
        recorder.begin(1, 1, 1)
    recorder.close(remove=True)
    thread.join(60)
    assert not thread.is_alive()
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_once_the_program_ends_no_window_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latch, "_process", latch._Process())
    latch._process.end()
    found = Latch(tmp_path, "late")
    with pytest.raises(ProgramEndsError):
        found.open_window()
    assert list(tmp_path.iterdir()) == []
    assert not latch._process.open


def test_a_child_of_a_process_that_died_in_a_window_does_not_hide_it(tmp_path: Path) -> None:
    """A data loader's worker, forked while a window was open, lives on."""
    program = (
        "import os, signal, sys, time; from pathlib import Path; from llmprobe.record.latch import Latch\n"
        "latch = Latch(Path(sys.argv[1]), 'worker-1')\n"
        "latch.open_window()\n"
        "child = os.fork()\n"
        "if child:\n"
        "    os.write(1, b'%d\\n' % child)\n"
        "    time.sleep(600)\n"
        "latch.close_window()  # nothing of its own\n"
        "os.write(1, b'forked\\n')\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        child = 0
        try:
            assert owner.stdout is not None
            said = {owner.stdout.readline().strip(), owner.stdout.readline().strip()}
            (child,) = map(int, said - {"forked"})
            assert died_in_a_window(tmp_path) is None  # the owner lives
            owner.kill()
            owner.wait()
            os.kill(child, 0)
            assert died_in_a_window(tmp_path) == tmp_path / "worker-1.open"
        finally:
            owner.kill()
            if child:
                os.kill(child, signal.SIGKILL)
