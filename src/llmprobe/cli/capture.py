"""``llmprobe capture``: a deep look at a running server, from the shell."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprobe.agent.client import AgentError
from llmprobe.capture.store import LIVE, REPORT_JSON, REPORT_TEXT, is_public, is_raw
from llmprobe.cli.capture_compare import side_by_side, summary
from llmprobe.cli.capture_follow import Followed, follow, is_capture
from llmprobe.cli.capture_targets import Target, TargetError, local, named
from llmprobe.cli.console import fail, plain, settings_or_fail
from llmprobe.cli.output import err, out, print_json

_POST_SECONDS = 30.0
_FETCH_SECONDS = 300.0
_MOST_REPORT_BYTES = 64 << 20
_HELP = "`llmprobe capture --help` says what is allowed."

EPILOG = """Examples:

llmprobe capture

llmprobe capture --seconds 2 --when "sync_gap_ratio > 0.3 for 10s"

llmprobe capture --tool torch --steps 50 --torch-cpu

llmprobe capture --target node1:9480 --target node2:9480 --token-file token"""


def capture(
    server: Annotated[str | None, typer.Argument(help="The `server` label. Default: the only one.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long to record. Default: 5.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps to record, instead.")] = None,
    when: Annotated[
        str, typer.Option(help='now, next prefill, next decode, or as "sync_gap_ratio > 0.3 for 10s".')
    ] = "now",
    wait_seconds: Annotated[float, typer.Option(help="How long `--when` may take to come true.")] = 300.0,
    label: Annotated[str, typer.Option(help="For you to recognise it by.")] = "",
    tool: Annotated[str, typer.Option(help="auto, nsys, torch or kernels.")] = "auto",
    rank: Annotated[
        list[int] | None, typer.Option(help="torch, kernels: only this worker; more than once for several.")
    ] = None,
    torch_cpu: Annotated[
        bool, typer.Option("--torch-cpu", help="torch: operators on the host too, not the GPU alone.")
    ] = False,
    torch_stacks: Annotated[
        bool, typer.Option("--torch-stacks", help="torch: Python's calls too. Stops the engine for seconds.")
    ] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Wait for a capture that runs.")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to make a folder for each capture's files.")
    ] = Path(),
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Fetch unscrubbed files too: the .nsys-rep holds the server's environment."
        ),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT of an agent, or TOKEN_FILE@HOST:PORT where its token is another one; "
            "more than once for many nodes."
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="With --target: the file with the token of those that name none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the captures as JSON.")] = False,
) -> None:
    """Capture what a running server does, wait for the result, and fetch it.

    With nsys if the server was started with `llmprobe run --nsys`; else with
    torch's own profiler, or, where ending that would stop the engine (as on
    CUDA devices), by recording kernels, copies and sets alone.

    With several targets all begin at the same moment, each has a folder of its
    own, and a table at the end holds them side by side.
    """
    targets = _targets(target or [], token_file)
    _check_output(output)
    wanted = {
        "tool": tool,
        "server": server,
        "when": when,
        "wait_seconds": wait_seconds,
        "label": label,
        "queue": queue,
        **({} if seconds is None else {"seconds": seconds}),
        **({} if steps is None else {"steps": steps}),
        **({"ranks": rank} if rank else {}),
        **({"torch_cpu": True} if torch_cpu else {}),
        **({"torch_stacks": True} if torch_stacks else {}),
    }
    try:
        followed = _begin(targets, wanted)
        _follow(followed)
        for one in followed:
            if one.capture.get("state") == "done":
                _fetch(one, output, raw)
    except KeyboardInterrupt:
        fail("cancelled", code=130)
    _show(followed, as_json)
    if failed := [one for one in followed if one.error]:
        raise typer.Exit(2 if all(one.misused for one in failed) else 1)


def _targets(named_ones: Sequence[str], token_file: Path | None) -> list[Target]:
    if not named_ones:
        if token_file is not None:
            fail("--token-file is for --target", code=2)
        return [local(settings_or_fail().directory)]
    try:
        return named(named_ones, token_file)
    except TargetError as error:
        fail(str(error), code=2)


def _check_output(output: Path) -> None:
    """Before anything is recorded: what cannot be saved is of no use to who has waited for it."""
    places = (output.absolute(), *output.absolute().parents)
    there = next(place for place in places if os.path.lexists(place))  # the root at last
    if not os.access(f"{there}/.", os.W_OK | os.X_OK):
        fail(f"cannot save in {output}: {there} is no directory that may be written to", code=2)


def _begin(targets: list[Target], wanted: dict[str, Any]) -> list[Followed]:
    """Ask all at the same moment."""

    def begin(target: Target) -> Followed:
        try:
            status, answer = target.agent.request("POST", "/api/captures", wanted, timeout=_POST_SECONDS)
        except AgentError as error:
            return Followed(target, {}, str(error))
        if status != 202:
            misused = status == HTTPStatus.UNPROCESSABLE_ENTITY
            return Followed(target, {}, _said(target, status, answer), misused)
        if not is_capture(answer):
            return Followed(target, {}, str(target.agent.foreign("it says nothing of a capture")))
        return Followed(target, answer)

    with ThreadPoolExecutor(len(targets)) as pool:
        asked = [pool.submit(begin, target) for target in targets]
        try:
            return [one.result() for one in asked]
        except KeyboardInterrupt:
            # What has been asked for begins all the same; its id, by which to cancel it, is in the answer.
            _cancel([one.result() for one in asked])
            raise


def _said(target: Target, status: int, answer: Any) -> str:
    if status == HTTPStatus.UNAUTHORIZED and target.token_file is not None:
        # It names its own token file, which is not here.
        return (
            f"{target.agent.name} does not take the token in {target.token_file}: copy the one in "
            "`token` of LLMPROBE_DIR, or in LLMPROBE_TOKEN_FILE, from its node"
        )
    if isinstance(answer, dict) and {"detail", "next"} <= answer.keys():
        next_step = str(answer["next"])
        # That is for who writes requests.
        return f"{answer['detail']} {_HELP if '/openapi.json' in next_step else next_step}"
    return str(target.agent.foreign(f"it answers {status}"))  # such as the engine, on its own port


def _follow(followed: list[Followed]) -> None:
    try:
        follow(followed)
    except KeyboardInterrupt:
        _cancel(followed)
        raise


def _cancel(followed: list[Followed]) -> None:
    for one in followed:
        if one.live:
            with contextlib.suppress(AgentError):
                one.agent.request("DELETE", one.url, timeout=_POST_SECONDS)


def _fetch(one: Followed, output: Path, raw: bool) -> None:
    """Save its files. Where to is decided here: an agent's answer only chooses among names that there are."""
    folder = output / one.target.folder / one.capture["id"]
    try:
        folder.mkdir(parents=True, mode=0o700)
        for name in _names(one):
            if is_public(name):
                one.agent.download(f"{one.url}/files/{name}", folder / name, timeout=_FETCH_SECONDS)
            elif raw and is_raw(name):
                one.agent.download(f"{one.url}/files/{name}?raw=1", folder / name, timeout=_FETCH_SECONDS)
        report = _read_json(folder / REPORT_JSON)
        one.text = _read(folder / REPORT_TEXT).decode(errors="replace")
        one.summary = summary(report, _read_json(folder / LIVE))
    except AgentError as error:
        one.error = str(error)
        return
    except OSError as error:
        one.error = f"cannot save in {folder}: {error.strerror}. {one.agent.name} keeps it as {one.url}"
        return
    except ValueError as error:
        one.error = f"{folder}: {error}"
        return
    one.folder = folder
    one.report = report


