"""What ``llmprobe top`` shows: one row a server and phase, from the answer of ``/api/status``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

#: From here on there is room for what an engine's front end tells.
WIDE = 110

_SHORT = {
    "memory_bound": "memory",
    "compute_bound": "compute",
    "sync_bound": "sync",
    "inefficient_kernels": "slow kernels",
    "host_between_steps": "host",
    "launch_bubbles": "bubbles",
}
#: Columns that all but the server's name and the verdict take, and what the former may take of the rest.
_NARROW_REST, _WIDE_REST, _MOST_SERVER = 46, 80, 20
_STYLES = {"sync_bound": "yellow", "inefficient_kernels": "yellow", "unknown": "dim", "idle": "dim"}


@dataclass(frozen=True)
class Row:
    """One phase of one server, over the last 30 s. What is not known is None. Seconds and ratios.

    Of several ranks the steps' rate is the mean, the step times are the slowest rank's, ratios the mean. Of
    several engines counts are summed, latencies the worst.
    """

    server: str
    state: str  # "on", "off" or "inert"
    headline: str
    phase: str | None = None  # None: nothing ran
    bottleneck: str | None = None
    cause: str | None = None
    confidence: float | None = None
    steps_per_second: float | None = None
    step_seconds_p50: float | None = None
    step_seconds_p99: float | None = None
    mbu: float | None = None
    mfu: float | None = None
    sync_gap: float | None = None
    sync_gap_is_lower_bound: bool = False
    requests_running: int | None = None
    requests_waiting: int | None = None
    kv_usage: float | None = None
    ttft_seconds_p50: float | None = None
    tpot_seconds_p50: float | None = None


#: Name of a sort order → what it sorts by; numbers go down, names up, and what is not known goes last.
SORTS: dict[str, Callable[[Row], Any]] = {
    "server": lambda row: row.server,
    "phase": lambda row: row.phase,
    "bound": lambda row: row.bottleneck,
    "steps": lambda row: row.steps_per_second,
    "p50": lambda row: row.step_seconds_p50,
    "mbu": lambda row: row.mbu,
    "mfu": lambda row: row.mfu,
    "gap": lambda row: row.sync_gap,
    "waiting": lambda row: row.requests_waiting,
    "kv": lambda row: row.kv_usage,
    "ttft": lambda row: row.ttft_seconds_p50,
    "tpot": lambda row: row.tpot_seconds_p50,
}


def rows(status: dict[str, Any]) -> list[Row]:
    """One row a server and phase; one for a server in which nothing ran."""
    return [row for server in status["servers"] for row in _server_rows(server)]


def ordered(found: Iterable[Row], sort: str, reverse: bool = False) -> list[Row]:
    """The rows by one of `SORTS`; equal ones by server and phase."""
    by_name = sorted(found, key=lambda row: (row.server, row.phase or ""))
    of = SORTS[sort]
    known = [row for row in by_name if of(row) is not None]
    down = bool(known) and isinstance(of(known[0]), (int, float))
    known.sort(key=of, reverse=down != reverse)
    return known + [row for row in by_name if of(row) is None]


def as_json(found: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows for programs; what is not known is null."""
    return [dataclasses.asdict(row) for row in found]


def table(found: Sequence[Row], width: int, selected: int | None = None, sort: str = "") -> Table:
    """The rows as a table that fits into ``width`` columns (80 at least)."""
    wide = width >= WIDE
    shown = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    columns = ["server", "phase", "bound", "sure", "steps", "p50", "mbu", "mfu", "gap"]
    if wide:
        columns[6:6] = ["p99"]
        columns += ["running", "waiting", "kv", "ttft", "tpot"]
    longest = max((len(_server(row, marked=selected is not None)) for row in found), default=0)
    name_width = min(max(longest, len("server*")), _MOST_SERVER)
    verdict_width = max(width - name_width - (_WIDE_REST if wide else _NARROW_REST), 10)
    for name in columns:
        label = f"{_HEADS.get(name, name)}{'*' if name == sort else ''}"
        left = name in ("server", "phase", "bound")
        shown.add_column(
            label,
            justify="left" if left else "right",
            no_wrap=True,
            overflow="ellipsis",
            min_width=8 if name == "phase" else None,
            max_width={"server": name_width, "bound": verdict_width}.get(name),
        )
    for index, row in enumerate(found):
        cells = _cells(row, marked=selected is not None, here=index == selected)
        style = "reverse" if index == selected else ""
        texts = (cell if isinstance(cell, Text) else Text(cell) for cell in map(cells.__getitem__, columns))
        shown.add_row(*texts, style=style)
    return shown


def headlines(found: Sequence[Row], width: int) -> list[Text]:
    """The headline of each server that has one, a line each."""
    lines = {row.server: row.headline for row in found if row.headline}
    return [Text.assemble((f"{server}: ", "bold"), line) for server, line in lines.items()]


