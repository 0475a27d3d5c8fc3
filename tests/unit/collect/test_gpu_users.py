"""Who uses a GPU, as far as pids and memory tell."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from llmprobe.collect.gpu_users import Users, users
from llmprobe.collect.nvml import GpuProcess

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def process(root: Path, pid: int, parent: int = 1) -> None:
    folder = root / "proc" / str(pid)
    folder.mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} (a (b) c) S {parent} 0 0 0 0")


def namespace(root: Path, number: int) -> None:
    folder = root / "proc/self/ns"
    folder.mkdir(parents=True)
    (folder / "pid").symlink_to(f"pid:[{number}]")


def listed(*entries: tuple[int, int | None]) -> list[GpuProcess]:
    return [GpuProcess(pid, memory) for pid, memory in entries]


def nobody(pid: int, number: int) -> None:
    raise ProcessLookupError(errno.ESRCH, "no such process")


def test_ours_alone_on_a_machine_of_which_all_is_seen(root: Path) -> None:
    namespace(root, 4026531836)
    process(root, 10)
    assert users(listed((10, None)), {10}, 1, None, root) == Users(False)


def test_children_of_ours_are_ours(root: Path) -> None:
    namespace(root, 4026531836)
    process(root, 10)
    process(root, 11, parent=10)
    process(root, 12, parent=11)
    assert users(listed((10, None), (12, None)), {10}, 1, None, root) == Users(False)


def test_a_stranger_is_another(root: Path) -> None:
    process(root, 10)
    process(root, 20, parent=5)
    found = users(listed((10, 50 * GIB), (20, GIB)), {10}, 1, 51 * GIB, root)
    assert found.shared is True
    assert "pid 20" in found.note


def test_a_stranger_that_just_ended_is_nobody(root: Path) -> None:
    namespace(root, 4026531836)
    process(root, 10)
    assert users(listed((10, None), (20, None)), {10}, 1, None, root, nobody).shared is False


@pytest.mark.parametrize("memory", [GIB, None])
def test_a_stranger_that_proc_does_not_show_is_another(root: Path, memory: int | None) -> None:
    """``hidepid=2``, as machines of many users have it."""
    namespace(root, 4026531836)
    process(root, 10)

    def refuse(pid: int, number: int) -> None:
        assert (pid, number) == (20, 0)
        raise PermissionError(errno.EPERM, "not yours")

    found = users(listed((10, GIB), (20, memory)), {10}, 1, 2 * GIB, root, refuse)
    assert found.shared is True
    assert "pid 20" in found.note


def test_of_one_that_is_nowhere_while_its_memory_is_in_use_nothing_is_known(root: Path) -> None:
    """Of another namespace than ours. Where it is no longer in use, it has ended."""
    process(root, 10)
    both = listed((10, GIB), (20, 60 * GIB))
    found = users(both, {10}, 1, 61 * GIB, root, nobody)
    assert found.shared is None
    assert "60.0 GiB" in found.note
    assert users(both, {10}, 1, GIB, root, nobody) == Users(False)


@pytest.mark.parametrize("entries", [None, []])
def test_a_list_without_ours_says_nothing(root: Path, entries: list[GpuProcess] | None) -> None:
    assert users(entries, {10}, 1, 60 * GIB, root) == Users(None)


def test_pids_of_another_namespace_say_nothing(root: Path) -> None:
    process(root, 10)
    process(root, 4000)  # by chance a pid here too
    assert users(listed((4000, 50 * GIB), (4001, GIB)), {10}, 1, 51 * GIB, root) == Users(None)


def test_a_single_process_that_holds_all_memory_is_ours_under_any_pid(root: Path) -> None:
    assert users(listed((4000, 60 * GIB)), {10}, 1, 60 * GIB + 1000, root) == Users(False)
    assert users(listed((4000, 60 * GIB)), {10}, 1, 70 * GIB, root) == Users(None)
    assert users(listed((4000, None)), {10}, 1, 60 * GIB, root) == Users(None)


def test_hidden_processes_show_by_the_memory_they_hold(root: Path) -> None:
    namespace(root, 4026532555)
    process(root, 10)
    assert users(listed((10, 60 * GIB)), {10}, 1, 60 * GIB + 1000, root) == Users(False)
    found = users(listed((10, 60 * GIB)), {10}, 1, 72 * GIB, root)
    assert found.shared is None
    assert found.note == "12.0 GiB of this GPU's memory belong to processes that are not visible here"
    assert users(listed((10, None)), {10}, 1, 72 * GIB, root) == Users(None)


def test_several_measured_processes_share(root: Path) -> None:
    assert users(None, {10, 11}, 2, None, root).shared is True
