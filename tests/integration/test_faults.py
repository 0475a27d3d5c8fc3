"""What the host goes through when our part cannot work: one line, and it runs on."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import complete, get_json
from servers import break_hook
from waiting import until

from llmprobe.demo.server import VllmServer
from llmprobe.record import layout

pytestmark = pytest.mark.integration

GENERATE = textwrap.dedent(
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.set_num_threads(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)).eval()
    for _ in range(3):
        out = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    print("generated", tuple(out.shape))
    """
)


def generate(directory: Path, limit: int | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
    environment |= {"LLMPROBE": "1", "LLMPROBE_DIR": str(directory), "LLMPROBE_AGENT": "off", **variables}

    def small_files() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-c", GENERATE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=small_files,
    )


def said_once(done: subprocess.CompletedProcess[str], what: str) -> None:
    lines = [line for line in done.stderr.splitlines() if "llmprobe" in line]
    assert len(lines) == 1, lines
    assert what in lines[0]
    assert "the probe stays off" in lines[0]
    assert "generated (1, 7)" in done.stdout
    assert done.returncode == 0


def test_a_directory_that_cannot_be_made_is_one_line() -> None:
    said_once(generate(Path("/proc/llmprobe")), "cannot make /proc/llmprobe")


def test_a_file_where_the_directory_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said_once(generate(tmp_path / "file"), "LLMPROBE_DIR")


def test_no_room_for_the_journal_is_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    said_once(generate(tmp_path / "probe", limit=1 << 20), "KiB needed")
    assert not list((tmp_path / "probe" / "journals").iterdir())


@contextlib.contextmanager
def memory_file_system(path: Path, size: int) -> Iterator[None]:
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "llmprobe-test", str(path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; the test above covers a file that cannot grow")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_shared_memory_is_one_line(tmp_path: Path) -> None:
    with memory_file_system(tmp_path / "shm", 2 << 20):
        said_once(generate(tmp_path / "shm" / "probe"), "No space left on device")


def test_shared_memory_of_a_plain_container_is_enough_beside_another_tenant(tmp_path: Path) -> None:
    with memory_file_system(tmp_path / "shm", 64 << 20):
        with (tmp_path / "shm" / "another").open("wb") as other:
            os.posix_fallocate(other.fileno(), 0, (64 << 20) - layout.DEFAULT_SIZE - (256 << 10))
        done = generate(tmp_path / "shm" / "probe", LLMPROBE_LOG_LEVEL="WARNING")
        assert "generated (1, 7)" in done.stdout
        assert "llmprobe" not in done.stderr
        (journal,) = (tmp_path / "shm" / "probe" / "journals").iterdir()
        assert journal.stat().st_size == layout.DEFAULT_SIZE


def test_a_hook_that_fails_at_every_step_goes_inert_and_the_server_serves(
    broken_server: VllmServer,
) -> None:
    server = broken_server
    break_hook(server)
    for number in range(3):
        answer = complete(server, [20 + number] * 10, 20)
        assert answer["usage"]["completion_tokens"] == 20

    def inert() -> bool:
        (shown,) = get_json(f"{server.agent_url}/api/status")["servers"]
        return bool(shown["inert"]) and shown["ranks"][0]["errors"] == 10

    until(inert, "the probe's giving up")
    log = server.log.read_text()
    assert log.count("10 internal errors, the last in vllm.execute_model") == 1
    assert log.count("error in vllm.execute_model") == 1
