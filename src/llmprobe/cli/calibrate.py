"""``llmprobe calibrate``: measure the roofs of this machine's devices, once."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.table import Table

from llmprobe.cli.console import fail
from llmprobe.cli.output import err, out, print_json, scaled
from llmprobe.collect.peaks import Calibration, save_peaks


def calibrate(
    seconds: Annotated[
        float, typer.Option(min=0.1, max=60, help="About how long each measurement takes.")
    ] = 1.0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads to use instead of torch's own number; kept beside the others."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure what this machine's processor and GPUs reach: memory bandwidth and FLOP/s.

    Utilisation is a ratio of a device's peaks. Those of many GPUs are published and known; those of a
    processor are not, and have to be measured once, best while nothing else runs. The result is kept in the
    user's cache, and the agent finds it there when an engine starts.
    """
    # Each of these takes a second to import or to look.
    from llmprobe.cli.measure_peaks import measure_cpu, measure_gpus

    with err.status("loading torch") as status:

        def progress(what: str, number: int, total: int) -> None:
            status.update(f"measuring {what} ({number + 1} of {total})")
            if not err.is_terminal:
                err.print(f"measuring {what} ({number + 1} of {total})")

        others = _Others()
        cpu = measure_cpu(_cpu_name(), seconds, threads, progress)
        cpu = replace(cpu, others_ratio=others.ratio())
        measured = [cpu, *measure_gpus(seconds, progress)]
    if cpu.caveat:
        err.print(f"warning: {cpu.caveat}", style="yellow", soft_wrap=True)
    try:
        path = save_peaks(measured)
    except OSError as error:
        fail(f"the result cannot be kept: {error}; set XDG_CACHE_HOME")
    if json:
        print_json({"path": str(path), "devices": [asdict(calibration) for calibration in measured]})
        return
    out.print(_table(measured))
    out.print(f"kept in {path}", soft_wrap=True)
    out.print(
        "vLLM's CPU worker binds its threads to some of the cores only (VLLM_CPU_OMP_THREADS_BIND): to "
        "compare with that many, add --threads N.",
        style="dim",
    )


def _table(measured: list[Calibration]) -> Table:
    dtypes = list(dict.fromkeys(dtype for calibration in measured for dtype in calibration.flops_per_second))
    table = Table(title="Measured peaks (best of repeats)")
    table.add_column("device")
    table.add_column("threads", justify="right")
    table.add_column("copy", justify="right")
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    for calibration in measured:
        rates = (calibration.flops_per_second.get(dtype) for dtype in dtypes)
        table.add_row(
            calibration.name,
            str(calibration.threads or ""),
            scaled(calibration.bandwidth_bytes_per_second, "B/s"),
            *("" if rate is None else scaled(rate, "FLOP/s") for rate in rates),
        )
    return table


class _Others:
    """How much of the processor other programs use, from here on."""

    def __init__(self) -> None:
        self._before = self._now()

    def ratio(self) -> float:
        """Of the time of all its cores; what they use is not ours to measure with."""
        (used, own, all_of_it), (used_before, own_before, all_before) = self._now(), self._before
        total = all_of_it - all_before
        others = (used - used_before) - (own - own_before)
        return min(max(others / total, 0.0), 1.0) if total > 0 else 0.0

    def _now(self) -> tuple[float, float, float]:
        """Seconds that all programs used, that this one used, and that there were, since some time."""
        import psutil

        machine, mine = psutil.cpu_times(), psutil.Process().cpu_times()
        unused = machine.idle + getattr(machine, "iowait", 0.0)
        # Guests' time is in that of their hosts.
        counted = sum(getattr(machine, name) for name in machine._fields if not name.startswith("guest"))
        return counted - unused, mine.user + mine.system, counted


def _cpu_name() -> str:
    from llmprobe.hooks.torch_model import cpu_name

    return cpu_name()
