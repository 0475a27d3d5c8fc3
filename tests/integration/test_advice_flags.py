"""Every setting that advice proposes for vLLM is one that this vLLM takes, value and all."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from llmprobe.compute.advice import ENTRIES, Entry, When
from llmprobe.compute.advice.advise import setting

pytestmark = pytest.mark.integration

#: What numbers are doubled or halved from.
CURRENT = {
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "max_cudagraph_capture_size": 512,
    "tensor_parallel_size": 2,
    "api_server_count": 1,
}

#: Reads a list of command lines, answers with what vLLM's own parser and configuration make of each. Once for
#: all of them: importing vLLM takes most of a minute.
PARSE = textwrap.dedent(
    """
    import contextlib, dataclasses, io, json, sys

    from vllm.config import CompilationConfig, SpeculativeConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # before 0.12
        from vllm.utils import FlexibleArgumentParser

    try:  # of a checkpoint that is not quantised; others load only what is quantised already
        from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES as ONLINE
    except ImportError:  # before 0.20
        ONLINE = QUANTIZATION_METHODS

    try:  # what `vllm serve` itself takes
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser

    parser = make_arg_parser(FlexibleArgumentParser())
    answers = []
    for words in json.load(sys.stdin):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                parsed = parser.parse_args(["--model", "a/model", *words])
                AsyncEngineArgs.from_cli_args(parsed)
                values = vars(parsed)
                if isinstance(config := values.get("compilation_config"), str):
                    CompilationConfig(**json.loads(config))
                if config := values.get("speculative_config"):
                    config = json.loads(config) if isinstance(config, str) else config
                    unknown = set(config) - {field.name for field in dataclasses.fields(SpeculativeConfig)}
                    assert not unknown, f"no such keys: {unknown}"
                if (method := values.get("quantization")) is not None:
                    assert method in QUANTIZATION_METHODS, f"no such quantization: {method}"
                    assert method in ONLINE, f"{method} cannot quantise while loading"
                answers.append({"values": {name: repr(value) for name, value in values.items()}})
            except SystemExit:
                answers.append({"error": said.getvalue()})
            except Exception as error:
                answers.append({"error": repr(error)})
    print(json.dumps(answers))
    """
)


def vllm_entries() -> list[Entry]:
    return [entry for entry in ENTRIES if entry.change and When("@framework", "is", "vllm") in entry.when]


def words(entry: Entry) -> list[str]:
    """What the advice tells people to put on the command line."""
    assert entry.change is not None
    proposed = entry.change.proposed(CURRENT.get(entry.change.flag), {"@running": 40})
    assert proposed is not None, entry.finding
    return shlex.split(setting(entry.change.flag, proposed, "vllm"))


@pytest.fixture(scope="module")
def parsed() -> dict[str, dict[str, Any]]:
    """Finding → what vLLM made of its setting; and of one that it does not have."""
    wanted = {entry.finding: words(entry) for entry in vllm_entries()}
    wanted["wrong"] = ["--no-such-flag", "1"]
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(list(wanted.values())),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(wanted, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("entry", vllm_entries(), ids=lambda entry: entry.finding)
def test_vllm_takes_the_setting(entry: Entry, parsed: dict[str, dict[str, Any]]) -> None:
    answer = parsed[entry.finding]
    assert "error" not in answer, answer
    assert entry.change is not None
    assert entry.change.flag in answer["values"]
    if not isinstance(entry.change.to, str):
        assert answer["values"][entry.change.flag] == repr(entry.change.to)


def test_a_flag_that_vllm_does_not_have_would_be_seen(parsed: dict[str, dict[str, Any]]) -> None:
    assert "no-such-flag" in parsed["wrong"]["error"]
