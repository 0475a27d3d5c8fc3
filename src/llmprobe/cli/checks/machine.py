"""Checks of the machine: permissions, peaks."""

from __future__ import annotations

import os
from pathlib import Path

from llmprobe.cli.checks import Check
from llmprobe.cli.checks.gpus import Gpus
from llmprobe.collect.peaks import load_peaks
from llmprobe.compute.hardware import lookup

_DRIVER_PARAMETERS = Path("/proc/driver/nvidia/params")


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


def peaks(gpus: Gpus, path: Path | None = None) -> Check:
    """Whether utilisation can be told: published or measured peaks for the devices here."""
    measured = load_peaks(path)
    name, fix = "peaks", "llmprobe calibrate"
    if gpus.found:
        unknown = [
            gpu.hardware.name
            for gpu in gpus.found
            if gpu.hardware.uuid not in measured
            and (gpu.hardware.mig or lookup(gpu.hardware.name, "bfloat16") is None)
        ]
        if unknown:
            return Check(name, "not ok", f"none for {', '.join(unknown)}", "no MBU, no MFU, no floor", fix)
        return Check(name, "ok", "known for every GPU")
    if any(key.startswith("cpu:") for key in measured):
        return Check(name, "ok", "this machine was measured")
    return Check(
        name, "not ok", "this processor was not measured", "no MBU, no MFU and no floor on a CPU", fix
    )
