"""Checks of the GPUs: whether NVML tells of them, their counters, MIG, clocks, and who uses them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmprobe.cli.checks import Check
from llmprobe.collect import procfs
from llmprobe.collect.gpu_clocks import held_down_by, held_down_note, limit_notes
from llmprobe.collect.nvml import GpuProcess, Hardware, Nvml, NvmlError, Readings, SlowReadings, open_nvml

_NO_GPU = "no NVIDIA GPU here"
_DEVICE = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class SeenGpu:
    """One GPU as NVML shows it now."""

    hardware: Hardware
    no_counters: str
    now: Readings
    slow: SlowReadings
    processes: list[GpuProcess] | None


@dataclass(frozen=True)
class Gpus:
    """Every GPU that could be looked at, and why others, or all, could not."""

    found: tuple[SeenGpu, ...] = ()
    error: str = ""

    @property
    def names(self) -> str:
        """Kinds and numbers of them."""
        names = [gpu.hardware.name for gpu in self.found]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def look(library: Callable[[], Nvml] = open_nvml) -> Gpus:
    """Look at every GPU once."""
    found, errors = [], []
    try:
        nvml = library()
    except NvmlError as error:
        return Gpus(error=str(error))
    with contextlib.closing(nvml):
        try:
            uuids = nvml.uuids()
        except NvmlError as error:
            return Gpus(error=str(error))
        for uuid in uuids:
            try:
                with contextlib.closing(nvml.gpu(uuid)) as gpu:
                    found.append(
                        SeenGpu(
                            gpu.hardware,
                            gpu.no_counters,
                            gpu.readings(),
                            gpu.slow_readings(),
                            gpu.processes(),
                        )
                    )
            except NvmlError as error:
                errors.append(str(error))
    return Gpus(tuple(found), "; ".join(errors))


def present(gpus: Gpus, device: Path = _DEVICE) -> Check:
    """GPUs and driver, as NVML sees them."""
    name = "GPU"
    why = "power, clocks and hardware counters are missing"
    if gpus.found:
        found = f"{gpus.names}, driver {gpus.found[0].hardware.driver_version}"
        if gpus.error:
            fix = "see dmesg for Xid messages; a GPU that is lost comes back after a reset"
            return Check(name, "not ok", f"{found}; not to be asked: {gpus.error}", why, fix)
        return Check(name, "ok", found)
    if device.exists():
        fix = "restart after a driver update; in a container, pass the GPU with its utility capability"
        found = f"there is one, but NVML shows none: {gpus.error or 'it lists no GPU'}"
        return Check(name, "not ok", found, f"{why}; the driver and its library may differ", fix)
    return Check(name, "absent", _NO_GPU, "steps of a CPU engine are timed by the host clock")


def counters(gpus: Gpus) -> Check:
    """Hardware counters through NVML GPM (Hopper and newer)."""
    name = "GPM counters"
    if not gpus.found:
        return Check(name, "absent", _NO_GPU, "figures stand without this check")
    without = [gpu for gpu in gpus.found if gpu.no_counters]
    if not without:
        return Check(name, "ok", "every GPU has them")
    return Check(
        name,
        "absent",
        f"{len(gpus.found) - len(without)} of {len(gpus.found)} GPUs have them: {without[0].no_counters}",
        "memory and tensor activity are not cross-checked; figures stand without",
    )


def slices(gpus: Gpus) -> Check:
    """MIG: what is known of a whole GPU is not true of its slices."""
    name = "MIG"
    split = [_at(gpus, gpu) for gpu in gpus.found if gpu.hardware.mig]
    if not split:
        return Check(name, "ok", "no GPU is split")
    return Check(
        name,
        "not ok",
        f"on for GPU {', '.join(split)}",
        "no peaks are published for a slice, and there are no counters: no MBU and MFU until measured",
        "llmprobe calibrate, where the engine sees its slice",
    )


def clocks(gpus: Gpus) -> Check:
    """Whether something holds the clocks down now, or will under load."""
    name = "GPU clocks"
    notes = []
    for gpu in gpus.found:
        of_gpu = limit_notes(gpu.hardware, gpu.now, gpu.slow)
        if reasons := held_down_by(gpu.hardware, gpu.now):
            of_gpu.append(held_down_note(gpu.hardware, gpu.now, reasons, "now"))
        notes += [f"GPU {_at(gpus, gpu)}: {note}" for note in of_gpu]
    if not notes:
        return Check(name, "ok", "nothing holds them down")
    why = "peaks are those of the full clocks: utilisation will look lower than the GPU can reach"
    return Check(
        name, "not ok", "; ".join(notes), why, "see cooling, power supply and `nvidia-smi -q -d POWER`"
    )


def users(gpus: Gpus, root: Path = Path("/")) -> Check:
    """Whether several processes share a GPU."""
    name = "GPU shared"
    if any(gpu.processes is None for gpu in gpus.found):
        return Check(name, "absent", "NVML does not list processes here", "sharing a GPU goes unnoticed")
    shared = {
        _at(gpus, gpu): [_named(process.pid, root) for process in gpu.processes or ()]
        for gpu in gpus.found
        if len(gpu.processes or ()) > 1
    }
    if not shared:
        count = sum(len(gpu.processes or ()) for gpu in gpus.found)
        return Check(name, "ok", f"{count or 'no'} process{'es' * (count != 1)}, none beside another")
    return Check(
        name,
        "not ok",
        "; ".join(f"GPU {at}: {', '.join(names)}" for at, names in shared.items()),
        "counters are those of all processes together: if these are not one server's, its verdict is unknown",
        "give the server GPUs of its own (CUDA_VISIBLE_DEVICES)",
    )


def _at(gpus: Gpus, gpu: SeenGpu) -> str:
    return str(gpus.found.index(gpu))


def _named(pid: int, root: Path) -> str:
    try:
        return f"{pid} ({procfs.read(root / 'proc' / str(pid) / 'comm').strip()})"
    except OSError:
        return str(pid)  # of another container
