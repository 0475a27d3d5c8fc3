"""Captures with the real nsys: from ``llmprobe run --nsys`` over HTTP to scrubbed files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from captured import SECRET, Wrapped, call, capture_verb
from waiting import PATIENCE_SECONDS, until

from llmprobe.record.agent_launch import agent_info

pytestmark = pytest.mark.integration


def test_a_capture_from_http_to_files_without_secrets(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    one = wrapped()
    until(lambda: one.ask("GET", "/api/status")[1]["servers"], "server")
    token = (one.directory / "token").read_text().strip()
    wanted = {"tool": "nsys", "seconds": 0.5, "label": "whole path", "when": "next decode"}
    assert call(one, "POST", "/api/captures", None, wanted)[0] == 401
    status, answer = call(one, "POST", "/api/captures", token, wanted)
    assert status == 202, answer
    url = json.loads(answer)["url"]
    assert call(one, "POST", "/api/captures", token, wanted)[0] == 409
    done = one.state(url, "done")
    assert list(done["times"]) == ["pending", "recording", "importing", "analysing", "done"]
    names = {file["name"] for file in done["files"]}
    assert names == {"report.json", "report.txt", "capture.sqlite", "live.json", "capture.nsys-rep"}

    for name in names - {"capture.nsys-rep"}:
        status, content = call(one, "GET", f"{url}/files/{name}", token)
        assert status == 200
        assert content
        assert SECRET.encode() not in content, name
        assert call(one, "GET", f"{url}/files/{name}", None)[0] == 401
    status, report = call(one, "GET", f"{url}/report", token)
    assert json.loads(report)["trust"]["verdict"] == "untrusted"  # there is no GPU here
    assert call(one, "GET", f"{url}/files/capture.nsys-rep", token)[0] == 403
    status, raw = call(one, "GET", f"{url}/files/capture.nsys-rep?raw=1", token)
    assert status == 200
    assert SECRET.encode() in raw  # or this test could not fail
    live = json.loads(call(one, "GET", f"{url}/files/live.json", token)[1])
    for when in ("before", "during", "after"):
        shown = live[when]["server"]
        assert shown["ranks"][0]["steps"]["decode"] > 0
        assert shown["verdicts"]["decode"].keys() >= {"bottleneck", "cause", "reason"}
        assert shown["flags"] == {"max_num_seqs": 16}
    assert live["meanwhile"]["ranks"][0]["figures"]["decode"]["steps"] > 0
    kept = one.captures / done["id"]
    assert {path.name for path in kept.iterdir()} == names | {"capture.json"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept.iterdir())

    # Another one on the same server, from the shell, as on two nodes: here it is one agent, which takes one.
    info = agent_info(one.directory)
    assert info is not None
    target = ["--target", f"{info['address']}:{info['port']}"] * 2
    token_file = ["--token-file", str(one.directory / "token")]
    shell = capture_verb(one, tmp_path, "--steps", "20", *target, *token_file)
    assert shell.returncode == 1
    assert "one runs at a time" in shell.stderr
    fetched, refused = sorted(json.loads(shell.stdout), key=lambda found: found["error"] is not None)
    assert refused["capture"] is None
    folder = Path(fetched["folder"])
    assert {path.name for path in folder.iterdir()} == names - {"capture.nsys-rep"}
    assert not [path for path in folder.iterdir() if SECRET.encode() in path.read_bytes()]
    assert fetched["report"]["schema_version"] == 1
    # And one that is taken back while it records.
    url = one.begin(seconds=30)
    one.recording(url)
    assert one.ask("DELETE", url)[0] in (200, 202)
    until(lambda: one.ask("GET", url)[0] == 404, "end of it")
    assert not (one.captures / url.rpartition("/")[2]).exists()
    assert one.ask("GET", "/api/captures")[1]["tools"][fetched["capture"]["server"]]["nsys"] is None

    temporary = Path(one.session()["temporary"])
    assert SECRET not in "".join(path.read_text(errors="replace") for path in temporary.rglob("*.log"))
    one.process.terminate()
    assert one.process.wait(PATIENCE_SECONDS) == 7
    assert not temporary.exists()
    assert not list((one.directory / "nsys").iterdir())
    assert not [found for found in one.nsys_processes() if found.status() != psutil.STATUS_ZOMBIE]


def test_a_server_without_nsys_is_told_how(wrapped: Callable[..., Wrapped]) -> None:
    one = wrapped()
    until(lambda: one.ask("GET", "/api/status")[1]["servers"], "server")
    for note in (one.directory / "nsys").glob("*.json"):
        note.rename(note.with_suffix(".away"))
    status, answer = one.ask("POST", "/api/captures", {"tool": "nsys"})
    assert status == 409
    assert "llmprobe run --nsys" in answer["detail"]
    for note in (one.directory / "nsys").glob("*.away"):
        note.rename(note.with_suffix(".json"))
    for tool in ("torch", "kernels"):
        status, answer = one.ask("POST", "/api/captures", {"tool": tool})
        assert status == 409
        assert "has not said what can capture it" in answer["detail"]
