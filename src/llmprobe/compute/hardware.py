"""What a device could do at most: bandwidth and dense FLOP/s, from a table of published figures.

Rates are dense (data sheets often print those with 2:4 sparsity, twice as high) with accumulation in
float32, which is how engines multiply (half the advertised rate on GeForce cards). ``float32`` is the rate of
the CUDA cores: engines leave TF32 off unless told otherwise.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Roofs of one device for one dtype.

    ``source`` is ``nominal`` (published), ``attainable`` (measured on this device) or ``calibrated``
    (measured where nothing is published); ``detail`` says which page or which run, ``caveat`` why they may be
    wrong, as a sentence's beginning; empty where nothing is known to be.
    """

    bandwidth_bytes_per_second: float
    flops_per_second: float
    dtype: str
    source: str
    detail: str
    caveat: str = ""

    @property
    def ridge_flops_per_byte(self) -> float:
        """The intensity at which both roofs meet (Williams et al. 2009, "Roofline")."""
        return self.flops_per_second / self.bandwidth_bytes_per_second


@dataclass(frozen=True)
class Device:
    """One row of the table: GB/s, TFLOP/s by dtype, and the public document that says so.

    ``pattern`` must match the whole NVML name, lower case, without "nvidia", "tesla" and "geforce".
    """

    pattern: str
    bandwidth: float
    tflops: Mapping[str, float]
    source: str


def _rates(half: float, **others: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, **others}


_A100 = _rates(312, tf32=156, int8=624, float32=19.5)
_HOPPER = _rates(989.4, tf32=494.7, fp8=1978.9, int8=1978.9, float32=66.9)
_HOPPER_NVL = _rates(835.5, tf32=417.5, fp8=1670.5, int8=1670.5, float32=60)
_A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet"
_H100_PAPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, dense"
_GB200_RATES = _rates(2500, tf32=1250, fp8=5000, float32=80)

DEVICES = (
    Device(r"v100 sxm2( \d+gb)?", 900, {"float16": 125, "float32": 15.7}, "NVIDIA V100 datasheet"),
    Device(r"v100 pcie( \d+gb)?", 900, {"float16": 112, "float32": 14}, "NVIDIA V100 datasheet"),
    Device(r"t4", 320, {"float16": 65, "int8": 130, "float32": 8.1}, "NVIDIA T4 datasheet"),
    Device(r"a100 (sxm4?|pcie) 40gb", 1555, _A100, _A100_SHEET),
    Device(r"a100 sxm4? 80gb", 2039, _A100, _A100_SHEET),
    Device(r"a100 (80gb pcie|pcie 80gb)", 1935, _A100, _A100_SHEET),
    Device(r"a30", 933, _rates(165, tf32=82, int8=330, float32=10.3), "NVIDIA A30 datasheet"),
    Device(r"a10", 600, _rates(125, tf32=62.5, int8=250, float32=31.2), "NVIDIA A10 datasheet"),
    Device(r"a10g", 600, _rates(70, tf32=35, int8=140), "NVIDIA A10G datasheet (AWS G5)"),
    Device(r"a40", 696, _rates(149.7, tf32=74.8, int8=299.3, float32=37.4), "NVIDIA A40 datasheet"),
    Device(
        r"rtx a6000",
        768,
        _rates(154.8, tf32=77.4, int8=309.7, float32=38.7),
        "NVIDIA Ampere GA102 GPU Architecture whitepaper",
    ),
    Device(
        r"rtx 3090",
        936,
        _rates(71, tf32=35.6, int8=284, float32=35.6),
        "NVIDIA Ampere GA102 GPU Architecture whitepaper, FP32 accumulation",
    ),
    Device(
        r"l4",
        300,
        _rates(121, tf32=60, fp8=242.5, int8=242.5, float32=30.3),
        "NVIDIA L4 datasheet, halved to dense",
    ),
    Device(r"l40", 864, _rates(181.05, tf32=90.5, fp8=362, int8=362, float32=90.5), "NVIDIA L40 datasheet"),
    Device(r"l40s", 864, _rates(362.05, tf32=183, fp8=733, int8=733, float32=91.6), "NVIDIA L40S datasheet"),
    Device(
        r"rtx 6000 ada generation",
        960,
        _rates(364.2, tf32=182.1, fp8=728.5, int8=728.5, float32=91.1),
        "NVIDIA RTX 6000 Ada Generation datasheet, halved to dense",
    ),
    Device(
        r"rtx 4090",
        1008,
        _rates(165.2, tf32=82.6, fp8=330.3, int8=660.6, float32=82.6),
        "NVIDIA Ada GPU Architecture whitepaper, FP32 accumulation",
    ),
    Device(
        r"rtx 5090",
        1792,
        _rates(209.5, tf32=104.8, fp8=419, int8=838, fp4=1676, float32=104.8),
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, FP32 accumulation",
    ),
    # The product brief rounds to 2000 GB/s what its 5120 bit at 1593 MHz come to.
    Device(
        r"h100 pcie",
        2039,
        _rates(756, tf32=378, fp8=1513, int8=1513, float32=51.2),
        f"{_H100_PAPER}; NVIDIA H100 PCIe product brief PB-11133 (bandwidth)",
    ),
    Device(r"h100 (sxm5 )?80gb hbm3", 3352, _HOPPER, _H100_PAPER),
    Device(r"h100 nvl", 3938, _HOPPER_NVL, "NVIDIA H100 NVL datasheet, halved to dense"),
    Device(r"h200", 4800, _HOPPER, "NVIDIA H200 datasheet, halved to dense"),
    Device(r"h200 nvl", 4800, _HOPPER_NVL, "NVIDIA H200 NVL datasheet, halved to dense"),
    Device(r"gh200 (480|120)gb", 4000, _HOPPER, "NVIDIA GH200 Grace Hopper Superchip datasheet (96 GB HBM3)"),
    Device(
        r"gh200 144gb? hbm3e", 4900, _HOPPER, "NVIDIA GH200 Grace Hopper Superchip datasheet (144 GB HBM3e)"
    ),
    Device(
        r"b200",
        7700,
        _rates(2250, tf32=1125, fp8=4500, int8=4500, fp4=9000, float32=75),
        "NVIDIA Blackwell datasheet, HGX B200 (180 GB), per GPU, halved to dense",
    ),
    Device(
        r"gb200",
        8000,
        {**_GB200_RATES, "int8": 5000, "fp4": 10000},
        "NVIDIA GB200 NVL72 datasheet, per GPU, dense",
    ),
    # No int8 and fp4 for B300: sources disagree.
    Device(
        r"b300( sxm6)?( ac)?",
        8000,
        _rates(2250, tf32=1125, fp8=4500, float32=75),
        "NVIDIA HGX B300 datasheet, dense",
    ),
    Device(r"gb300", 8000, {**_GB200_RATES, "fp4": 15000}, "NVIDIA GB300 NVL72 datasheet, per GPU, dense"),
)

