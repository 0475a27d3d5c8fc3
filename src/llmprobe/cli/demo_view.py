"""What the demo shows: progress, the live table, and our figures beside the client's at the end."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmprobe.agent.client import AgentError, request
from llmprobe.cli.live import server_panel
from llmprobe.cli.output import err
from llmprobe.demo.client import ClientResult, Load

_LINE_EVERY_SECONDS = 5.0


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[float], None]]:
    """Shows a label and the seconds it takes; in a log, one line at the begin and one at the end."""
    if not err.is_terminal:
        err.print(label)
        begin = time.monotonic()
        yield lambda elapsed: None
        err.print(f"done in {time.monotonic() - begin:.0f} s")
        return
    with err.status(label) as status:
        yield lambda elapsed: status.update(f"{label}   {elapsed:.0f} s")


def watch(
    directory: Path, process: subprocess.Popen[bytes], title: str, meanwhile: Callable[[], None]
) -> None:
    """Show the server until ``process`` ends: a live table, or in a log a line now and then.

    Args:
        directory: the server's LLMPROBE_DIR; its agent is asked twice a second.
        process: what is waited for.
        title: stands above the table.
        meanwhile: called before each look.
    """
    begin = time.monotonic()
    shown = begin - _LINE_EVERY_SECONDS / 2
    live = Live(console=err, auto_refresh=False, transient=True) if err.is_terminal else None
    with live or contextlib.nullcontext():
        while process.poll() is None:
            meanwhile()
            server = _status(directory)
            elapsed = time.monotonic() - begin
            if live is not None:
                live.update(_screen(server, f"{title}   {elapsed:.0f} s"), refresh=True)
            elif time.monotonic() - shown >= _LINE_EVERY_SECONDS:
                shown = time.monotonic()
                err.print(f"{elapsed:4.0f} s  {_line(server)}", soft_wrap=True)
            time.sleep(0.5)


def _screen(server: dict[str, Any] | None, title: str) -> RenderableType:
    panel = server_panel(server) if server else Text("no figures yet")
    return Group(Text(title, style="bold"), panel)


def _status(directory: Path) -> dict[str, Any] | None:
    """The server as the agent shows it; None while it does not."""
    try:
        code, answer = request(directory, "GET", "/api/status", timeout=5.0)
    except AgentError:
        return None
    return answer["servers"][0] if code == 200 and answer["servers"] else None


def _line(server: dict[str, Any] | None) -> str:
    """The most telling figures in one line."""
    if server is None:
        return "no figures yet"
    parts = []
    for engine in server["engines"]:
        recent = engine["recent_latency"]
        parts.append(f"running {engine['requests_running']}")
        for name, short in (("time_to_first_token", "TTFT"), ("time_per_output_token", "TPOT")):
            if name in recent:
                parts.append(f"{short} {ms(recent[name]['p50'])} ms")
        if engine["kv_usage"] is not None:
            parts.append(f"KV {engine['kv_usage']:.1%}")
    for rank in server["ranks"]:
        for phase, found in rank["figures"].items():
            mbu, gap = found["mbu_step"], found["sync_gap_ratio"]
            extra = "" if mbu is None else f", MBU {mbu:.1%}"
            extra += "" if gap is None else f", sync gap {gap:.1%}"
            parts.append(f"{phase} {found['steps_per_second']:.1f} steps/s{extra}")
    return "; ".join(parts)


def comparison(runs: list[tuple[Load, ClientResult, dict[str, Any]]]) -> Table:
    """Our figures at the engine beside those of the client.

    Args:
        runs: load, what the client saw, and our report of the same time.
    """
    table = Table(title="llmprobe, at the engine, and the client, over HTTP", title_justify="left")
    table.add_column("load")
    table.add_column("seen by")
    for column in ("requests", "prompt", "generated", "TTFT p50", "TPOT p50"):
        table.add_column(column, justify="right")
    for load, result, measured in runs:
        engine = measured["servers"][0]["engines"][0]
        table.add_row(
            load.name,
            "llmprobe",
            str(engine["requests"]),
            str(engine["prompt_tokens"]),
            str(engine["generated_tokens"]),
            f"{ms(engine.get('ttft_seconds', {}).get('p50'))} ms",
            f"{ms(engine.get('tpot_seconds', {}).get('p50'))} ms",
        )
        table.add_row(
            "",
            "client",
            str(result.requests),
            str(result.prompt_tokens),
            str(result.generated_tokens),
            f"{ms(result.ttft_median_seconds)} ms",
            f"{ms(result.tpot_median_seconds)} ms",
        )
    return table


def ms(seconds: float | None) -> str:
    """Milliseconds with two decimals."""
    return "–" if seconds is None else f"{seconds * 1e3:.2f}"
