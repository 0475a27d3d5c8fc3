"""Checks of the machine: GPUs and their counters, permissions, peaks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmprobe.cli.checks import Check
from llmprobe.collect.peaks import load_peaks
from llmprobe.compute.hardware import lookup

_DRIVER_PARAMETERS = Path("/proc/driver/nvidia/params")


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """pynvml, initialised; raises what it raises."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def gpu() -> Check:
    """GPUs and driver, as NVML sees them."""
    try:
        with _nvml() as nvml:
            names = [
                _text(nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)))
                for index in range(nvml.nvmlDeviceGetCount())
            ]
            driver = _text(nvml.nvmlSystemGetDriverVersion())
    except Exception as error:  # noqa: BLE001 - NVML raises one class a failure; the text says which
        if Path("/dev/nvidiactl").exists():
            return Check(
                "GPU",
                "not ok",
                f"there is one, but NVML fails: {error}",
                "power, clocks and hardware counters are missing; the driver and its library may differ",
                "restart after a driver update; in a container, pass the GPU with its utility capability",
            )
        return Check(
            "GPU", "absent", "no NVIDIA GPU here", "steps of a CPU engine are timed by the host clock"
        )
    if not names:
        return Check("GPU", "absent", f"driver {driver}, no GPU", "nothing to measure on")
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return Check("GPU", "ok", f"{kinds}, driver {driver}")


def gpm() -> Check:
    """Hardware counters through NVML GPM (Hopper and newer)."""
    try:
        with _nvml() as nvml:
            supported = [
                bool(nvml.nvmlGpmQueryDeviceSupport(nvml.nvmlDeviceGetHandleByIndex(i)).isSupportedDevice)
                for i in range(nvml.nvmlDeviceGetCount())
            ]
    except Exception as error:  # noqa: BLE001 - as above; an old driver has no such call at all
        return Check("GPM counters", "absent", f"not available: {error}", "figures stand without this check")
    if supported and all(supported):
        return Check("GPM counters", "ok", "every GPU has them")
    return Check(
        "GPM counters",
        "absent",
        f"{sum(supported)} of {len(supported)} GPUs have them",
        "needs Hopper or newer; elsewhere memory and tensor activity are not cross-checked",
    )


def profiling_permission(parameters: Path = _DRIVER_PARAMETERS) -> Check:
    """Whether the driver lets this user read performance counters (ncu)."""
    name = "counter permission"
    try:
        lines = parameters.read_text().splitlines()
    except OSError:
        return Check(name, "absent", "no NVIDIA driver here", "needed by ncu only")
    value = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("RmProfilingAdminOnly")), ""
    )
    if value == "1" and os.geteuid() != 0:
        return Check(
            name,
            "not ok",
            "RmProfilingAdminOnly: 1",
            "ncu can be used by root only; nothing else of llmprobe needs it",
            "options nvidia NVreg_RestrictProfilingToAdminUsers=0 in /etc/modprobe.d, then reload the driver",
        )
    return Check(name, "ok", f"RmProfilingAdminOnly: {value or 'not set'}")


def peaks(path: Path | None = None) -> Check:
    """Whether utilisation can be told: published or measured peaks for the devices here."""
    measured = load_peaks(path)
    name, fix = "peaks", "llmprobe calibrate"
    try:
        with _nvml() as nvml:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            gpus = [
                (_text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle)))
                for handle in handles
            ]
    except Exception:  # noqa: BLE001 - no NVML, no GPUs
        gpus = []
    if gpus:
        unknown = [gpu for gpu, uuid in gpus if lookup(gpu, "bfloat16") is None and uuid not in measured]
        if unknown:
            return Check(name, "not ok", f"none for {', '.join(unknown)}", "no MBU, no MFU, no floor", fix)
        return Check(name, "ok", "known for every GPU")
    if any(key.startswith("cpu:") for key in measured):
        return Check(name, "ok", "this machine was measured")
    return Check(
        name, "not ok", "this processor was not measured", "no MBU, no MFU and no floor on a CPU", fix
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
