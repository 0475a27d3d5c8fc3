"""``llmprobe top``: rows, orders, widths, and keys."""

from __future__ import annotations

import io
import json
import os
import time
from typing import Any

import pytest
from export.views_for_tests import engine, figures, rank, server, verdict
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from llmprobe.agent.client import AgentError
from llmprobe.cli import top, top_view
from llmprobe.cli.app import app
from llmprobe.export.summary import plain, summarize


def status(**changes: Any) -> dict[str, Any]:
    """What /api/status says of one busy server, one idle one, and one that is switched off."""
    found = summarize(
        [
            server("busy", ranks=[rank(), rank(rank=1, figures={"decode": figures(mbu_step=0.6)})]),
            server("idle", engines=[engine(requests_running=0, kv_usage=None)], ranks=[rank(figures={})]),
            server("off", armed=False, engines=[], ranks=[rank(figures={"decode": figures(mbu_step=None)})]),
        ]
    )
    found["servers"][0]["headline"] = "Decode memory-bound."
    found["servers"][0]["verdicts"] = {"decode": plain(verdict(confidence=0.87))}
    return {**found, "time": time.time(), **changes}


def shown(renderable: Any, width: int, height: int = 24, color: bool = False) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, height=height, force_terminal=color, no_color=not color).print(renderable)
    return file.getvalue().splitlines()


def by_key(found: list[top_view.Row]) -> dict[tuple[str, str | None], top_view.Row]:
    return {(row.server, row.phase): row for row in found}


def test_there_is_a_row_for_each_server_and_phase_and_one_for_an_idle_server() -> None:
    found = by_key(top_view.rows(status()))
    assert set(found) == {("busy", phase) for phase in ("prefill", "decode", "mixed")} | {
        ("idle", None),
        ("off", "decode"),
    }
    decode = found["busy", "decode"]
    assert decode.mbu == pytest.approx(0.5)  # of two ranks
    assert (decode.bottleneck, decode.confidence) == ("memory_bound", 0.87)
    assert found["busy", "prefill"].bottleneck is None
    assert found["off", "decode"].state == "off"


def test_what_is_not_known_is_blank_and_never_zero() -> None:
    found = [row for row in top_view.rows(status()) if row.server in ("off", "idle")]
    assert found[1].mbu is None
    assert found[1].requests_running is None
    line = next(line for line in shown(top_view.table(found, 140), 140) if line.startswith("idle"))
    assert line.split() == ["idle", "0", "2", "20.00"]  # running, waiting, TTFT; no KV, no step figures


@settings(max_examples=40, deadline=None)
@given(width=st.integers(80, 200), selected=st.booleans())
def test_no_line_is_wider_than_the_terminal(width: int, selected: bool) -> None:
    found = top_view.rows(status())
    long = "a-server-with-a-very-long-name.example.org:8000"
    found += [top_view.dataclasses.replace(row, server=long, cause="no_kernel_windows") for row in found]
    lines = shown(
        top_view.screen(
            found, (width, 24), selected=3 if selected else None, sort="gap", reverse=True, note="x" * 300
        ),
        width,
    )
    assert len(lines) <= 24
    assert all(len(line) <= width for line in lines)
    assert not any("  …" in line for line in lines)


def test_eighty_columns_show_the_figures_whole() -> None:
    lines = shown(top_view.table(top_view.ordered(top_view.rows(status()), "server"), 80), 80)
    assert " ".join(lines[0].split()) == "server phase bound sure steps/s p50 ms MBU MFU gap"
    assert lines[1].split() == ["busy", "decode", "memory", "87%", "1.0", "1000", "50%", "10%", "≥25%"]


def test_the_screen_has_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen = top_view.screen(
        top_view.rows(status()), (80, 24), selected=0, sort="server", reverse=False, note=""
    )
    file = io.StringIO()
    Console(file=file, width=80, force_terminal=True).print(screen)
    codes = {part.split("m")[0] for part in file.getvalue().split("\x1b[")[1:]}
    assert codes
    assert not any(code.split(";")[0].startswith(("3", "4", "9")) for code in codes), codes
    assert ">busy" in file.getvalue()  # the choice is seen without attributes too


