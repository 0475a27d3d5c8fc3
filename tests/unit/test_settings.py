from __future__ import annotations

import os

import pytest

from llmprobe.hooks.naming import is_serve, program_name, server_name
from llmprobe.settings import KernelWindows, Settings, SettingsError, parse_size

WRONG = {
    "LLMPROBE": "maybe",
    "LLMPROBE_DIR": "relative/path",
    "LLMPROBE_SERVER": "a b",
    "LLMPROBE_AGENT": "never",
    "LLMPROBE_LISTEN": "9480",
    "LLMPROBE_TOKEN_FILE": "token",
    "LLMPROBE_NVTX": "2",
    "LLMPROBE_KERNEL_WINDOWS": "10/0.1",
    "LLMPROBE_CAPTURE_DIR": "here",
    "LLMPROBE_CAPTURE_MAX_SECONDS": "-1",
    "LLMPROBE_CAPTURE_MAX_BYTES": "a lot",
    "LLMPROBE_VLLM_METRICS": "perhaps",
    "LLMPROBE_THRESHOLDS": "limits.toml",
    "LLMPROBE_SNAPSHOT_DIR": "snapshots",
    "LLMPROBE_LOG_LEVEL": "LOUD",
}


@pytest.mark.parametrize(("variable", "value"), WRONG.items())
def test_a_wrong_value_is_one_line_with_variable_value_and_what_is_allowed(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"LLMPROBE": "1", variable: value})
    message = str(caught.value)
    assert message.startswith(f"{variable}={value!r} is not allowed: ")
    assert "\n" not in message
    assert len(caught.value.allowed) > 5


@pytest.mark.parametrize(
    ("variable", "value"),
    [("LLMPROBE_DIR", "~nobody-of-that-name/probe"), ("LLMPROBE_CAPTURE_MAX_BYTES", "9" * 400)],
)
def test_what_fails_otherwise_than_by_its_form_is_said_likewise(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{variable}="):
        Settings.from_env({"LLMPROBE": "1", variable: value})


def test_every_variable_has_its_wrong_value_here() -> None:
    import ast
    import inspect

    import llmprobe.settings as module

    named = {
        node.value
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("LLMPROBE")
    }
    assert named - {"LLMPROBE_GROUP"} == set(WRONG)


def test_defaults_are_those_of_the_documents() -> None:
    settings = Settings.from_env({})
    assert not settings.enabled
    assert settings.listen == ("127.0.0.1", 9480)
    assert settings.agent == "auto"
    assert settings.vllm_metrics
    assert settings.kernel_windows is None


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 KiB", 1536), ("3k", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_kernel_windows_and_ipv6() -> None:
    settings = Settings.from_env({"LLMPROBE_KERNEL_WINDOWS": "0.1/10", "LLMPROBE_LISTEN": "[::1]:1"})
    assert settings.kernel_windows == KernelWindows(0.1, 10)
    auto = Settings.from_env({"LLMPROBE_KERNEL_WINDOWS": "auto"}).kernel_windows
    assert auto == KernelWindows(0.1, 10, spare_graphs=True)
    assert settings.listen == ("::1", 1)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/usr/bin/vllm", "serve", "model"], "vllm-8000"),
        (["vllm", "serve", "model", "--port", "8123"], "vllm-8123"),
        (["vllm", "serve", "model", "--port=8124"], "vllm-8124"),
        (["/x/generate.py"], "generate"),
        (["-c"], "python"),
    ],
)
def test_a_server_is_named_after_its_port_and_a_program_after_itself(argv: list[str], name: str) -> None:
    assert server_name(Settings.from_env({}), argv) == name


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/usr/bin/transformers", "serve", "--port", "9000"], "transformers"),
        (["/home/user/api_server.py"], "api_server"),
        (["-c", "serve"], "python"),
        ([os.fsdecode(b"/home/gen\xff.py")], "gen?"),
    ],
)
def test_a_program_without_vllm_is_called_as_it_is_called(argv: list[str], name: str) -> None:
    assert program_name(Settings.from_env({}), argv) == name
    assert program_name(Settings.from_env({"LLMPROBE_SERVER": "mine"}), argv) == "mine"


def test_only_vllm_serve_has_a_number_of_api_servers_to_set() -> None:
    assert is_serve(["/usr/bin/vllm", "serve", "model"])
    assert not is_serve(["generate.py"])
    assert not is_serve(["/x/vllm/entrypoints/openai/api_server.py", "--model", "serve"])


def test_the_port_may_stand_in_a_configuration_file(tmp_path: object) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "serve.yaml"
    file.write_text("model: x\nport: 8555  # ours\n")
    assert server_name(Settings.from_env({}), ["vllm", "serve", "--config", str(file)]) == "vllm-8555"
