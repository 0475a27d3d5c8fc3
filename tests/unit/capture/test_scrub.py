"""What leaves the machine holds no secret: planted ones are looked for in every byte of every output."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import sqlite3
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from analysis.kineto_file import decoding  # tests/unit is on the path of the tests in its folders
from analysis.nsys_file import SCHEMA, THREAD, NsysFile, serving
from analysis.oracle import find_nsys, nsys_report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmprobe.analysis import analyze
from llmprobe.capture.scrub import ScrubError, scrub, scrubbed_name
from llmprobe.capture.scrub_database import NUMBERS, STRINGS, kernel_name

SECRET = "planted-s3cr3t"
DATA = Path(__file__).parents[2] / "data"


def forms(secret: str) -> list[bytes]:
    """How a text can stand in a file."""
    return [secret.encode(), secret.encode("utf-16-le"), secret[::-1].encode()]


def holds(path: Path, secret: str = SECRET) -> bool:
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    return any(form in raw for form in forms(secret))


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    """An export with a secret in every text column of every table, and in texts that stay otherwise."""
    path = serving(tmp_path / "secret.sqlite", steps=60)
    data = sqlite3.connect(path)
    file_tables = {name for (name,) in data.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table, columns in SCHEMA.items():
        if table not in file_tables:
            data.execute(f"CREATE TABLE {table} ({columns})")
    data.execute("CREATE TABLE TARGET_INFO_SYSTEM_ENV (name TEXT, value TEXT)")
    data.execute("CREATE TABLE ProcessStreams (globalPid INTEGER, filenameId INTEGER, contentId INTEGER)")
    data.execute("CREATE TABLE SOMETHING_NEW (text TEXT)")
    data.execute(f'CREATE TABLE "TABLE_{SECRET}" (text TEXT)')
    data.execute("CREATE TABLE ENUM_NSYS_EVENT_TYPE (id INTEGER, name TEXT, label TEXT)")
    data.execute("CREATE TABLE OSRT_API (start INTEGER, end INTEGER, nameId INTEGER)")
    tables = [name for (name,) in data.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        info = data.execute(f'PRAGMA table_info("{table}")').fetchall()
        if table == "StringIds":
            continue
        # SQLite takes a text in any column but a primary key.
        data.execute(
            f'INSERT INTO "{table}" VALUES ({",".join("?" * len(info))})',
            [999 if column[5] else f"/home/{SECRET}/x {SECRET}=1;" for column in info],
        )
    strings = [
        (90_000, f"TOKEN={SECRET}\0OTHER={SECRET}"),
        (90_001, f"/root/{SECRET}"),
        (90_002, f"say {SECRET}"),
    ]
    data.executemany("INSERT INTO StringIds VALUES (?, ?)", strings)
    data.execute("INSERT INTO ProcessStreams VALUES (1, 90001, 90002)")
    data.execute("INSERT INTO OSRT_API VALUES (1, 2, 90000)")
    data.execute("UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET nameId = 90000 WHERE rowid = 3")
    data.execute("INSERT INTO StringIds VALUES (90003, ?)", (f"lambda at /home/{SECRET}/kernels/a.cu:12",))
    data.execute("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET demangledName = 90003 WHERE rowid = 5")
    data.execute(
        "INSERT INTO META_DATA_CAPTURE VALUES ('PROCESS_0:ENVIRONMENT_VARIABLE', ?)", (f"A={SECRET}",)
    )
    data.execute("INSERT INTO META_DATA_EXPORT VALUES ('EXPORT_PRODUCT_NAME', ?)", (f"/{SECRET}",))
    data.execute(
        "INSERT INTO NVTX_EVENTS (start, end, eventType, globalTid, domainId, text) "
        "VALUES (5, 6, 59, ?, 1, ?), (5, 6, 59, ?, 0, ?)",
        (THREAD, f"prompt: {SECRET}", THREAD, SECRET.replace("-", "_")),
    )
    data.execute("CREATE TABLE deleted (text TEXT)")
    data.executemany("INSERT INTO deleted VALUES (?)", [(SECRET * 50,)] * 100)
    data.commit()
    data.execute("DROP TABLE deleted")  # its pages stay in the file
    data.commit()
    data.close()
    assert holds(path)
    return path


def test_no_text_passes_that_is_not_allowed(secret_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.sqlite"
    scrub(secret_file, target)
    assert not holds(target)
    assert not holds(target, SECRET.replace("-", "_"))
    assert b"GPU-secret-uuid" not in target.read_bytes()


def test_what_the_analysis_needs_stays(tmp_path: Path) -> None:
    path, target = serving(tmp_path / "a.sqlite"), tmp_path / "out.sqlite"
    scrub(path, target)
    before, after = analyze(path).to_json(), analyze(target).to_json()
    before["source"]["path"] = after["source"]["path"] = ""
    assert before == after
    assert before["phases"]


def test_loss_of_events_is_still_told_after_scrubbing(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.kernel("k", 0, 100, launched=0)
    file.row("DIAGNOSTIC_EVENT", text=f"12 events were dropped in /home/{SECRET}")
    scrub(file.close(), tmp_path / "out.sqlite")
    assert not holds(tmp_path / "out.sqlite")
    assert "lost_events" in [reason.check for reason in analyze(tmp_path / "out.sqlite").trust.reasons]


def test_a_trace_keeps_its_figures_and_nothing_else(tmp_path: Path) -> None:
    file = decoding()
    file.mark(f"prompt {SECRET}", 0, 10)
    file.event("python_function", f"/home/{SECRET}/a.py(3): f", 0, 10, 100)
    file.event("cpu_op", f"op /{SECRET}", 0, 10, 100, **{"Concrete Inputs": [SECRET], "Call stack": SECRET})
    file.event("kernel", f"lambda at /home/{SECRET}/a.cu", 90_000, 10, 7, device=0, stream=SECRET)
    file.event("cuda_runtime", f"call {SECRET}", 0, 10, 100, correlation=SECRET)
    file.event(SECRET, SECRET, 0, 10, 100)
    file.events.append({"ph": "M", "name": "process_name", "pid": 1, "args": {"name": SECRET}})
    file.events.append(
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": f"{SECRET} 1"}}
    )
    file.events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "args": {"name": "stream 7 "}})
    file.events.append({"ph": "i", "name": SECRET, "s": "g", "ts": 1})
    file.events.append({"ph": "s", "cat": "ac2g", "name": SECRET, "id": SECRET, "pid": 1, "tid": 1, "ts": 1})
    document = file.document()
    document["trace_id"] = document["anything"] = SECRET
    document["deviceProperties"][0]["uuid"] = SECRET
    document["distributedInfo"]["pg_config"] = [SECRET]
    source = tmp_path / "a.json"
    source.write_text(json.dumps(document))
    for target in (tmp_path / "out.json", tmp_path / "out.json.gz"):
        scrub(source, target)
        assert not holds(target)
        assert b"secret-host" not in target.read_bytes()
        before, after = analyze(source), analyze(target)
        assert after.gpus == before.gpus
        assert after.phases == before.phases
        assert after.operators == before.operators
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["distributedInfo"] == {"rank": 0, "world_size": 2}
    assert {"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "args": {"name": "stream 7 "}} in kept[
        "traceEvents"
    ]


@settings(deadline=None)
@given(name=st.text(max_size=60))
def test_a_path_in_a_kernels_name_is_cut_out(name: str) -> None:
    assert "/home/someone" not in kernel_name(f"f<(lambda at /home/someone/secret/a.cu:3)>{name}")


def test_ordinary_kernel_names_stay_as_they_are() -> None:
    for name in ("void f<a::b<1, 2>, (int)3>(float const*, int)", "operator/", "nvjet_hsh_128x64", "a / b"):
        assert kernel_name(name) == name


def test_names_that_may_stay_come_from_columns_that_stay() -> None:
    for table, column in STRINGS:
        assert column in NUMBERS[table].split()


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0", b"{}", b'{"traceEvents": [{"ph"'])
def test_what_cannot_be_scrubbed_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "in"
    source.write_bytes(content)
    with pytest.raises(ScrubError) as raised:
        scrub(source, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [source]


def test_nothing_is_overwritten_and_no_link_followed(tmp_path: Path) -> None:
    source = serving(tmp_path / "a.sqlite", steps=2)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for target in (victim, tmp_path / "link", tmp_path / "dangling", source):
        with pytest.raises(ScrubError, match="is there already"):
            scrub(source, target)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_the_copy_is_its_owners_alone(tmp_path: Path) -> None:
    scrub(serving(tmp_path / "a.sqlite", steps=2), tmp_path / "out.sqlite")
    assert stat.S_IMODE((tmp_path / "out.sqlite").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.sqlite", "out.sqlite"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ScrubError, match="cannot be written"):
        scrub(serving(tmp_path / "a.sqlite", steps=2), tmp_path / "absent" / "out.sqlite")
    with pytest.raises(ScrubError, match="no such file"):
        scrub(tmp_path / "absent.sqlite", tmp_path / "out.sqlite")


def test_a_source_that_cannot_be_read_is_blamed_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = serving(tmp_path / "a.sqlite", steps=2)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ScrubError) as raised:
        scrub(source, tmp_path / "out.sqlite")
    assert str(raised.value) == f"{source}: cannot be read: Permission denied"


def test_a_kernels_file_needs_no_scrubbing(tmp_path: Path) -> None:
    source = tmp_path / "kernels-rank0.npz"
    source.write_bytes(b"PK\x03\x04")
    with pytest.raises(ScrubError, match="needs no scrubbing"):
        scrub(source, tmp_path / "out")


def test_the_tools_version_stays(tmp_path: Path) -> None:
    document = {**decoding().document(), "torch_version": "2.11.0+cu130", "pytorch_version": f"1 {SECRET}"}
    source, target = tmp_path / "a.json", tmp_path / "out.json"
    source.write_text(json.dumps(document))
    scrub(source, target)
    assert analyze(target).source.version == "2.11.0+cu130"
    assert not holds(target)


def test_the_copy_is_named_after_its_source() -> None:
    names = {
        "a.sqlite": "a.scrubbed.sqlite",
        "a.pt.trace.json.gz": "a.pt.trace.scrubbed.json.gz",
        "a.json": "a.scrubbed.json",
        "a.nsys-rep": "a.scrubbed.sqlite",
        "a": "a.scrubbed",
    }
    for source, target in names.items():
        assert scrubbed_name(Path("x") / source) == Path("x") / target


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=30)), max_size=12))
def test_a_damaged_file_is_scrubbed_or_refused(tmp_path: Path, edits: list[tuple[float, bytes]]) -> None:
    raw = bytearray((DATA / "nsys" / "transformers_cpu.sqlite").read_bytes())
    for where, new in edits:
        at = int(where * (len(raw) - 1))
        raw[at : at + len(new)] = new
    source, target = tmp_path / "in.sqlite", tmp_path / "out.sqlite"
    source.write_bytes(raw)
    target.unlink(missing_ok=True)
    try:
        scrub(source, target)
    except ScrubError as error:
        assert "\n" not in str(error)
        assert not target.exists()


PROGRAM = """
import os, sys, time
print("printed", os.environ["PLANTED_TOKEN"], flush=True)
open(os.environ["PLANTED_TOKEN"] + ".txt", "w").close()
time.sleep(0.2)
"""


@pytest.mark.integration
def test_no_byte_of_a_real_captures_copy_holds_the_environment(tmp_path: Path) -> None:
    nsys = find_nsys()
    home = tmp_path / f"folder-{SECRET}-folder"
    home.mkdir()
    program = home / "program.py"
    program.write_text(PROGRAM)
    token = f"{SECRET}-environment"
    environment = {**os.environ, "PLANTED_TOKEN": token, "TMPDIR": str(tmp_path)}
    command = [str(nsys), "profile", "--trace=nvtx,osrt", "--sample=none", "--cpuctxsw=none"]
    command += ["--output", str(home / "capture"), sys.executable, str(program), f"--key={SECRET}-argument"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, timeout=120, check=False)
    report = home / "capture.nsys-rep"
    if not report.exists():
        pytest.skip(f"this nsys cannot record here: {done.stdout[-300:]!r} {done.stderr[-300:]!r}")
    export = home / "capture.sqlite"
    subprocess.run(
        [str(nsys), "export", "--type=sqlite", f"--output={export}", str(report)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    for secret in (
        f"{SECRET}-environment",
        f"{SECRET}-argument",
        f"folder-{SECRET}-folder",
        f"printed {SECRET}",
    ):
        assert holds(export, secret), f"the test is blind: {secret} is not in the export itself"
    outputs = [tmp_path / "copy.sqlite", tmp_path / "copy-of-report.sqlite"]
    scrub(export, outputs[0])
    scrub(report, outputs[1], nsys=nsys)
    others = [
        value
        for name, value in os.environ.items()
        if len(value) > 7 and name not in ("LANG", "TERM", "SHELL") and not value.isdigit()
    ]
    for output in outputs:
        assert not holds(output)
        assert [value for value in others if holds(output, value)] == []
        assert not holds(output, os.uname().nodename) or len(os.uname().nodename) < 5
        found = analyze(output)
        for text in (found.to_text(), json.dumps(found.to_json())):
            assert SECRET not in text.replace(str(output), "")


@pytest.mark.integration
def test_nsys_itself_still_reads_a_copy(tmp_path: Path) -> None:
    path, target = serving(tmp_path / "a.sqlite", steps=40), tmp_path / "out.sqlite"
    scrub(path, target)
    for report in ("cuda_gpu_kern_sum", "nvtx_gpu_proj_sum"):
        (tmp_path / report).mkdir()
        (tmp_path / f"{report}-copy").mkdir()
        before = nsys_report(path, report, tmp_path / report)
        assert before
        assert nsys_report(target, report, tmp_path / f"{report}-copy") == before


def unzipped(raw: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize(
    "path",
    [path for folder in ("nsys", "kineto", "kernels") for path in sorted(DATA.glob(f"{folder}/*"))],
    ids=lambda path: path.name,
)
def test_test_data_holds_no_path_and_no_environment(path: Path) -> None:
    raw = path.read_bytes()
    opened = {".gz": gzip.decompress, ".xz": lzma.decompress, ".npz": unzipped}.get(path.suffix, bytes)
    raw = opened(raw)
    for sign in (b"/home/", b"/root", b"/usr/", b"PATH=", b"HOME=", b"/tmp/", SECRET.encode()):
        assert sign not in raw