@pytest.mark.parametrize("sort", top_view.SORTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_order_keeps_all_rows_and_puts_the_unknown_last(sort: str, reverse: bool) -> None:
    found = top_view.rows(status())
    ordered = top_view.ordered(found, sort, reverse)
    assert sorted(map(repr, ordered)) == sorted(map(repr, found))
    values = [top_view.SORTS[sort](row) for row in ordered]
    known = [value for value in values if value is not None]
    assert values[len(known) :] == [None] * (len(values) - len(known))
    down = bool(known) and isinstance(known[0], (int, float))
    assert known == sorted(known, reverse=down != reverse)


def test_many_rows_scroll_with_the_choice() -> None:
    found = [top_view.Row(f"s{number:03}", "on", "", phase="decode") for number in range(100)]
    lines = shown(top_view.screen(found, (80, 24), selected=70, sort="server", reverse=False, note=""), 80)
    assert any(line.startswith(">s070") for line in lines)
    assert lines[-1].startswith("q quit")


class Driven(top._Top):
    """The live view over a given status, without a terminal."""

    def __init__(self, seen: dict[str, Any]) -> None:
        super().__init__(directory=None, sort="server", reverse=False, interval=1.0)  # type: ignore[arg-type]
        self._status = seen

    def text(self) -> str:
        return "\n".join(shown(self._screen(with_keys=True), 80))


def test_keys_choose_sort_turn_round_and_open_details() -> None:
    view = Driven(status())
    assert ">busy" in view.text().splitlines()[2]
    assert not view._press("down")
    assert view.text().splitlines()[3].startswith(">busy")
    view._press("sort")
    assert "by phase" in view.text()
    view._press("reverse")
    assert "(reversed)" in view.text()
    view._press("details")
    assert "a/model" in view.text()
    view._press("back")
    assert "a/model" not in view.text()
    assert view._press("quit")
    assert not view._press("")


def pressed(view: Driven, *reads: bytes) -> bool:
    """Whether keys that come at once, or in so many reads, make it leave."""
    read, write = os.pipe()
    try:
        for keys in reads:
            os.write(write, keys)
        return view._wait(read, time.monotonic() + 10)
    finally:
        os.close(read)
        os.close(write)


def test_keys_that_come_in_one_read_all_count() -> None:
    view = Driven(status())
    found = view._rows()
    assert not pressed(view, b"\x1b[B\x1b[B")
    assert view._at(found) == 2
    assert not pressed(view, b"\x1bOAj\x1b[1;5B\x1b[A")  # one of them means nothing
    assert view._at(found) == 1
    assert pressed(view, b"\x1b[Bq")
    assert view._at(found) == 2


def test_escape_leaves_the_details() -> None:
    view = Driven(status())
    view._press("details")
    assert not pressed(view, b"\x1b")
    assert not view._details


@pytest.mark.parametrize("height", [4, 10, 23])
def test_all_of_the_details_can_be_reached(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "out", Console(width=80, height=height, file=io.StringIO()))
    seen = status()
    seen["servers"][0] = summarize([server("busy")])["servers"][0]
    view = Driven(seen)
    view._press("details")

    def page() -> list[str]:
        return [line.rstrip() for line in shown(view._screen(with_keys=True), 80, height)]

    whole = [line.rstrip() for line in shown(view._page.content if view._screen(True) else "", 80, 999)]
    first = page()
    assert first[:-1] == whole[: height - 1]
    assert first[-1] == f"q quit  enter back  ↑↓ lines 1 to {height - 1} of {len(whole)}"
    seen_lines = first[:-1]
    while not page()[-1].endswith(f" to {len(whole)} of {len(whole)}"):
        view._press("down")
        seen_lines.append(page()[-2])
    assert seen_lines == whole
    for _ in range(len(whole)):
        view._press("page up")
    assert page() == first
    for _ in range(len(whole)):
        view._press("page down")
    assert page()[-2] == whole[-1]
    assert not pressed(view, b"\x1b[5~\x1b[6~k")  # a page up and down again, and one line up
    assert page()[-2] == whole[-2]


def test_details_that_fit_have_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "out", Console(width=80, height=200, file=io.StringIO()))
    view = Driven(status())
    view._press("details")
    lines = shown(view._screen(with_keys=True), 80, 200)
    assert lines[-1] == "q quit  enter back"
    view._press("page down")
    assert shown(view._screen(with_keys=True), 80, 200) == lines


