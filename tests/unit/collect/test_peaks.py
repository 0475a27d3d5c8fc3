"""Which roofs a worker gets: published ones, measured ones, or none."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from llmprobe.collect.peaks import (
    Calibration,
    attainable_for,
    cpu_key,
    load_peaks,
    peaks_for,
    peaks_path,
    save_peaks,
    why_no_peaks,
)
from llmprobe.collect.process import Rank

CPUS = os.cpu_count() or 1
H100 = {"device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-1"}}


def cpu(threads: int, rate: float = 1e11) -> Calibration:
    return Calibration(
        cpu_key("Some CPU", CPUS, threads), "Some CPU", 2e10, {"float32": rate}, 1.7e9, threads
    )


def facts(device: dict, dtype: str = "float32") -> dict:
    return {"device": device, "model": {"compute_dtype": dtype}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "peaks.json"


def test_what_is_saved_is_loaded(path):
    saved = [cpu(1), Calibration("GPU-1", "H100", 3e12, {"bfloat16": 7e14}, 1.7e9, None, {"torch": "2.13"})]
    save_peaks(saved, path)
    assert load_peaks(path) == {calibration.device: calibration for calibration in saved}


@pytest.mark.parametrize(
    ("others", "said"), [(None, False), (0.0, False), (0.19, False), (0.2, True), (0.98, True)]
)
def test_what_was_measured_on_a_busy_processor_says_so(path, others, said):
    save_peaks([dataclasses.replace(cpu(1), others_ratio=others)], path)
    (loaded,) = load_peaks(path).values()
    assert loaded.others_ratio == others
    caveat = loaded.peaks("float32", "calibrated").caveat
    assert bool(caveat) is said
    if said:
        assert f"{others:.0%} of the processor" in caveat
        assert "llmprobe calibrate" in caveat


def test_measuring_again_replaces_only_that_device(path):
    save_peaks([cpu(1), cpu(2)], path)
    save_peaks([cpu(2, rate=5e11)], path)
    loaded = load_peaks(path)
    assert len(loaded) == 2
    assert loaded[cpu(2).device].flops_per_second == {"float32": 5e11}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 1, "devices": [{}]}'])
def test_a_file_that_cannot_be_read_counts_as_none_and_is_replaced(path, text):
    path.parent.mkdir()
    path.write_text(text)
    assert load_peaks(path) == {}
    save_peaks([cpu(1)], path)
    assert list(load_peaks(path)) == [cpu(1).device]


def test_readers_never_see_half_a_file(path):
    save_peaks([cpu(1)], path)
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(save_peaks, [cpu(1, rate=1e11 + n)], path) for n in range(50)]
        while not all(job.done() for job in writing):
            assert load_peaks(path)
        for job in writing:
            job.result()
    assert [name.name for name in path.parent.iterdir()] == ["peaks.json"]


def test_a_cpu_has_measured_peaks_or_none(path):
    worker = facts({"type": "cpu", "name": "Some CPU"})
    assert peaks_for(worker, path) is None
    save_peaks([cpu(CPUS)], path)
    found = peaks_for(worker, path)
    assert found is not None
    assert (found.bandwidth_bytes_per_second, found.flops_per_second) == (2e10, 1e11)
    assert (found.source, found.dtype) == ("calibrated", "float32")
    assert "2023-11-14" in found.detail


def test_a_worker_gets_the_peaks_of_as_many_threads_as_it_has(path):
    save_peaks([cpu(1, 1e11), cpu(8, 8e11), cpu(4, 4e11)], path)
    device = {"type": "cpu", "name": "Some CPU"}
    assert peaks_for(facts({**device, "threads": 4}), path).flops_per_second == 4e11
    assert peaks_for(facts(device), path).flops_per_second == 8e11
    assert peaks_for(facts({**device, "threads": 3}), path).flops_per_second == 8e11


def test_another_processor_or_dtype_has_none(path):
    save_peaks([cpu(CPUS)], path)
    assert peaks_for(facts({"type": "cpu", "name": "Other CPU"}), path) is None
    assert peaks_for(facts({"type": "cpu", "name": "Some CPU"}, "bfloat16"), path) is None


def test_a_device_that_is_measured_once_more_has_both_of_its_roofs_anew(path):
    """A first measurement on a busy processor was half of what it can do, and calibrate asks for another."""
    worker = facts({"type": "cpu", "name": "Some CPU", "threads": 2})
    process = SimpleNamespace(path=path.with_name("x.journal"), facts=worker)
    save_peaks([cpu(2, 1e11)], path)
    rank = Rank(process, lambda said: peaks_for(said, path), lambda said: attainable_for(said, path))
    assert rank.attainable.flops_per_second == 1e11
    save_peaks([cpu(2, 2e11)], path)
    rank.refresh()
    assert (rank.peaks.flops_per_second, rank.attainable.flops_per_second) == (2e11, 2e11)


def test_what_a_gpu_attains_is_asked_for_again_while_its_published_peaks_stay(path):
    worker = {**H100, "model": {"compute_dtype": "bfloat16"}}
    process = SimpleNamespace(path=path.with_name("x.journal"), facts=worker)
    rank = Rank(process, lambda said: peaks_for(said, path), lambda said: attainable_for(said, path))
    for rate in (3.0e12, 3.1e12):
        save_peaks([Calibration("GPU-1", "H100", rate, {"bfloat16": 7.9e14}, 1.7e9)], path)
        for _ in range(8):
            rank.refresh()
        assert rank.attainable.bandwidth_bytes_per_second == rate


def test_a_gpu_with_published_peaks_keeps_them_after_it_was_measured(path):
    worker = {**H100, "model": {"compute_dtype": "bfloat16"}}
    save_peaks([Calibration("GPU-1", "H100", 3.0e12, {"bfloat16": 7.9e14}, 1.7e9)], path)
    assert peaks_for(worker, path).source == "nominal"
    assert attainable_for(worker, path).bandwidth_bytes_per_second == 3.0e12
    assert attainable_for(worker, path).source == "attainable"


def test_a_gpu_nobody_published_has_its_measured_peaks(path):
    worker = facts({"type": "cuda", "name": "Some GPU", "uuid": "GPU-2"}, "torch.bfloat16")
    save_peaks([Calibration("GPU-2", "Some GPU", 1e12, {"bfloat16": 1e14}, 1.7e9)], path)
    assert peaks_for(worker, path).source == "calibrated"
    assert peaks_for(facts({"type": "cuda", "name": "Some GPU", "uuid": "GPU-3"}), path) is None


@pytest.mark.parametrize(
    "worker", [{}, {"device": None}, {"model": {}}, {"device": {"type": "cpu"}, "model": 3}]
)
def test_facts_that_say_nothing_have_no_peaks(worker, path):
    assert peaks_for(worker, path) is None


def test_the_cache_is_the_users():
    assert str(peaks_path({"XDG_CACHE_HOME": "/c", "HOME": "/h"})) == "/c/llmprobe/peaks.json"
    assert str(peaks_path({"HOME": "/h"})) == "/h/.cache/llmprobe/peaks.json"
    # The specification says that a relative path is to be ignored.
    assert str(peaks_path({"XDG_CACHE_HOME": "c", "HOME": "/h"})) == "/h/.cache/llmprobe/peaks.json"


def test_a_user_without_a_home_has_measured_nothing_yet(monkeypatch):
    """As a container's that runs as any user: whoever looks for peaks, the agent first of all, goes on."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_001)
    assert load_peaks() == {}
    assert peaks_for({**H100, "model": {"compute_dtype": "bfloat16"}}).source == "nominal"
    assert attainable_for({**H100, "model": {"compute_dtype": "bfloat16"}}) is None
    with pytest.raises(OSError, match="home"):
        save_peaks([cpu(1)])


