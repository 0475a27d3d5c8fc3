"""One line that says what a table was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = ("llmprobe", "vllm", "transformers", "torch")


def machine_line() -> str:
    """Processor, cores, GPUs, versions, and how busy the machine was when this was called."""
    cores = len(os.sched_getaffinity(0))
    parts = [f"{_processor()}, {cores} core{'s' if cores > 1 else ''}", *_gpus()]
    parts.append(f"Linux {platform.release().split('-')[0]}")
    parts.append(f"Python {platform.python_version()}")
    parts += _versions()
    parts.append(f"load before {os.getloadavg()[0]:.1f}")
    return "; ".join(parts)


def has_gpu() -> bool:
    """Whether an NVIDIA driver is at work here."""
    return Path("/dev/nvidiactl").exists()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _gpus() -> Iterator[str]:
    if not has_gpu():
        return
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # the others are measured by others
        command.append(f"--id={visible}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return
    names = [line.partition(",")[0].strip() for line in answer.splitlines()]
    for name in dict.fromkeys(names):
        driver = answer.splitlines()[0].partition(",")[2].strip()
        yield f"{names.count(name)} x {name}, driver {driver}"


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
