"""``llmprobe doctor``: look at everything llmprobe needs or could use, and say how to mend it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from llmprobe.cli.checks import Check, gpus, machine, packages, probe, windows
from llmprobe.cli.output import out, print_json

_STYLES = {"ok": "green", "not ok": "yellow", "absent": "dim"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check this machine and environment: each line what was found, why it matters, what to do.

    Run it in the environment of the engine. The exit status is 1 if something that is needed does not work.
    """
    checks = all_checks(os.environ)
    broken = [check for check in checks if check.broken]
    if as_json:
        print_json({"ok": not broken, "checks": [asdict(check) for check in checks]})
    else:
        out.print(_table(checks))
        out.print(
            f"{len(broken)} of these must be mended: {', '.join(check.name for check in broken)}"
            if broken
            else "Nothing that is needed is broken."
        )
    raise typer.Exit(1 if broken else 0)


def all_checks(environ: Mapping[str, str]) -> list[Check]:
    """Every check, in the order in which they are shown."""
    settings_check, settings = probe.settings(environ)
    seen = gpus.look()
    return [
        packages.python(),
        packages.torch(),
        packages.vllm(),
        packages.vllm_plugin(environ),
        packages.transformers(),
        packages.start_hook(),
        settings_check,
        probe.directory(settings.directory),
        probe.shared_memory(settings.directory),
        probe.port(settings.listen, settings.directory),
        probe.agent(settings.directory),
        probe.captures(settings),
        gpus.present(seen),
        gpus.counters(seen),
        *((gpus.slices(seen), gpus.clocks(seen), gpus.users(seen)) if seen.found else ()),
        machine.profiling_permission(),
        machine.peaks(seen),
        windows.kernel_windows(settings, seen, environ),
        packages.nvtx(),
        packages.nsys(),
    ]


def _table(checks: list[Check]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found; why it matters; what to do", overflow="fold")
    for check in checks:
        style = "red" if check.broken else _STYLES[check.state]
        mark = {"ok": "ok", "not ok": "not ok", "absent": "–"}[check.state]
        lines = [check.found, check.why, f"→ {check.fix}" if check.fix else ""]
        table.add_row(check.name, Text(mark, style=style), Text("\n".join(filter(None, lines))))
    return table
