"""Peak rates of a worker's device: published ones, or those that ``llmprobe calibrate`` measured here.

Measured rates lie in one small JSON file in the user's cache, by device.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llmprobe.collect.nvml import Hardware
from llmprobe.compute.hardware import Peaks, canonical_dtype, lookup

_SCHEMA = 1
#: What ``llmprobe calibrate`` multiplies on a processor, and on a GPU that has them.
CPU_DTYPES = ("float32", "bfloat16", "float16")
GPU_DTYPES = ("bfloat16", "float16", "float32", "fp8", "int8")
#: NVML's bandwidth beyond this factor of the published one means something else than we think.
_PLAUSIBLE_RATIO = 1.3
#: From this share of a processor's time on, others made a measurement of it too low to be relied on.
BUSY_RATIO = 0.2


@dataclass(frozen=True)
class Calibration:
    """What was measured on one device.

    ``device`` is its key (`cpu_key`, or a GPU's UUID); ``flops_per_second`` is by dtype; ``threads`` is the
    number of CPU threads that worked, None for a GPU; ``when`` is in Unix seconds; ``others_ratio`` is the
    share of a processor's time that other programs used meanwhile, None for a GPU or if it is not known.
    """

    device: str
    name: str
    bandwidth_bytes_per_second: float
    flops_per_second: dict[str, float]
    when: float
    threads: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    others_ratio: float | None = None

    @property
    def caveat(self) -> str:
        """Why the rates are too low; empty where the processor was quiet enough."""
        if self.others_ratio is None or self.others_ratio < BUSY_RATIO:
            return ""
        return (
            f"peaks were measured while other programs used {self.others_ratio:.0%} of the processor, so "
            "MBU, MFU and floors may read too high: run `llmprobe calibrate` again once it is quiet"
        )

    def peaks(self, dtype: str, source: str) -> Peaks | None:
        """As peaks for one dtype; None if its products were not measured.

        A processor that lacks a 16-bit type may multiply it a hundred times slower than float32. That is no
        roof: engines convert first. So there the rate is float32's.
        """
        kind = canonical_dtype(dtype)
        rate = self.flops_per_second.get(kind or "")
        if kind is None or rate is None:
            return None
        converted = self.flops_per_second.get("float32", 0.0)
        slower = kind in ("bfloat16", "float16") and self.threads is not None and rate < converted
        day = datetime.fromtimestamp(self.when, timezone.utc).date().isoformat()
        threads = f" with {self.threads} threads" if self.threads else ""
        detail = f"measured on {self.name}{threads} by `llmprobe calibrate` on {day}"
        if slower:
            rate, detail = converted, f"{detail}, in float32: it has no {kind}"
        return Peaks(self.bandwidth_bytes_per_second, rate, kind, source, detail, self.caveat)


def cpu_key(name: str, cpus: int, threads: int) -> str:
    """The key of a processor: its model name, the logical CPUs of the machine, the threads that worked."""
    return f"cpu:{name}:{cpus}:{threads}"


def peaks_path(environ: Mapping[str, str] | None = None) -> Path:
    """The file with the measured rates. Raises OSError where a user has no home (in containers)."""
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_CACHE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "llmprobe" / "peaks.json"
    try:
        home = Path(environ.get("HOME") or "~").expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None
    return home / ".cache" / "llmprobe" / "peaks.json"


def load_peaks(path: Path | None = None) -> dict[str, Calibration]:
    """Every measured device by its key. Empty where nothing was measured or the file cannot be read."""
    try:
        stored = json.loads((path or peaks_path()).read_text())
        if stored["schema"] != _SCHEMA:
            return {}
        found = (_calibration(entry) for entry in stored["devices"])
        return {calibration.device: calibration for calibration in found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save_peaks(calibrations: Iterable[Calibration], path: Path | None = None) -> Path:
    """Add measured devices to those stored; an older measurement of the same device is replaced.

    Returns:
        The file. Raises OSError if it cannot be written.
    """
    path = path or peaks_path()
    devices = load_peaks(path) | {calibration.device: calibration for calibration in calibrations}
    stored = {"schema": _SCHEMA, "devices": [asdict(devices[key]) for key in sorted(devices)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")
    try:
        temporary.write_text(json.dumps(stored, indent=1) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def peaks_for(
    facts: Mapping[str, Any], path: Path | None = None, gpu: Hardware | None = None
) -> Peaks | None:
    """The roofs that a worker's utilisation is a ratio of.

    Args:
        facts: a journal's facts: ``device`` (``type``, ``name``, ``uuid``, ``threads`` where known) and
            ``model.compute_dtype``.
        path: other than the default file.
        gpu: what NVML says about the device, where it was asked.

    Returns:
        Published rates if there are any for this device and dtype, so that ratios compare between machines,
        with NVML's bandwidth where it tells one; else measured ones; else None. A slice of a GPU has no
        published rates.
    """
    device, dtype = _device_and_dtype(facts)
    published = None if gpu is not None and gpu.mig else lookup(str(device.get("name", "")), dtype)
    if published is not None and gpu is not None:
        published = _with_bandwidth_of(gpu, published)
    return published or _measured(device, dtype, "calibrated", path)


def attainable_for(facts: Mapping[str, Any], path: Path | None = None) -> Peaks | None:
    """What a worker's device reached when it was measured; None if it was not. Arguments as `peaks_for`."""
    device, dtype = _device_and_dtype(facts)
    return _measured(device, dtype, "attainable", path)


def measurable(facts: Mapping[str, Any]) -> bool:
    """Whether ``llmprobe calibrate`` measures the products of a worker, as far as that is known."""
    device, dtype = _device_and_dtype(facts)
    return not dtype or canonical_dtype(dtype) in (CPU_DTYPES if device.get("type") == "cpu" else GPU_DTYPES)


def why_no_peaks(facts: Mapping[str, Any], *, mig: bool = False) -> str:
    """Where `peaks_for` finds none: for which products there are none, and what helps.

    Args:
        facts: a journal's, as of `peaks_for`.
        mig: the device is a slice of a GPU.
    """
    device, dtype = _device_and_dtype(facts)
    name = str(device.get("name") or "this device")
    if mig:
        name = f"a MIG slice of {name}"
    said = f"no peak rates for {name}" + (f" in {canonical_dtype(dtype) or dtype}" if dtype else "")
    if not measurable(facts):
        return f"{said}: none are published, and `llmprobe calibrate` measures no such products there"
    return f"{said}: run `llmprobe calibrate`"


def _with_bandwidth_of(gpu: Hardware, published: Peaks) -> Peaks:
    bandwidth = gpu.bandwidth_bytes_per_second
    if bandwidth is None:
        return published
    ratio = bandwidth / published.bandwidth_bytes_per_second
    clock = (gpu.memory_clock_max_hertz or 0.0) / 1e6
    told = f"{gpu.bus_width_bits} bit x {clock:.0f} MHz x 2 by NVML"
    if not 1 / _PLAUSIBLE_RATIO <= ratio <= _PLAUSIBLE_RATIO:
        return replace(published, detail=f"{published.detail} ({told} is {ratio:.2f} of that: not used)")
    detail = f"FLOP/s: {published.detail}; bandwidth: {told}"
    return replace(published, bandwidth_bytes_per_second=bandwidth, detail=detail)


def _measured(device: Mapping[str, Any], dtype: str, source: str, path: Path | None) -> Peaks | None:
    calibrations = load_peaks(path)
    if device.get("type") == "cpu":
        name, cpus, threads = str(device.get("name")), os.cpu_count() or 1, device.get("threads")
        same = [known for known in calibrations.values() if known.device.startswith(f"cpu:{name}:{cpus}:")]
        exact = [known for known in same if known.threads == threads]
        # A worker that does not say how many threads it has is taken to have the whole processor.
        candidates = exact or sorted(same, key=lambda known: known.threads or 0)[-1:]
    else:
        candidates = [known for known in calibrations.values() if known.device == device.get("uuid")]
    return candidates[0].peaks(dtype, source) if candidates else None


def _device_and_dtype(facts: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    device, model = facts.get("device"), facts.get("model")
    dtype = model.get("compute_dtype") if isinstance(model, Mapping) else None
    return device if isinstance(device, Mapping) else {}, dtype if isinstance(dtype, str) else ""


def _calibration(entry: Mapping[str, Any]) -> Calibration:
    threads, others = entry.get("threads"), entry.get("others_ratio")
    return Calibration(
        device=str(entry["device"]),
        name=str(entry["name"]),
        bandwidth_bytes_per_second=float(entry["bandwidth_bytes_per_second"]),
        flops_per_second={str(dtype): float(rate) for dtype, rate in entry["flops_per_second"].items()},
        when=float(entry["when"]),
        threads=None if threads is None else int(threads),
        versions={str(name): str(version) for name, version in entry.get("versions", {}).items()},
        others_ratio=None if others is None else float(others),
    )
