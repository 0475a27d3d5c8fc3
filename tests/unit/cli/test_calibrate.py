"""Measuring this very machine; what is kept and what the table says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from llmprobe.cli import measure_peaks
from llmprobe.cli.calibrate import _Others
from llmprobe.cli.output import scaled


def test_measures_keeps_and_prints(tmp_path):
    code = "import sys; sys.argv[0] = 'llmprobe'; from llmprobe.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "calibrate", "--seconds", "0.1", "--threads", "1", "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    kept = json.loads((tmp_path / "llmprobe" / "peaks.json").read_text())
    assert printed["path"] == str(tmp_path / "llmprobe" / "peaks.json")
    assert kept["devices"] == printed["devices"]
    cpu = printed["devices"][0]
    if importlib.util.find_spec("torch"):  # numpy's threads cannot be chosen from here, only counted
        assert cpu["threads"] == 1
    # No processor that runs Python 3.10 is slower or faster than these.
    assert 1e8 < cpu["bandwidth_bytes_per_second"] < 1e13
    assert 1e8 < cpu["flops_per_second"]["float32"] < 1e14
    assert cpu["versions"]
    assert 0 <= cpu["others_ratio"] <= 1


def test_what_others_use_of_the_processor_is_told_from_what_it_uses_itself():
    machine = psutil.cpu_times()
    others, began = _Others(), time.monotonic()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"], check=True)
    own = time.process_time() + 1
    while time.process_time() < own:
        pass
    ratio, now = others.ratio(), psutil.cpu_times()
    core_seconds = (time.monotonic() - began) * psutil.cpu_count()
    used = (now.user + now.system + now.nice) - (machine.user + machine.system + machine.nice)
    assert ratio * core_seconds > 0.8  # the other program's second
    assert (
        ratio * core_seconds < used - 0.7 + 0.1 * core_seconds
    )  # and not its own; interrupts are others' too


def test_a_cache_that_cannot_be_written_is_an_error_with_the_way_out(tmp_path):
    (tmp_path / "llmprobe").touch()  # a file where the directory should be
    code = "import sys; sys.argv[0] = 'llmprobe'; from llmprobe.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "calibrate", "--seconds", "0.1"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "XDG_CACHE_HOME" in done.stderr


def test_three_digits_and_a_prefix():
    assert scaled(16_785_414_625.0, "B/s") == "16.8 GB/s"
    assert scaled(168_181_682_314_198.0, "FLOP/s") == "168 TFLOP/s"
    assert scaled(12.0, "B") == "12 B"


@pytest.mark.parametrize("dtype", measure_peaks.GPU_DTYPES)
def test_what_is_timed_is_the_product_of_two_matrices(dtype):
    """In whatever type: here on the processor, where torch multiplies the same way, only slowly."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    timed = measure_peaks.product(torch, dtype, 64, torch.device("cpu"))
    a, b = timed.args
    assert a.shape == b.shape == (64, 64)
    expected = a.float() @ b.float()
    torch.testing.assert_close(timed().float(), expected, rtol=0.02, atol=0.1)
    assert str(a.dtype).removeprefix("torch.") == {"fp8": "float8_e4m3fn"}.get(dtype, dtype)


class Devices:
    """torch with one GPU of a capability, whose work takes no time to set up and 1 ms to do."""

    class Cuda:
        def __init__(self, capability):
            self.get_device_capability = lambda device: capability
            self.get_device_properties = lambda device: type("P", (), {"uuid": "1", "name": "GPU"})
            self.empty_cache = lambda: None

    def __init__(self, capability):
        self.cuda = self.Cuda(capability)
        self.device = lambda kind, index: f"{kind}:{index}"
        self.version = type("V", (), {"cuda": "13.0"})
        self.__version__ = "2.11"


@pytest.mark.parametrize(
    ("capability", "refused", "measured"),
    [
        ((9, 0), None, ["bfloat16", "float16", "float32", "fp8", "int8"]),
        ((8, 0), None, ["bfloat16", "float16", "float32", "int8"]),
        ((7, 0), None, ["bfloat16", "float16", "float32"]),
        ((9, 0), "fp8", ["bfloat16", "float16", "float32", "int8"]),
    ],
)
def test_types_that_a_gpu_or_its_torch_lacks_have_no_rate(monkeypatch, capability, refused, measured):
    def made(torch, dtype, width, device):
        if dtype == refused:
            raise RuntimeError(
                "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0"
            )
        return lambda: None

    monkeypatch.setattr(measure_peaks, "product", made)
    monkeypatch.setattr(measure_peaks, "_gpu_copy_rate", lambda torch, device, seconds: 3e12)
    monkeypatch.setattr(measure_peaks, "_best_on_gpu", lambda torch, device, work, seconds: 1e-3)
    steps = []
    found = measure_peaks._measure_gpu(Devices(capability), 0, 0.1, lambda *step: steps.append(step))
    assert list(found.flops_per_second) == measured
    assert [number for _, number, _ in steps] == list(range(steps[0][2]))


def test_rates_that_round_to_the_next_prefix_are_shown_in_it() -> None:
    shown = [scaled(value, "B/s") for value in (999.4e6, 999.7e6, 999.7e9, 999.7e12, 23.45e9, 999.7)]
    assert shown == ["999 MB/s", "1 GB/s", "1 TB/s", "1 PB/s", "23.4 GB/s", "1 kB/s"]
