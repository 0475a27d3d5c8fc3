"""The command as a shell sees it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import llmprobe
from llmprobe.cli.app import VERBS, app


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'llmprobe'; from llmprobe.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_lists_every_verb_and_gives_examples():
    done = run("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f" {verb} " in done.stdout
    assert "llmprobe run -- python generate.py" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_whatever_was_written_for_it(verb):
    """What stands in square brackets is markup to rich, and not shown."""
    options = VERBS[verb].load(verb).params
    assert options
    assert [one.help for one in options if "[" in (getattr(one, "help", None) or "")] == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_flows_to_the_width_of_the_terminal(verb):
    """Typer keeps line breaks of the source, so narrower terminals would break every line twice."""
    command = VERBS[verb].load(verb)
    paragraphs = f"{command.help}\n\n{command.epilog or ''}".split("\n\n")
    assert [text for text in paragraphs if "\n" in text.strip()] == []


def test_help_imports_neither_an_engine_nor_the_agent():
    code = (
        "import sys\nfrom llmprobe.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'fastapi', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_of_its_own(verb):
    done = CliRunner().invoke(app, [verb, "--help"], prog_name="llmprobe")
    assert done.exit_code == 0, done.output
    assert f"llmprobe {verb}" in done.stdout


def test_version():
    assert run("--version").stdout == f"llmprobe {llmprobe.__version__}\n"


def test_an_unknown_verb_is_wrong_usage():
    done = run("nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_an_unknown_option_of_a_verb_is_wrong_usage():
    assert run("status", "--nonsense").returncode == 2


def test_console_script_is_this_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="llmprobe")
    assert script.value == "llmprobe.cli.app:main"
