"""Captures on disk: limits, and nothing outside their folders."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from llmprobe.capture.session import Capture, Request
from llmprobe.capture.store import (
    LIVE,
    RAW,
    REPORT_JSON,
    STATE_NAME,
    Store,
    StoreError,
    default_directory,
    write_json,
)


def store(root: Path, max_bytes: int = 10_000) -> Store:
    made = Store(root / "captures", max_bytes, least_free_bytes=0)
    made.prepare()
    return made


def add(kept: Store, number: int, state: str = "done", size: int = 0) -> Capture:
    capture = Capture(
        id=f"20261123-1015{number:02}-ab12cd",
        owner="/o",
        server="s",
        group="g",
        request=Request("nsys", 1.0, None),
        times={"pending": 1.0},
    )
    for step in ("recording", "importing", "analysing", "done"):
        if capture.state == state:
            break
        capture = capture.enter(step, 2.0)
    kept.create(capture)
    (kept.folder(capture.id) / REPORT_JSON).write_bytes(b"x" * size)
    return capture


def ids(kept: Store) -> list[str]:
    return [capture.id for capture in kept.all()]


def test_the_oldest_finished_go_first_and_what_runs_stays(tmp_path: Path) -> None:
    kept = store(tmp_path, max_bytes=10_000)
    running = add(kept, 0, "recording", 4000)
    oldest, newer, newest = (add(kept, number, size=4000) for number in (1, 2, 3))
    kept.trim()
    assert oldest.id not in ids(kept)
    assert {running.id, newest.id} <= set(ids(kept))
    assert sum(kept.size(one) for one in ids(kept)) <= 10_000
    assert newer.id not in ids(kept)


def test_a_new_capture_makes_room_for_itself(tmp_path: Path) -> None:
    kept = store(tmp_path, max_bytes=5000)
    old = add(kept, 1, size=9000)
    add(kept, 2)
    assert old.id not in ids(kept)


def test_what_was_just_made_stays_whatever_it_takes(tmp_path: Path) -> None:
    kept = store(tmp_path, max_bytes=5000)
    old, large = add(kept, 1, size=100), add(kept, 2, size=9000)
    assert kept.trim(keep=large.id) == [old.id]
    assert ids(kept) == [large.id]
    assert kept.trim() == [large.id]


def test_one_whose_state_cannot_be_read_takes_no_room_for_ever(tmp_path: Path) -> None:
    kept = store(tmp_path, max_bytes=20_000)
    made, torn, good = (add(kept, number, size=4000) for number in (1, 2, 3))
    for one in (made, torn):
        (kept.folder(one.id) / STATE_NAME).write_text("{")
    os.utime(kept.folder(torn.id), (1, 1))
    kept.max_bytes = 9000
    assert kept.trim() == [torn.id]
    assert (kept.folder(torn.id).exists(), ids(kept)) == (False, [good.id])
    assert kept.folder(made.id).exists(), "it may be one that is just being made"


def test_one_whose_state_cannot_be_opened_stays(tmp_path: Path) -> None:
    """Too many open files, say: it may be the one that runs."""
    kept = store(tmp_path, max_bytes=100)
    one = add(kept, 1, size=4000)
    state = kept.folder(one.id) / STATE_NAME
    state.unlink()
    state.symlink_to(tmp_path / "nowhere")
    os.utime(kept.folder(one.id), (1, 1))
    assert kept.trim() == []


def test_captures_come_newest_first(tmp_path: Path) -> None:
    kept = store(tmp_path)
    made = [add(kept, number).id for number in (1, 3, 2)]
    assert ids(kept) == sorted(made, reverse=True)


def test_of_those_that_have_ended_the_newest_are_kept(tmp_path: Path) -> None:
    kept = Store(tmp_path / "captures", 1 << 30, least_free_bytes=0, most_ended=2)
    running = add(kept, 0, "recording")
    made = [add(kept, number).id for number in (1, 2, 3, 4)]
    kept.trim()
    assert ids(kept) == [*reversed(made[-2:]), running.id]
    assert kept.trim(keep=made[-2]) == []
    add(kept, 5)
    assert kept.trim(keep=made[-2]) == [made[-1]]


class Disk(Store):
    """A store on a disk of 10 000 bytes, of which others take ``others``."""

    others = 0

    def free_bytes(self) -> int:
        return 10_000 - self.others - sum(self.size(path.name) for path in self.root.iterdir())


def test_a_disk_that_captures_fill_makes_room_for_a_new_one(tmp_path: Path) -> None:
    kept = Disk(tmp_path / "captures", 1 << 30, least_free_bytes=5000)
    kept.root.mkdir(mode=0o700)
    old = add(kept, 1, size=2500)
    newer = add(kept, 2, size=2000)
    assert ids(kept) == [newer.id, old.id]
    new = add(kept, 3)
    assert ids(kept) == [new.id, newer.id]


def test_nothing_is_removed_for_a_disk_that_others_fill(tmp_path: Path) -> None:
    kept = Disk(tmp_path / "captures", 1 << 30, least_free_bytes=5000)
    kept.root.mkdir(mode=0o700)
    old = add(kept, 1, size=2000)
    kept.others = 8000
    with pytest.raises(StoreError, match="MiB free"):
        add(kept, 2)
    assert ids(kept) == [old.id]


def changed(**members: object) -> str:
    request = {"tool": "nsys", "seconds": 1.0, "steps": None, "when": "now", "wait_seconds": 1.0, "label": ""}
    state = {"id": "20261123-101501-ab12cd", "state": "done", "times": {}, "progress": None, "reason": None}
    names = {"schema": 1, "owner": "/o", "server": "s", "group": "g", "notes": []}
    return json.dumps({**state, **names, "request": request, **members})


def test_the_state_that_the_next_test_changes_can_be_read(tmp_path: Path) -> None:
    kept = store(tmp_path)
    capture = add(kept, 1)
    (kept.folder(capture.id) / "capture.json").write_text(changed())
    assert ids(kept) == [capture.id]


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": 1',
        "[" * 100_000,
        changed(server="\ud800"),
        changed(reason="\udfff"),
        changed(notes=["\ud800"]),
        changed(progress=float("inf")),
        changed(progress=[]),
        changed(times={"pending": 10**400}),
        changed(request={"tool": "rm"}),
        changed(request=[]),
    ],
    ids=lambda text: text[-40:],
)
def test_what_cannot_be_read_is_no_capture(tmp_path: Path, text: str) -> None:
    kept = store(tmp_path)
    capture = add(kept, 1)
    (kept.folder(capture.id) / "capture.json").write_text(text)
    assert ids(kept) == []
    with pytest.raises(KeyError):
        kept.read(capture.id)


def test_a_full_disk_is_said_before_anything_begins(tmp_path: Path) -> None:
    kept = Store(tmp_path, 1000, least_free_bytes=1 << 60)
    with pytest.raises(StoreError, match=r"MiB free.*LLMPROBE_CAPTURE_DIR"):
        kept.prepare()


def test_one_whose_state_cannot_be_written_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr("llmprobe.capture.store.write_json", full)
    kept = store(tmp_path)
    with pytest.raises(StoreError, match="cannot make"):
        add(kept, 1)
    assert list(kept.root.iterdir()) == []


def test_a_directory_that_cannot_be_made_names_itself_and_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/captures.*LLMPROBE_CAPTURE_DIR"):
        store(tmp_path / "file")


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "captures").touch()
    with pytest.raises(StoreError, match="captures: that is no folder"):
        store(tmp_path)
    (tmp_path / "captures").unlink()
    (tmp_path / "captures").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="captures: that is no folder"):
        store(tmp_path)


def test_a_read_only_directory_is_said() -> None:
    with pytest.raises(StoreError, match="mount a writable volume at /sys/captures"):
        store(Path("/sys"))


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "captures").mkdir()
    (tmp_path / "captures").chmod(0o777)
    with pytest.raises(StoreError, match="chmod 700"):
        store(tmp_path)


def test_everything_is_for_its_owner_only(tmp_path: Path) -> None:
    kept = store(tmp_path)
    folder = kept.folder(add(kept, 1).id)
    assert kept.root.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "capture.json").stat().st_mode & 0o777 == 0o600


def read(kept: Store, capture_id: str, name: str) -> bytes:
    with kept.open(capture_id, name) as fd:
        return os.read(fd, 100)


def test_a_file_of_a_capture_is_read(tmp_path: Path) -> None:
    kept = store(tmp_path)
    capture = add(kept, 1, size=3)
    assert read(kept, capture.id, REPORT_JSON) == b"xxx"
    assert kept.files(capture.id) == {REPORT_JSON: 3}


@pytest.mark.parametrize(
    "name", ["capture.json", "raw.sqlite", "../secret", "/etc/passwd", "", ".", "report.json\0"]
)
def test_only_names_on_the_list_are_read(tmp_path: Path, name: str) -> None:
    kept = store(tmp_path)
    capture = add(kept, 1)
    (kept.root / "secret").write_text("secret")
    with pytest.raises(KeyError):
        read(kept, capture.id, name)


@pytest.mark.parametrize(
    "capture_id", ["..", ".", "", "../captures/20261123-101501-ab12cd", "20261123-101501-AB12CD"]
)
def test_only_ids_are_looked_for(tmp_path: Path, capture_id: str) -> None:
    kept = store(tmp_path)
    add(kept, 1)
    for ask in (kept.read, kept.remove, kept.folder, lambda found: read(kept, found, REPORT_JSON)):
        with pytest.raises(KeyError):
            ask(capture_id)


def test_no_link_is_followed(tmp_path: Path) -> None:
    kept = store(tmp_path)
    capture = add(kept, 1)
    folder = kept.folder(capture.id)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / LIVE).symlink_to(secret)
    os.link(secret, folder / RAW)
    os.mkfifo(folder / "report.txt")
    for name in (LIVE, RAW, "report.txt"):
        with pytest.raises(OSError, match=r"."):
            read(kept, capture.id, name)
    assert set(kept.files(capture.id)) == {REPORT_JSON}


def test_a_folder_that_is_a_link_is_no_capture(tmp_path: Path) -> None:
    kept = store(tmp_path)
    capture = add(kept, 1)
    elsewhere = tmp_path / "elsewhere"
    kept.folder(capture.id).rename(elsewhere)
    kept.folder(capture.id).symlink_to(elsewhere)
    assert ids(kept) == []
    with pytest.raises(KeyError):
        kept.remove(capture.id)
    assert elsewhere.is_dir()


def test_what_is_not_shown_does_not_stay(tmp_path: Path) -> None:
    kept = store(tmp_path)
    capture = add(kept, 1)
    folder = kept.folder(capture.id)
    for name in (
        ".raw.sqlite.77",
        "raw.sqlite",
        ".capture.json.ab",
        "raw-rank0.npy",
        RAW,
        "torch-rank0.json.gz",
    ):
        (folder / name).touch()
    (folder / ".drafts").mkdir()
    (folder / ".drafts" / "draft").touch()
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    kept.tidy(capture.id)
    shown = {RAW, REPORT_JSON, "torch-rank0.json.gz"}
    assert {path.name for path in folder.iterdir()} == {"capture.json"} | shown
    kept.tidy(capture.id, files=False)
    assert {path.name for path in folder.iterdir()} == {"capture.json"}
    assert (tmp_path / "elsewhere").is_dir()


def test_what_was_removed_is_gone_also_if_a_crash_interrupted_it(tmp_path: Path) -> None:
    kept = store(tmp_path)
    capture = add(kept, 1)
    kept.remove(capture.id)
    (kept.root / ".removed-20261123-101502-ab12cd").mkdir()
    kept.sweep()
    assert list(kept.root.iterdir()) == []


def test_a_json_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"state": "old"})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"state": "new"})
    assert path.read_text() == '{\n "state": "old"\n}\n'
    assert [found.name for found in tmp_path.iterdir()] == ["state.json"]


def test_where_captures_go_is_said_without_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An agent starts on a full disk too: only a capture needs room."""
    missing = tmp_path / "full"
    monkeypatch.setenv("TMPDIR", str(missing))
    assert default_directory(Path("/dev/shm/llmprobe-0")) == missing / "llmprobe-0-captures"
    assert not missing.exists()
    monkeypatch.delenv("TMPDIR")
    assert default_directory(Path("/dev/shm/llmprobe-0")) == Path("/tmp/llmprobe-0-captures")
