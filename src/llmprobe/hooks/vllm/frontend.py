"""The front end's side: when requests arrive, their first token, their tokens, their end.

vLLM computes all of it for its own statistics; our stat logger takes it from there. Runs on the front
end's event loop, never in the engine.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llmprobe.hooks.naming import server_name
from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import facts
from llmprobe.hooks.vllm.arrival import FirstToken, FirstTokens
from llmprobe.hooks.vllm.iterations import NOT_MADE, Iterations
from llmprobe.hooks.vllm.unfinished import Engine, Unfinished, engine_index
from llmprobe.record.journal import JournalError
from llmprobe.record.recorder import Recorder
from llmprobe.settings import logger

_now = time.monotonic_ns
_JOURNAL_BYTES = 1152 * 1024  # one a front end and engine: histograms and about 1700 requests
_SIDE_BY_SIDE = (
    "several vLLM engines of one program work side by side: their requests are counted together, and gaps of "
    "each include the time in which only another one had work"
)


class FrontEnd:
    """What llmprobe keeps about this front-end process: one recorder an engine, and what is unfinished."""

    def __init__(
        self,
        probe: Probe,
        config: Any,
        engines: list[int],
        *,
        told: bool = True,
        before: FrontEnd | None = None,
    ) -> None:
        """
        Args:
            told: whether `sent` will be called.
            before: the one that this replaces: what it noted, and what its requests still wait for, counts.
        """
        self._probe = probe
        self._first_tokens = FirstTokens()
        if before is not None and not before._goes_on(probe):
            before = None
        self._iterations: Iterations = before._iterations if before else Iterations(probe.guard.failed)
        self._heard = True  # as of the last `look`
        self._unnamed = min(engines, default=0)
        #: Whether an engine that this program made before works beside those that this is about.
        self.beside = False
        #: When outputs were made and handed to their streams of which nobody has said yet which engine's.
        self._made: tuple[float | None, int] = NOT_MADE
        self._own_ns = 0  # since the last iteration
        #: Engines whose core may have another machine's clock.
        self._elsewhere = {engine for engine in engines if not facts.engine_is_here(config, engine)}
        self._unfinished = Unfinished(told=told, settled=self._settled, clock=lambda: _now())
        if before is not None:
            self._unfinished.take_over(before._unfinished)
        self._engines = self._unfinished.engines
        for index in engines:
            engine = self._engines.get(index)
            if engine is None:
                self._engines[index] = Engine(index, self._open(config, index))
            elif engine.recorder is None:
                engine.recorder = self._open(config, index)
            else:  # its journal goes on
                engine.recorder.update_facts(model_name=facts.model_name(config), flags=facts.flags(config))

    def _goes_on(self, probe: Probe) -> bool:
        """Whether another one may go on with what this one has.

        After `llmprobe.disable` it is another probe's, whose journals are closed and errors not read; in a
        forked child its journals are the parent's.
        """
        recorders = [engine.recorder for engine in self._engines.values() if engine.recorder is not None]
        return self._probe is probe and not any(recorder.closed for recorder in recorders)

    def _open(self, config: Any, engine: int) -> Recorder | None:
        probe = self._probe

        def said() -> dict[str, Any]:
            return facts.process_facts(
                probe.settings, server_name(probe.settings), "frontend", config, engine
            )

        if all(known.recorder is None for known in self._engines.values()):
            return probe.arm("frontend", said, size=_JOURNAL_BYTES)
        try:
            recorder = Recorder.open(probe.settings.directory, "frontend", said(), _JOURNAL_BYTES)
        except JournalError as error:
            logger().error("engine %d goes unrecorded: %s", engine, error)
            return None
        probe.adopt(recorder)
        return recorder

    def arrived(self, processor: Any, request: Any, new: bool) -> None:
        """A request was taken in, or (not ``new``) more input of one that is known."""
        entered = _now()
        since, arrival = entered, getattr(request, "arrival_time", 0.0)
        if arrival:
            since -= round(max(time.time() - arrival, 0.0) * 1e9)
        if new:
            self._first_tokens.arrived(request.request_id, since)
        self._unfinished.arrived(processor, request.request_id, since)
        self._own_ns += _now() - entered

    def sent(self, client: Any, request: Any, identity: bytes) -> None:
        """vLLM's client has chosen the engine that a request goes to."""
        self._unfinished.sent(client, request.request_id, engine_index(identity))

    def outputs(
        self, processor: Any, outputs: Any, made_seconds: float | None = None, iteration: Any = None
    ) -> None:
        """Outputs that the engine made at that time were detokenized and handed to their streams.

        Args:
            iteration: vLLM's statistics of them so far; None if it keeps none.
        """
        entered = _now()
        if outputs:  # of an iteration's parts the last counts
            self._made = made_seconds, entered
        if iteration is None:
            self._first_tokens.outputs(outputs)
        elif first := iteration.time_to_first_tokens_iter:
            self._first_tokens.outputs(outputs, len(first))
        unfinished = self._unfinished
        unfinished.processor = processor
        if len(processor.request_states) < len(unfinished.at):
            unfinished.outputs(processor, outputs)
        self._own_ns += _now() - entered

    def aborted(self, processor: Any, ids: list[str]) -> None:
        """These requests were aborted by their clients."""
        self._first_tokens.forget(ids)
        now = _now()
        for request_id in ids:
            engine = self._unfinished.where(request_id) or next(iter(self._engines.values()))
            if engine.recorder is not None:
                engine.recorder.request(now, 0, engine=engine.index, aborted=True, known=False, later=True)
        self._unfinished.aborted(processor, ids)

    def _settled(self) -> None:
        """Nothing is unfinished at an engine."""
        self._iterations.write()
        if not len(self._unfinished):
            self._first_tokens.forget_all()

    def look(self, active: bool) -> None:
        """Count what was noted, and set right what no hook was told of.

        Runs on the housekeeping thread, a few times a second.

        Args:
            active: whether the hooks are at work.
        """
        self._iterations.write()
        if not active:
            self._iterations.forget_held()
        self._unfinished.look(active)
        if self.beside:
            self._note(_SIDE_BY_SIDE)
        for engine in self._engines.values():
            if engine.recorder is not None:
                engine.recorder.tokenless(len(self._first_tokens) if active else 0)
        if active is self._heard:
            return
        self._heard = active
        if not active:  # what comes and goes from here on nobody tells: an idle engine would for ever have it
            for engine in self._engines.values():
                if engine.recorder is not None:
                    engine.recorder.load(0, 0)

    def _note(self, text: str) -> None:
        for engine in self._engines.values():
            if engine.recorder is not None and text not in (notes := engine.recorder.facts.get("notes", ())):
                engine.recorder.update_facts(notes=[*notes, text])

    def record(self, scheduler: Any, iteration: Any, told: int | None) -> None:
        """vLLM's statistics of one engine iteration; either may be None.

        Args:
            told: the engine's index; None where there is but one.
        """
        entered = _now()
        engine = self._unnamed if told is None else told
        made, self._made = self._made, NOT_MADE
        of = self._engines.get(engine)
        recorder = of.recorder if of is not None else None
        if of is None or recorder is None:
            self._first_tokens.take()  # they are no other engine's
            return
        if scheduler is not None:
            running = scheduler.num_running_reqs
            waiting = scheduler.num_waiting_reqs + getattr(scheduler, "num_skipped_waiting_reqs", 0)
            unfinished = self._unfinished.heard(of, running + waiting, entered)
            # Also when nothing changed: of several front ends the one that heard last is believed.
            recorder.load(running, waiting, scheduler.kv_cache_usage, unfinished, later=True, time_ns=entered)
        first_tokens: tuple[FirstToken, ...] = ()
        if iteration is not None and iteration.time_to_first_tokens_iter:
            first_tokens = self._first(iteration)
        if engine in self._elsewhere:
            made = NOT_MADE
        own, self._own_ns = self._own_ns, 0
        self._iterations.note(
            (recorder, engine, entered, iteration, first_tokens, made, own + _now() - entered)
        )
        if not of.requests:
            self._unfinished.settle(of)

    def _first(self, iteration: Any) -> tuple[FirstToken, ...]:
        """An iteration's first tokens."""
        tokens = self._first_tokens.take()
        first = iteration.time_to_first_tokens_iter
        if len(tokens) == len(first):
            return tokens
        # Some arrived before we looked. vLLM's own times end before it detokenizes and hands the tokens
        # to their streams.
        handed = round(max(time.time() - iteration.iteration_timestamp, 0.0) * 1e9)
        return tuple(FirstToken(0, round(seconds * 1e9) + handed) for seconds in first)