def screen(
    found: Sequence[Row], size: tuple[int, int], *, selected: int | None, sort: str, reverse: bool, note: str
) -> RenderableType:
    """The whole screen: title, table, headlines, keys.

    Args:
        size: columns and lines of the terminal.
        note: stands in the title, such as why nothing is new.
    """
    width, height = size
    servers = len({row.server for row in found})
    title = f"llmprobe top   {servers} {'server' if servers == 1 else 'servers'}"
    title += f"   by {sort}{' (reversed)' if reverse else ''}   {note}"
    # Title, names of columns and keys always; rows and headlines share the rest.
    room = max(height - 2 - (selected is not None), 2)
    lines = _most(found, selected, width, max(room - max(len(found), 1), room // 3))
    room -= len(lines)
    first = max(min((selected or 0) - room // 2, len(found) - room), 0)
    visible = found[first : first + room]
    parts: list[RenderableType] = [Text(title, style="bold", no_wrap=True, overflow="ellipsis")]
    if visible:
        here = None if selected is None else selected - first
        parts.append(table(visible, width, here, sort))
    else:
        parts.append(Text("No server is running with LLMPROBE=1."))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        parts.append(line)
    if selected is not None:
        keys = "q quit  s sort  r reverse  ↑↓ choose  enter details"
        parts.append(Text(keys, style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def _most(found: Sequence[Row], selected: int | None, width: int, most: int) -> list[Text]:
    """The headlines for which there is room, that of the chosen server first where not all fit."""
    lines = headlines(found, width)
    if len(lines) <= most:
        return lines
    chosen = [row for row in found if selected is not None and row.server == found[selected].server]
    first = headlines([*chosen, *found], width)[: max(most - 1, 0)]
    return [*first, Text(f"… and headlines of {len(lines) - len(first)} more", style="dim")][:most]


_HEADS = {
    "steps": "steps/s",
    "p50": "p50 ms",
    "p99": "p99 ms",
    "mbu": "MBU",
    "mfu": "MFU",
    "running": "run",
    "waiting": "wait",
    "kv": "KV",
    "ttft": "TTFT ms",
    "tpot": "TPOT ms",
}


def _cells(row: Row, *, marked: bool, here: bool) -> dict[str, str | Text]:
    bound = _SHORT.get(row.bottleneck or "", row.bottleneck or "")
    if row.cause:
        bound += f": {_SHORT.get(row.cause, row.cause.replace('_', ' '))}"
    gap = _percent(row.sync_gap)
    return {
        "server": _server(row, marked=marked, here=here),
        "phase": row.phase or "",
        "bound": Text(bound, style=_STYLES.get(row.bottleneck or "", "")),
        # As `status` has it: there is no verdict to be sure of.
        "sure": "" if row.bottleneck in ("idle", "unknown") else _percent(row.confidence),
        "steps": "" if row.steps_per_second is None else f"{row.steps_per_second:.1f}",
        "p50": _ms(row.step_seconds_p50),
        "p99": _ms(row.step_seconds_p99),
        "mbu": _percent(row.mbu),
        "mfu": _percent(row.mfu),
        "gap": f"≥{gap}" if gap and row.sync_gap_is_lower_bound else gap,
        "running": "" if row.requests_running is None else str(row.requests_running),
        "waiting": "" if row.requests_waiting is None else str(row.requests_waiting),
        "kv": _percent(row.kv_usage),
        "ttft": _ms(row.ttft_seconds_p50),
        "tpot": _ms(row.tpot_seconds_p50),
    }


def _server(row: Row, *, marked: bool, here: bool = False) -> str:
    mark = (">" if here else " ") if marked else ""
    return f"{mark}{row.server}{'' if row.state == 'on' else f' ({row.state})'}"


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio * 100:.0f}%"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    milliseconds = seconds * 1e3
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _server_rows(server: dict[str, Any]) -> list[Row]:
    engines = server["engines"]
    same = Row(
        server=server["server"],
        state="inert" if server["inert"] else "on" if server["armed"] else "off",
        headline=server.get("headline") or "",
        requests_running=_total(engine["requests_running"] for engine in engines),
        requests_waiting=_total(engine["requests_waiting"] for engine in engines),
        kv_usage=_worst(engine["kv_usage"] for engine in engines),
        ttft_seconds_p50=_worst(_latency(engine, "time_to_first_token") for engine in engines),
        tpot_seconds_p50=_worst(_latency(engine, "time_per_output_token") for engine in engines),
    )
    verdicts = server.get("verdicts") or {}
    phases = list(dict.fromkeys(phase for rank in server["ranks"] for phase in rank["figures"]))
    if not phases:
        return [same]
    return [_phase_row(same, server, phase, verdicts.get(phase) or {}) for phase in phases]


def _phase_row(same: Row, server: dict[str, Any], phase: str, verdict: dict[str, Any]) -> Row:
    figures = [rank["figures"][phase] for rank in server["ranks"] if phase in rank["figures"]]
    return dataclasses.replace(
        same,
        phase=phase,
        bottleneck=verdict.get("bottleneck"),
        cause=verdict.get("cause"),
        confidence=verdict.get("confidence"),
        steps_per_second=_mean(found["steps_per_second"] for found in figures),
        step_seconds_p50=_worst(found["step_seconds_p50"] for found in figures),
        step_seconds_p99=_worst(found["step_seconds_p99"] for found in figures),
        mbu=_mean(found["mbu_step"] for found in figures),
        mfu=_mean(found["mfu_step"] for found in figures),
        sync_gap=_mean(found["sync_gap_ratio"] for found in figures),
        sync_gap_is_lower_bound=any(found["sync_gap_is_lower_bound"] for found in figures),
    )


def _latency(engine: dict[str, Any], name: str) -> float | None:
    found = engine["recent_latency"].get(name)
    return None if found is None else found["p50"]


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _total(values: Iterable[int | None]) -> int | None:
    known = _known(values)
    return sum(known) if known else None


def _worst(values: Iterable[float | None]) -> float | None:
    return max(_known(values), default=None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None
