"""``LLMPROBE=1 python program.py``: the line in ``llmprobe.pth``, in real interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llmprobe
from llmprobe.record.journal_reader import JournalReader

pytest.importorskip("transformers")
pytestmark = pytest.mark.integration

SOURCE = Path(llmprobe.__file__).resolve().parent.parent
PTH = SOURCE / "llmprobe.pth"

# Processes the folder as site does with site-packages when an interpreter starts.
START = "import site, sys; site.addsitedir(sys.argv[1]); sys.argv[1:2] = []\n"
STATE = """
import json, threading
print(json.dumps({
    "modules": sorted(
        name for name in sys.modules if name.split(".")[0] in ("llmprobe", "torch", "transformers")
    ),
    "finders": [type(finder).__module__ for finder in sys.meta_path if "llmprobe" in type(finder).__module__],
    "threads": [thread.name for thread in threading.enumerate()],
}))
"""
GENERATE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.utils import GenerationMixin
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)).eval()
model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
print("wrapped", hasattr(vars(GenerationMixin)["_has_unfinished_sequences"], "__wrapped__"))
"""

Interpreter = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    """Runs code in an interpreter whose "site-packages" holds ``llmprobe.pth`` and, if asked, llmprobe."""

    def run(code: str, llmprobe_set: str | None, installed: bool = True) -> subprocess.CompletedProcess[str]:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        (site / "llmprobe.pth").write_text(PTH.read_text())
        if installed:
            (site / "_source.pth").write_text(f"{SOURCE}\n")
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
        env.pop("PYTHONPATH", None)
        env.update(LLMPROBE_DIR=str(tmp_path / "probe"), LLMPROBE_AGENT="off")
        if llmprobe_set is not None:
            env["LLMPROBE"] = llmprobe_set
        # Without site-packages (-S) this interpreter does not know the llmprobe that runs these tests.
        flags = ["-I"] if installed else ["-I", "-S"]
        return subprocess.run(
            [sys.executable, *flags, "-c", START + code, str(site)],
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.mark.parametrize("value", [None, "", "0"])
def test_switched_off_not_even_a_module_of_ours_is_loaded(
    interpreter: Interpreter, value: str | None
) -> None:
    done = interpreter(STATE, value)
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    assert state == {"modules": [], "finders": [], "threads": ["MainThread"]}
    assert done.stderr == ""


def test_switched_on_it_waits_without_importing_torch_or_starting_a_thread(interpreter: Interpreter) -> None:
    state = json.loads(interpreter(STATE, "1").stdout)
    assert state["finders"] == ["llmprobe.hooks.on_import"]
    assert state["threads"] == ["MainThread"]
    assert not [name for name in state["modules"] if not name.startswith("llmprobe")]


def test_a_line_left_behind_by_an_uninstalled_llmprobe_is_silent(interpreter: Interpreter) -> None:
    done = interpreter("print(sys.modules.get('llmprobe'))", "1", installed=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


def test_a_program_that_generates_leaves_its_steps_in_a_journal(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    done = interpreter(GENERATE, "1")
    assert (done.returncode, done.stdout) == (0, "wrapped True\n"), done.stderr
    (journal,) = (tmp_path / "probe" / "journals").glob("program-*.journal")
    reader = JournalReader(journal)
    try:
        assert not reader.alive()
        assert len(reader.read().steps) == 4
        assert reader.facts()["server"] == "python"
        assert reader.counters()["generated_tokens"] == 4
    finally:
        reader.close()


def test_the_same_program_without_the_variable_has_no_wrapper_and_no_file(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    done = interpreter(GENERATE, "0")
    assert (done.returncode, done.stdout) == (0, "wrapped False\n"), done.stderr
    assert not (tmp_path / "probe").exists()


def test_a_bad_value_is_said_in_one_line_and_the_program_runs(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    done = interpreter(GENERATE, "maybe")
    assert (done.returncode, done.stdout) == (0, "wrapped False\n"), done.stderr
    assert done.stderr.count("LLMPROBE='maybe' is not allowed") == 1
    assert not (tmp_path / "probe").exists()
