"""What llmprobe costs a program that calls ``generate``: one process, the probe off and on in turns."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.demo.server import free_port, stop_agent
from support.gpu_models import CONFIGURATIONS
from support.journals import StepLog
from support.own_time import OwnTime
from support.paired import Difference, paired
from support.serving import new_directory
from support.switch import switch, wait_known

_PROMPT_TOKENS = 16
_NEW_TOKENS = 128
_CALLS_BETWEEN_READS = 20  # the ring holds a hundred times as many steps


@dataclass(frozen=True)
class Plan:
    """What to run."""

    pairs: int
    block_seconds: float
    warm_up_seconds: float
    model: str | None = None  # of `support.gpu_models`, on a GPU; None: a tiny one on the CPU


@dataclass(frozen=True)
class TransformersCost:
    """Differences in seconds, own time in microseconds.

    ``cpu`` is processor time of all threads of the program, a token: also what is not on the step path.
    """

    calls: int
    token: Difference
    call: Difference
    cpu: Difference
    own: OwnTime


def _tiny() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # too small a model to split: more threads only wait for each other
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=1,
        )
    )


def _on_a_gpu(name: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    said = {**CONFIGURATIONS[name], "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
    with torch.device("cuda"):
        config = AutoConfig.for_model(said.pop("model_type"), **said)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


class _Program:
    """A model that generates greedily, and the program's own clock of its tokens."""

    def __init__(self, model: str | None) -> None:
        import torch
        from transformers import StoppingCriteria

        torch.manual_seed(0)
        self._model: Any = (_tiny() if model is None else _on_a_gpu(model)).eval()
        device = self._model.device
        self._prompt = torch.randint(2, 128, (1, _PROMPT_TOKENS), device=device)
        self._mask = torch.ones_like(self._prompt)
        never = torch.zeros(1, dtype=torch.bool, device=device)
        times = self._times = []

        class Clock(StoppingCriteria):
            """Asked once a token whether to stop; never does, and notes the time."""

            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                times.append(time.perf_counter_ns())
                return never

        self._clock = Clock()

    def generate(self) -> np.ndarray:
        """One call: when it began, each token's time, when it was over."""
        self._times.clear()
        begin = time.perf_counter_ns()
        self._model.generate(
            self._prompt,
            attention_mask=self._mask,
            do_sample=False,
            max_new_tokens=_NEW_TOKENS,
            stopping_criteria=[self._clock],
        )
        return np.array([begin, *self._times, time.perf_counter_ns()])


def measure(plan: Plan) -> TransformersCost:
    """Generate with the probe off and on in turns, and compare."""
    import llmprobe

    directory = new_directory()
    try:
        probe = llmprobe.enable(dir=str(directory), listen=f"127.0.0.1:{free_port()}")
        program = _Program(plan.model)
        program.generate()
        if probe.recorder is None:
            raise RuntimeError("the probe did not arm; what it said stands above")
        wait_known(directory)
        return _compare(plan, directory, probe, program)
    finally:
        llmprobe.disable()
        stop_agent(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _compare(plan: Plan, directory: Path, probe: Any, program: _Program) -> TransformersCost:
    from llmprobe.record.journal_reader import JournalReader

    writer = probe.recorder.writer
    log = StepLog(JournalReader(writer.path, writer))
    for _ in _calls(program, plan.warm_up_seconds):
        pass
    log.poll()
    stretches: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    tokens: dict[bool, list[float]] = {False: [], True: []}
    calls: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    count = 0
    for pair in range(plan.pairs):
        for on in (False, True) if pair % 2 == 0 else (True, False):
            switch(directory, on)
            begin, used = time.monotonic_ns(), time.process_time()
            seen = []
            reading = 0.0  # processor time of this benchmark's own
            for index, times in enumerate(_calls(program, plan.block_seconds)):
                seen.append(times)
                if index % _CALLS_BETWEEN_READS == 0:
                    started = time.thread_time()
                    log.poll()
                    reading += time.thread_time() - started
            stretches[on].append((begin, time.monotonic_ns()))
            cpu[on].append((time.process_time() - used - reading) / len(seen) / _NEW_TOKENS)
            count += len(seen)
            table = np.array(seen) / 1e9
            # The first token has the prompt in it, and what is after the last is no token.
            tokens[on].append(float(np.median(np.diff(table[:, 1:-1]))))
            calls[on].append(float(np.median(table[:, -1] - table[:, 0])))
        print(f"pair {pair + 1} of {plan.pairs}", file=sys.stderr, flush=True)
    log.poll()
    if len(log.own_ns(stretches[False])):
        raise RuntimeError("steps were recorded while the probe was off")
    own = OwnTime.of(log.own_ns(stretches[True]))
    token, call, cpu_token = (paired(of[False], of[True]) for of in (tokens, calls, cpu))
    return TransformersCost(count, token, call, cpu_token, own)


def _calls(program: _Program, seconds: float) -> Iterator[np.ndarray]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield program.generate()