def _names(one: Followed) -> list[str]:
    files = one.capture.get("files")
    names = [file.get("name") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except RecursionError as error:
        raise ValueError(f"{path.name}: {type(error).__name__}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_REPORT_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"the agent has sent no {path.name}") from None
    if len(content) > _MOST_REPORT_BYTES:
        raise ValueError(f"{path.name} is larger than {_MOST_REPORT_BYTES >> 20} MiB: no report is")
    return content


def _show(followed: list[Followed], as_json: bool) -> None:
    if as_json:
        print_json([one.as_json() for one in followed])
    several = len(followed) > 1
    for one in followed:
        where = f"{one.agent.name}: " if several else ""
        if one.error:
            told = where if not one.error.startswith(one.agent.name) else ""  # twice is no clearer
            typer.echo(plain(f"llmprobe: {told}{one.error}"), err=True)
        elif not as_json and one.folder is not None:
            if where:
                typer.echo(where)
            typer.echo(plain(one.text))
        for note in one.capture.get("notes", []):
            typer.echo(plain(f"note: {where}{note}"), err=True)
        if one.folder is not None:
            err.print(f"{where}saved {one.folder}", soft_wrap=True)  # a path to copy
    if several and not as_json:
        out.print(side_by_side([(one.agent.name, one.summary) for one in followed]))