def test_a_type_that_a_processor_lacks_is_no_roof_below_float32():
    rates = {"float32": 9.8e10, "bfloat16": 7e8, "float16": 3e11}
    processor = Calibration(cpu_key("Some CPU", CPUS, 2), "Some CPU", 2e10, rates, 1.7e9, 2)
    converted = processor.peaks("bfloat16", "calibrated")
    assert converted.flops_per_second == 9.8e10
    assert "in float32: it has no bfloat16" in converted.detail
    assert processor.peaks("float16", "calibrated").flops_per_second == 3e11
    gpu = Calibration("GPU-1", "Some GPU", 1e12, rates, 1.7e9)
    assert gpu.peaks("bfloat16", "calibrated").flops_per_second == 7e8, "a GPU's own figures are what it does"


@pytest.mark.parametrize(
    ("kind", "dtype", "said"),
    [
        ("cuda", "bfloat16", "no peak rates for Some GPU in bfloat16: run `llmprobe calibrate`"),
        ("cuda", "float8_e4m3fn", "no peak rates for Some GPU in fp8: run `llmprobe calibrate`"),
        ("cuda", "", "no peak rates for Some GPU: run `llmprobe calibrate`"),
        ("cuda", "fp4", "no peak rates for Some GPU in fp4: none are published, and "),
        ("cpu", "int8", "no peak rates for Some GPU in int8: none are published, and "),
        ("cpu", "float16", "no peak rates for Some GPU in float16: run `llmprobe calibrate`"),
    ],
)
def test_why_there_are_none_names_the_products_and_what_helps_if_anything_does(kind, dtype, said):
    assert why_no_peaks(facts({"type": kind, "name": "Some GPU"}, dtype)).startswith(said)
    sliced = why_no_peaks(facts({"type": kind, "name": "Some GPU"}, dtype), mig=True)
    assert sliced.startswith(said.replace("Some GPU", "a MIG slice of Some GPU"))
    assert why_no_peaks({}) == "no peak rates for this device: run `llmprobe calibrate`"


def test_products_in_fp8_and_int8_have_rates_of_their_own(path):
    rates = {"bfloat16": 7e14, "fp8": 1.3e15, "int8": 1.2e15}
    save_peaks([Calibration("GPU-9", "New GPU", 3e12, rates, 1.7e9)], path)
    device = {"type": "cuda", "name": "New GPU", "uuid": "GPU-9"}
    assert peaks_for(facts(device, "float8_e4m3fn"), path).flops_per_second == 1.3e15
    assert attainable_for(facts(device, "int8"), path).flops_per_second == 1.2e15
