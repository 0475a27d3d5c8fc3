from __future__ import annotations

import re

import pytest

from llmprobe.compute.hardware import DEVICES, Peaks, canonical_dtype, lookup, nominal_bandwidth


@pytest.mark.parametrize(
    ("name", "dtype", "gigabytes", "teraflops"),
    [
        ("Tesla V100-SXM2-16GB", "float16", 900, 125),
        ("Tesla T4", "half", 320, 65),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 1555, 312),
        ("NVIDIA A100-PCIE-40GB", "bfloat16", 1555, 312),
        ("NVIDIA A100-SXM4-80GB", "torch.bfloat16", 2039, 312),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 1935, 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 2039, 19.5),
        ("NVIDIA A10", "bfloat16", 600, 125),
        ("NVIDIA A10G", "bfloat16", 600, 70),
        ("NVIDIA L4", "bfloat16", 300, 121),
        ("NVIDIA L40S", "fp8", 864, 733),
        ("NVIDIA L40", "bfloat16", 864, 181.05),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 1008, 165.2),
        ("NVIDIA GeForce RTX 5090", "bfloat16", 1792, 209.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 3352, 989.4),
        ("NVIDIA H100 80GB HBM3", "torch.float8_e4m3fn", 3352, 1978.9),
        ("NVIDIA H100 PCIe", "bfloat16", 2039, 756),
        ("NVIDIA H100 NVL", "bfloat16", 3938, 835.5),
        ("NVIDIA H200", "bfloat16", 4800, 989.4),
        ("NVIDIA GH200 480GB", "bfloat16", 4000, 989.4),
        ("NVIDIA GH200 144G HBM3e", "bfloat16", 4900, 989.4),
        ("NVIDIA B200", "nvfp4", 7700, 9000),
        ("NVIDIA GB200", "bfloat16", 8000, 2500),
    ],
)
def test_devices_are_found_by_the_name_nvml_gives(
    name: str, dtype: str, gigabytes: float, teraflops: float
) -> None:
    peaks = lookup(name, dtype)
    assert peaks is not None
    assert peaks.bandwidth_bytes_per_second == pytest.approx(gigabytes * 1e9)
    assert peaks.flops_per_second == pytest.approx(teraflops * 1e12)
    assert peaks.source == "nominal"
    assert "NVIDIA" in peaks.detail


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bfloat16"),
        ("GRID A100-10C", "bfloat16"),
        ("NVIDIA H100 80GB HBM2e", "bfloat16"),
        ("NVIDIA A100X", "bfloat16"),
        ("AMD Instinct MI300X", "bfloat16"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),  # has no such units
        ("Tesla T4", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float64"),
        ("", ""),
    ],
)
def test_what_is_not_published_is_not_guessed(name: str, dtype: str) -> None:
    assert lookup(name, dtype) is None


def test_every_row_is_dense_whole_and_cites_its_source() -> None:
    for device in DEVICES:
        assert device.source.startswith("NVIDIA "), device
        assert re.compile(device.pattern), device
        assert device.bandwidth >= 300, device
        assert all(canonical_dtype(dtype) == dtype for dtype in device.tflops), device
        half = device.tflops["float16"]
        # Eight-bit units run at twice the rate of sixteen-bit ones; up to four times as GeForce halves FP16.
        for dtype in ("fp8", "int8"):
            if dtype in device.tflops:
                assert 1.9 <= device.tflops[dtype] / half <= 4.1, device
        if "tf32" in device.tflops:
            assert device.tflops["tf32"] / half == pytest.approx(0.5, rel=0.02), device


def test_the_ridge_is_where_the_roofs_meet() -> None:
    assert Peaks(2e12, 1e15, "bfloat16", "nominal", "").ridge_flops_per_byte == 500


@pytest.mark.parametrize(
    ("name", "bus_bits", "megahertz"),  # as nvidia-smi and deviceQuery show them
    [
        ("NVIDIA A100-SXM4-40GB", 5120, 1215),
        ("NVIDIA A100-SXM4-80GB", 5120, 1593),
        ("NVIDIA A100 80GB PCIe", 5120, 1512),
        ("NVIDIA H100 80GB HBM3", 5120, 2619),
        ("NVIDIA H100 PCIe", 5120, 1593),
        ("NVIDIA A10", 384, 6251),
        ("NVIDIA L4", 192, 6251),
        ("NVIDIA L40S", 384, 9001),
        ("NVIDIA GeForce RTX 4090", 384, 10501),
        ("NVIDIA GeForce RTX 5090", 512, 14001),
    ],
)
def test_bandwidth_from_nvml_s_figures_is_what_is_published(
    name: str, bus_bits: int, megahertz: float
) -> None:
    published = lookup(name, "bfloat16")
    assert published is not None
    assert nominal_bandwidth(bus_bits, megahertz) == pytest.approx(
        published.bandwidth_bytes_per_second, rel=2e-3
    )
