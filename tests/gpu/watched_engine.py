"""A program: ``vllm.LLM`` in this very process, with llmprobe, under load with pauses; our code is watched.

While code of llmprobe runs on the engine's step path, torch raises at whatever synchronises with the device,
and its allocator's calls are counted; around vLLM's own calls both are as before. Prints ``READY``, loads the
engine, prints one line of JSON, and ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from llmprobe.hooks import patch, session
from llmprobe.hooks.vllm.worker_facts import STEP_METHODS

_SEAMS = ("forward_start", "_model_forward", "pre_forward", "set_forward_context")
_ERROR = 2  # of torch.cuda.set_sync_debug_mode
_HOUSEKEEPING_EVERY = 7
_PROMPTS = (16, 24, 40, 64)
_TOKENS = 48


class Synchronised(Exception):
    """Our code waits for the device in a way that torch's own check does not see."""


class Watch:
    """Whose code runs: ours, or what it wraps."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.sections = self.allocations = self.executed = 0
        self.depth = 0  # wrappers round each other: the outermost is a step
        self._strict = False
        self._host_mode = 0  # what vLLM had torch do: its own check (VLLM_GPU_SYNC_CHECK) sets it too

    def mode(self, strict: bool) -> None:
        if self.cuda and strict and not self._strict:
            self._host_mode = torch.cuda.get_sync_debug_mode()
        self._strict = strict
        if self.cuda:
            torch.cuda.set_sync_debug_mode(_ERROR if strict else self._host_mode)

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """llmprobe's code from here on."""
        before, allocated = self._strict, self._allocated()
        self.sections += 1
        self.mode(True)
        try:
            yield
        finally:
            self.mode(before)
            self.allocations += self._allocated() - allocated

    @contextlib.contextmanager
    def theirs(self) -> Iterator[None]:
        """vLLM's code inside of ours. What it allocates is not counted."""
        before, allocated = self._strict, self._allocated()
        self.mode(False)
        try:
            yield
        finally:
            self.mode(before)
            self.allocations -= self._allocated() - allocated

    def _allocated(self) -> int:
        """How often torch's allocator was asked for memory so far."""
        if not self.cuda:
            return 0
        stats = torch.cuda.memory_stats_as_nested_dict()
        return int(stats["allocation"]["all"]["allocated"]) if stats else 0

    def checked(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """``wait``, but it raises where our code calls it in the main thread."""

        @functools.wraps(wait)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if self._strict and threading.current_thread() is threading.main_thread():
                raise Synchronised(wait.__qualname__)
            return wait(*args, **kwargs)

        return checked

    def make(self, name: str, make: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
        """``make`` of a patch, with our part of the wrapper told apart from the original."""

        def made(original: Callable[..., Any], of: patch.Patch) -> Callable[..., Any]:
            @functools.wraps(original)
            def host(*args: Any, **kwargs: Any) -> Any:
                with self.theirs():
                    return original(*args, **kwargs)

            wrapper = make(host, of)

            @functools.wraps(original)
            def outer(*args: Any, **kwargs: Any) -> Any:
                self.depth += 1
                try:
                    with self.ours():
                        result = wrapper(*args, **kwargs)
                finally:
                    self.depth -= 1
                if name == "execute_model" and not self.depth:
                    self.step(args, kwargs)
                return result

            return outer

        return made

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A step was enqueued: what housekeeping does four times a second must not wait for it either."""
        output = args[1] if len(args) > 1 else kwargs["scheduler_output"]
        self.executed += bool(output.total_num_scheduled_tokens)
        if self.executed % _HOUSEKEEPING_EVERY == 0:
            self.housekeeping()

    def housekeeping(self) -> None:
        """What the housekeeping thread calls; its errors are not swallowed here."""
        probe = session.current()
        with self.ours():
            for write in list(probe.writers) if probe is not None else []:
                write()

    def works(self) -> bool:
        """Whether a wait of ours would be seen."""
        if not self.cuda:
            return False
        value, event = torch.ones(1, device="cuda"), torch.cuda.Event()
        event.record()
        seen = []
        for wait in (value.item, torch.cuda.synchronize, event.synchronize):
            try:
                with self.ours():
                    wait()
            except (RuntimeError, Synchronised):
                seen.append(wait)
        value.item()  # and nothing is seen outside
        return len(seen) == 3


def main() -> None:
    """Takes the model's directory, and as JSON: ``seconds`` of load, and arguments of ``vllm.LLM``."""
    options = json.loads(sys.argv[2])
    seconds = options.pop("seconds")
    watch = Watch()
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        owner.synchronize = watch.checked(owner.synchronize)
    with watch_patches(watch, (*STEP_METHODS, *_SEAMS)):
        _run(watch, seconds, options)


def _run(watch: Watch, seconds: float, options: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], **options)
    probe = session.current()
    if probe is None or probe.recorder is None:
        raise SystemExit("llmprobe did not arm: is its entry point on the path, and LLMPROBE=1?")
    control = watch.works()
    watch.sections = watch.allocations = watch.executed = 0
    print("READY", flush=True)
    sampling = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
    pauses, asked, generated = random.Random(5), 0, 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        prompts = [[pauses.randrange(10, 290) for _ in range(length)] for length in _PROMPTS]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        asked += sum(_PROMPTS)
        generated += sum(len(output.outputs[0].token_ids) for output in outputs)
        time.sleep(pauses.choice((0.0, 0.05, 0.3, 0.8)))
    llm.generate([{"prompt_token_ids": prompts[0]}], sampling, use_tqdm=False)
    with ThreadPoolExecutor(1) as visitor:  # a thread that is not the engine's, as in earnest
        visitor.submit(watch.housekeeping).result()
    time.sleep(1.0)  # housekeeping writes the last steps
    said = {
        "control": control,
        "sections": watch.sections,
        "allocations": watch.allocations,
        "executed": watch.executed,
        "prompt_tokens": asked + _PROMPTS[0],
        "generated_tokens": generated + _TOKENS,
        "errors": dict(probe.guard.errors),
        "inert": probe.guard.inert,
    }
    print("JSON " + json.dumps(said), flush=True)
    sys.stdin.read()
    llm.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def watch_patches(watch: Watch, names: Collection[str]) -> Iterator[None]:
    """Every wrapper of one of these methods that is made meanwhile is watched."""
    original = patch.Patch.__init__

    @functools.wraps(original)
    def __init__(self: patch.Patch, owner: Any, name: str, make: Callable[..., Any]) -> None:
        original(self, owner, name, watch.make(name, make) if name in names else make)

    patch.Patch.__init__ = __init__  # type: ignore[method-assign]
    try:
        yield
    finally:
        patch.Patch.__init__ = original  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
