"""The front end's side: when requests arrive, their first token, their tokens, their end.

vLLM computes all of it for its own statistics; our stat logger takes it from there. Runs on the front
end's event loop, never in the engine.
"""

from __future__ import annotations

import time
from typing import Any

from llmprobe.hooks.naming import server_name
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
