"""A program: ``vllm.LLM`` with llmprobe in this very process; one decode step of each batch is profiled.

Kernels are profiled from ``cudaProfilerStart`` to ``cudaProfilerStop``, which ncu follows with
``--profile-from-start off``: from when the worker's ``execute_model`` is entered until its ``sample_tokens``
returns. Before each such step lies one kernel of another kind, `MARK`, so that steps are told apart.

Takes a model directory, a folder for what llmprobe recorded, and as JSON: ``batches``, ``context`` in tokens,
``engine``, arguments of ``vllm.LLM``. What was recorded is saved after each batch.
"""

from __future__ import annotations

import functools
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: In the name of the kernel that ``torch.cuda._sleep`` launches.
MARK = "spin_kernel"
STEPS, FACTS = "steps.npy", "facts.json"
_WHICH = 5  # decode step of a batch
_TOKENS = 8
_LOWEST_ID, _HIGHEST_ID = 10, 290
_WRITTEN_SECONDS = 1.0


class Window:
    """Lets the profiler see the step that it was told to wait for."""

    def __init__(self) -> None:
        self.profiled: list[int] = []  # when each step was entered, nanoseconds of CLOCK_MONOTONIC
        self._batch = self._seen = 0
        self._open = False

    def expect(self, batch: int) -> None:
        """The next decode step of so many requests that is the `_WHICH`-th."""
        self._batch, self._seen = batch, 0

    def wrap(self, worker: type) -> None:
        """Follow the steps of a worker class."""
        worker.execute_model = self._around(worker.execute_model, self._begin, lambda out: out is not None)
        worker.sample_tokens = self._around(worker.sample_tokens, lambda output: None, lambda out: True)

    def _around(
        self, original: Callable[..., Any], before: Callable[[Any], None], over: Callable[[Any], bool]
    ) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(worker: Any, argument: Any, *args: Any, **kwargs: Any) -> Any:
            before(argument)
            result = original(worker, argument, *args, **kwargs)
            if self._open and over(result):
                self._open = False
                _stop()
            return result

        return method

    def _begin(self, output: Any) -> None:
        decodes = output.total_num_scheduled_tokens == self._batch and not output.scheduled_new_reqs
        self._seen += decodes
        if self._batch and decodes and self._seen == _WHICH:
            self._batch, self._open = 0, True
            self.profiled.append(time.monotonic_ns())
            _start()


def _start() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda._sleep(1)


def _stop() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def main() -> None:
    """See the module."""
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.gpu_worker import Worker

    folder, options = Path(sys.argv[2]), json.loads(sys.argv[3])
    window = Window()
    window.wrap(Worker)
    llm = LLM(sys.argv[1], **options["engine"])
    sampling = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
    ids = random.Random(0)
    length = options["context"] - _WHICH
    for batch in options["batches"]:
        # Nothing in common, so that no request finds another's keys and values in a cache.
        prompts = [[ids.randint(_LOWEST_ID, _HIGHEST_ID) for _ in range(length)] for _ in range(batch)]
        window.expect(batch)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        time.sleep(_WRITTEN_SECONDS)
        _save(folder, window.profiled)  # at once: what comes may fail
    llm.llm_engine.engine_core.shutdown()


def _save(folder: Path, profiled: list[int]) -> None:
    """What llmprobe recorded of the profiled steps."""
    from llmprobe.hooks import session
    from llmprobe.record.journal_reader import JournalReader

    probe = session.current()
    if probe is None or probe.recorder is None:
        raise SystemExit("llmprobe did not arm: is it installed where vLLM finds its plugins?")
    reader = JournalReader(probe.recorder.writer.path, probe.recorder.writer)
    steps = reader.read().steps
    # Ours is the outermost wrapper: its step was entered last before.
    rows = np.searchsorted(steps["time"], profiled, side="right") - 1
    np.save(folder / STEPS, steps[rows])
    (folder / FACTS).write_text(json.dumps(reader.facts()))


if __name__ == "__main__":
    main()