_DTYPES = {
    "bfloat16": r"bfloat16|bf16",
    "float16": r"float16|fp16|half",
    "float32": r"float32|fp32|float",
    "tf32": r"tf32|tensorfloat32",
    "fp8": r"(fp8|float8)(_.*)?",
    "int8": r"int8|w8a8_int8",
    "fp4": r"nvfp4|(fp4|float4)(_.*)?",
}


def canonical_dtype(dtype: str) -> str | None:
    """The table's name of a dtype such as ``torch.float8_e4m3fn``; None if it has none."""
    name = dtype.lower().removeprefix("torch.")
    return next((known for known, pattern in _DTYPES.items() if re.fullmatch(pattern, name)), None)


@functools.lru_cache(maxsize=256)
def lookup(name: str, dtype: str) -> Peaks | None:
    """Published peaks of a device.

    Args:
        name: as NVML says it, such as ``NVIDIA H100 80GB HBM3``.
        dtype: what the products compute in, such as ``bfloat16`` or ``torch.float8_e4m3fn``.

    Returns:
        None where nothing is published for exactly this device and dtype: a relative of a known device (a
        laptop's, a MIG slice, a virtual one) has other peaks, and they must be measured.
    """
    kind = canonical_dtype(dtype)
    if kind is None:
        return None
    words = re.sub(r"[\s_-]+", " ", name.lower()).strip()
    words = re.sub(r"^nvidia ", "", words)
    words = re.sub(r"^(tesla|geforce) ", "", words)
    for device in DEVICES:
        if kind in device.tflops and re.fullmatch(device.pattern, words):
            return Peaks(device.bandwidth * 1e9, device.tflops[kind] * 1e12, kind, "nominal", device.source)
    return None


def nominal_bandwidth(bus_width_bits: int, memory_clock_megahertz: float) -> float:
    """Bytes per second of a memory bus that moves two bits a line and clock, as NVML's figures mean it."""
    return bus_width_bits / 8 * memory_clock_megahertz * 1e6 * 2