@pytest.mark.parametrize("bottleneck", ["idle", "unknown"])
def test_nothing_is_said_to_be_sure_where_there_is_no_verdict(bottleneck: str) -> None:
    found = status()
    found["servers"][0]["verdicts"]["decode"]["bottleneck"] = bottleneck
    found["servers"][0]["verdicts"]["decode"]["confidence"] = 1.0
    assert "100%" not in "".join(shown(top_view.table(top_view.rows(found), 140), 140))


def test_details_begin_with_the_verdict_and_all_its_evidence() -> None:
    seen = status()
    seen["servers"][0] = summarize([server("busy")])["servers"][0]
    view = Driven(seen)
    view._press("details")
    text = view.text()
    assert text.startswith("busy: Decode memory-bound, confidence 0.72")
    assert "--max-num-seqs 32 (now: 16)" in text
    assert "evidence on decode" in text
    assert text.index("evidence on decode") < text.index("a/model")


@pytest.mark.parametrize("height", [8, 12, 24, 60])
@pytest.mark.parametrize("servers", [1, 3, 30])
def test_the_screen_is_never_higher_than_the_terminal(servers: int, height: int) -> None:
    found = top_view.ordered(
        top_view.rows(summarize([server(f"srv{number:02}") for number in range(servers)])), "server"
    )
    for selected in (0, len(found) // 2, len(found) - 1):
        lines = shown(
            top_view.screen(found, (80, height), selected=selected, sort="gap", reverse=False, note=""), 80
        )
        assert len(lines) <= height
        assert lines[-1].startswith("q quit")
        assert any(line.startswith(f">{found[selected].server}") for line in lines)
        if height >= 12:
            assert any(line.startswith(f"{found[selected].server}: Decode") for line in lines)


@pytest.mark.parametrize("name", ["a[/b]", "[bold]x", ":smile:"])
def test_names_are_no_markup(name: str) -> None:
    found = top_view.rows(summarize([server(name)]))
    assert any(name in line for line in shown(top_view.table(found, 100), 100))


def test_the_choice_stays_with_its_row_when_rows_move() -> None:
    view = Driven(status())
    for _ in range(9):
        view._press("down")
    chosen = view._chosen
    assert chosen == ("off", "decode")
    view._status["servers"].reverse()
    assert any(line.startswith(">off") for line in view.text().splitlines())
    view._status["servers"] = [one for one in view._status["servers"] if one["server"] != "off"]
    assert any(line.startswith(">") for line in view.text().splitlines())
    view._status["servers"] = []
    assert "No server is running" in view.text()


def test_once_prints_plainly_and_json_says_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("LLMPROBE_DIR", str(tmp_path))
    monkeypatch.setattr(top, "request", lambda *args, **kwargs: (200, status()))
    plain = CliRunner().invoke(app, ["top"])
    assert plain.exit_code == 0
    assert "\x1b" not in plain.stdout
    assert "busy: Decode memory-bound." in plain.stdout
    document = json.loads(CliRunner().invoke(app, ["top", "--json", "--sort", "mbu"]).stdout)
    assert document["schema_version"] == 1
    assert document["rows"][0]["phase"] == "decode"
    assert document["rows"][-1]["mbu"] is None


def test_without_an_agent_it_fails_and_says_what_to_do(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPROBE_DIR", str(tmp_path))
    done = CliRunner().invoke(app, ["top", "--once"])
    assert done.exit_code == 1
    assert "LLMPROBE=1" in done.stderr


def test_live_it_keeps_trying_without_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    view = Driven(status())

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise AgentError("no agent serves it")

    monkeypatch.setattr(top, "request", gone)
    view._look()
    assert "no agent serves it" in view.text()


def test_an_unknown_column_is_wrong_usage() -> None:
    done = CliRunner().invoke(app, ["top", "--sort", "speed"])
    assert done.exit_code == 2
    assert "'speed'" in done.stderr
    assert "gap" in done.stderr
