"""``llmprobe calibrate``: measure the roofs of this machine's devices, once."""

from __future__ import annotations

from dataclasses import asdict
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

    _warn_if_busy()
    with err.status("loading torch") as status:

        def progress(what: str, number: int, total: int) -> None:
            status.update(f"measuring {what} ({number + 1} of {total})")
            if not err.is_terminal:
                err.print(f"measuring {what} ({number + 1} of {total})")

        measured = [
            measure_cpu(_cpu_name(), seconds, threads, progress),
            *measure_gpus(seconds, progress),
        ]
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


def _warn_if_busy() -> None:
    import psutil

    busy = psutil.cpu_percent(interval=0.3)
    if busy > 20:
        err.print(
            f"warning: other programs use {busy:.0f} % of the processor; the figures will be too low",
            style="yellow",
        )


def _cpu_name() -> str:
    from llmprobe.hooks.torch_model import cpu_name

    return cpu_name()
