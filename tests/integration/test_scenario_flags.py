"""Every server of the scenarios on a GPU has flags that the installed vLLM takes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("vllm")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from support.gpu_scenario_servers import KINDS, flags_of  # noqa: E402

pytestmark = pytest.mark.integration

#: Reads a list of command lines, answers with what is wrong with each; "" where nothing is.
PARSE = textwrap.dedent(
    """
    import contextlib, io, json, sys

    from vllm.config import CompilationConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.import_utils import resolve_obj_by_qualname

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # before 0.12
        from vllm.utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    answers = []
    for words in json.load(sys.stdin):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                parsed = parser.parse_args(["--model", "a/model", *words])
                AsyncEngineArgs.from_cli_args(parsed)
                if isinstance(config := parsed.compilation_config, str):
                    CompilationConfig(**json.loads(config))
                for name in (parsed.scheduler_cls, parsed.worker_extension_cls):
                    if isinstance(name, str) and name:
                        resolve_obj_by_qualname(name)
                answers.append("")
            except SystemExit:
                answers.append(said.getvalue())
            except Exception as error:
                answers.append(repr(error))
    print(json.dumps(answers))
    """
)


def test_vllm_takes_the_flags_of_every_server() -> None:
    wanted = [flags_of(kind) for kind in KINDS.values()] + [["--no-such-flag", "1"]]
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=BENCHMARKS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *answers, wrong = json.loads(done.stdout.splitlines()[-1])
    assert dict(zip(KINDS, answers, strict=True)) == dict.fromkeys(KINDS, "")
    assert "--no-such-flag" in wrong