_front_end: FrontEnd | None = None
_told = False  # whether vLLM's client says which engine it chooses


def _the_front_end(probe: Probe) -> FrontEnd | None:
    return _front_end if probe.armed else None


def install_stat_loggers(probe: Probe, module: ModuleType) -> None:
    """Ride on vLLM's manager of stat loggers; works from 0.11, and with any number of front ends."""
    guard = probe.guard
    managers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # → their configuration's id
    newest = 0

    def arm(manager: Any, config: Any, engines: Any) -> None:
        global _front_end
        nonlocal newest
        managers[manager] = newest = id(config)
        those = sorted(int(engine) for engine in engines or [facts.engine_of(config)])
        _front_end = FrontEnd(probe, config, those, told=_told, before=_front_end)

    def make_init(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if patch.active and probe.active:
                config = args[0] if args else kwargs.get("vllm_config")
                engines = args[1] if len(args) > 1 else kwargs.get("engine_idxs")
                guard.call("vllm.frontend", arm, self, config, engines)

        return __init__

    def make_record(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def record_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            # `Probe.active` and `_the_front_end`, inline: this runs at each step.
            if (
                patch.active
                and probe.enabled
                and not guard.inert
                and probe.armed
                and (front_end := _front_end) is not None
            ):
                try:
                    scheduler = args[0] if args else kwargs.get("scheduler_stats")
                    iteration = args[1] if len(args) > 1 else kwargs.get("iteration_stats")
                    front_end.record(scheduler, iteration, kwargs.get("engine_idx"))
                    if len(managers) > 1 and managers.get(self, newest) != newest:
                        front_end.beside = True
                except Exception as error:  # noqa: BLE001 - at each step: inline, and not by `Guard.call`
                    guard.failed("vllm.record", error)
            return result

        return record_stats

    def look() -> None:
        front_end = _the_front_end(probe)
        if front_end is not None:
            front_end.look(probe.active)

    probe.writers.append(look)
    probe.patch(module.StatLoggerManager, "__init__", make_init)
    probe.patch(module.StatLoggerManager, "record", make_record)


def install_core_client(probe: Probe, module: ModuleType) -> None:
    """Note which engine vLLM's client chooses for a request, where it has several to choose from."""
    global _told
    guard = probe.guard
    owner = getattr(module, "DPLBAsyncMPClient", None)
    if owner is None or not hasattr(owner, "get_core_engine_for_request"):
        return
    _told = True

    def sent(client: Any, request: Any, identity: bytes) -> None:
        front_end = _the_front_end(probe)
        if front_end is not None:
            front_end.sent(client, request, identity)

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def get_core_engine_for_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            identity = original(self, request, *args, **kwargs)
            if patch.active and probe.active:
                guard.call("vllm.sent", sent, self, request, identity)
            return identity

        return get_core_engine_for_request

    probe.patch(owner, "get_core_engine_for_request", make)


def install_output_processor(probe: Probe, module: ModuleType) -> None:
    """Note arrivals, first tokens and aborts, which the statistics tell late or not at all."""
    guard = probe.guard

    def aborted(processor: Any, ids: Any) -> None:
        front_end = _the_front_end(probe)
        if front_end is not None:
            front_end.aborted(processor, list(ids or ()))

    def make_add(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
            front_end = _the_front_end(probe) if patch.active and probe.active else None
            if front_end is None:
                return original(self, *args, **kwargs)
            request, new = args[0] if args else kwargs.get("request"), False
            try:
                new = request.request_id not in self.request_states  # type: ignore[union-attr]
            except Exception as error:  # noqa: BLE001 - at each request: inline, and not by `Guard.call`
                guard.failed("vllm.add_request", error)
            result = original(self, *args, **kwargs)
            try:
                front_end.arrived(self, request, new)
            except Exception as error:  # noqa: BLE001
                guard.failed("vllm.add_request", error)
            return result

        return add_request

    def make_process(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def process_outputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            # As at `record_stats`.
            if (
                patch.active
                and probe.enabled
                and not guard.inert
                and probe.armed
                and (front_end := _front_end) is not None
            ):
                try:
                    those = args[0] if args else kwargs.get("engine_core_outputs")
                    made = args[1] if len(args) > 1 else kwargs.get("engine_core_timestamp")
                    iteration = args[2] if len(args) > 2 else kwargs.get("iteration_stats")
                    front_end.outputs(self, those, made, iteration)
                except Exception as error:  # noqa: BLE001 - at each step: inline, and not by `Guard.call`
                    guard.failed("vllm.process_outputs", error)
            return result

        return process_outputs

    def make_abort(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        depth = 0  # it calls itself for the children of a request with n > 1

        def abort_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = original(self, *args, **kwargs)
            finally:
                depth -= 1
            if patch.active and probe.active and not depth:
                guard.call("vllm.abort_requests", aborted, self, result)
            return result

        return abort_requests

    probe.patch(module.OutputProcessor, "add_request", make_add)
    probe.patch(module.OutputProcessor, "process_outputs", make_process)
    probe.patch(module.OutputProcessor, "abort_requests", make_abort)


def install_llm_engine(probe: Probe, module: ModuleType) -> None:
    """``vllm.LLM``: its statistics are off unless asked for; turn them on, and say so."""
    _force_statistics(probe, module.LLMEngine)


def install_async_llm(probe: Probe, module: ModuleType) -> None:
    """``vllm serve --disable-log-stats``: likewise."""
    _force_statistics(probe, module.AsyncLLM)


def _force_statistics(probe: Probe, owner: type) -> None:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if patch.active and probe.active:
                # (vllm_config, executor_class, log_stats, ...) in every version so far
                if kwargs.get("log_stats") is False:
                    kwargs["log_stats"] = True
                    logger().info("vLLM's request statistics were off; turned on for TTFT and TPOT")
                elif len(args) > 2 and args[2] is False:
                    args = (*args[:2], True, *args[3:])
                    logger().info("vLLM's request statistics were off; turned on for TTFT and TPOT")
            original(self, *args, **kwargs)

        return __init__

    probe.patch(owner, "__init__", make)
