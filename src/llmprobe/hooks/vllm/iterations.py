"""Iterations of an engine as vLLM tells them to its front end: noted there, counted together elsewhere.

A front end's event loop comes by at each of them with cold caches, and each write to the journal gives the
interpreter lock away; counted together and off that loop, they take a small part of the time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from llmprobe.hooks.vllm.arrival import FirstToken
from llmprobe.hooks.vllm.output_lag import output_lag
from llmprobe.record.recorder import Recorder

_AT_MOST = 512  # only noted, should nobody come to count them
_HELD_AT_MOST = 8192  # first tokens that wait for their piece; more count as far as they came


#: When the engine core had made outputs (seconds of CLOCK_MONOTONIC; None where it does not say), and when
#: they were handed to their streams (ns).
Made = tuple[float | None, int]
NOT_MADE: Made = (None, 0)
#: An iteration of an engine: whose, the engine, when it was told; vLLM's ``IterationStats`` or None, which it
#: makes anew for each; its first tokens; its outputs; our own time (ns).
Noted = tuple[Recorder, int, int, Any, tuple[FirstToken, ...], Made, int]


class Iterations:
    """Those of one front end. `note` is for its event loop, `write` for any thread."""

    def __init__(self, failed: Callable[[str, Exception], None]) -> None:
        """
        Args:
            failed: told of iterations that cannot be read.
        """
        self._noted: deque[Noted] = deque()
        #: First tokens that wait for their piece of a response, and whose they are.
        self._held: deque[tuple[Recorder, FirstToken]] = deque()
        self._failed = failed

    def note(self, noted: Noted) -> None:
        """Leave it to be counted; here and now only if nobody has come for long."""
        self._noted.append(noted)
        if len(self._noted) >= _AT_MOST:
            self.write()

    def write(self) -> None:
        """Count what was noted. Tokens come before the end of the request that they are of.

        Nobody waits for another thread that is counting: what that has taken it writes a moment later.
        """
        sums: dict[Recorder, _Sum] = {}
        for _ in range(len(self._held)):
            try:
                recorder, token = self._held.popleft()
            except IndexError:  # another thread took the last one
                break
            self._first_tokens(sums, recorder, (token,))
        while self._noted:
            try:
                noted = self._noted.popleft()
            except IndexError:  # likewise
                break
            recorder, engine, time_ns, iteration, first_tokens, made, own_ns = noted
            try:
                self._sum(sums, recorder).add(engine, time_ns, iteration, made, own_ns)
            except Exception as error:  # noqa: BLE001 - the others are good
                self._failed("vllm.iteration", error)
            if first_tokens:
                self._first_tokens(sums, recorder, first_tokens)
        for recorder, found in sums.items():
            for write in (found.write_tokens, found.write_finished, found.write_lags):
                try:
                    write(recorder)
                except Exception as error:  # noqa: BLE001 - the others are good
                    self._failed("vllm.iteration", error)

    def forget_held(self) -> None:
        """Nobody counts any more when they leave: the hooks are off."""
        self._held.clear()

    def _sum(self, sums: dict[Recorder, _Sum], recorder: Recorder) -> _Sum:
        found = sums.get(recorder)
        if found is None:
            found = sums[recorder] = _Sum(self._failed)
        return found

    def _first_tokens(
        self, sums: dict[Recorder, _Sum], recorder: Recorder, tokens: tuple[FirstToken, ...]
    ) -> None:
        """Add those that have left; the others are asked again the next time."""
        for token in tokens:
            if token.held and len(self._held) < _HELD_AT_MOST:
                self._held.append((recorder, token))
                continue
            try:
                self._sum(sums, recorder).add_first(token)
            except Exception as error:  # noqa: BLE001 - the others are good
                self._failed("vllm.iteration", error)


class _Sum:
    """What iterations of one engine come to."""

    def __init__(self, failed: Callable[[str, Exception], None]) -> None:
        self._failed = failed
        self._prompt = self._generated = self._cached = self._preemptions = self._own_ns = 0
        self._first_token_ns: list[int] = []
        self._first_token_queue_ns: list[int] = []
        self._gaps_ns: Counter[int] = Counter()
        self._lags_ns: list[int] = []
        self._finished: list[tuple[int, int, Any]] = []

    def add_first(self, token: FirstToken) -> None:
        """A first token that has left."""
        self._first_token_ns.append(token.seconds_ns())
        if (queue_ns := token.queue_ns()) is not None:
            self._first_token_queue_ns.append(queue_ns)

    def add(self, engine: int, time_ns: int, iteration: Any, made: Made, own_ns: int) -> None:
        """One more."""
        self._own_ns += own_ns
        if (lag := output_lag(*made)) is not None:
            self._lags_ns.append(lag)
        if iteration is None:
            return
        if gaps := _token_gaps(iteration):
            first = gaps[0]
            # The tokens of a step share their gap, but for those of requests that were held up.
            if (same := gaps.count(first)) == len(gaps):
                self._gaps_ns[round(first * 1e9)] += same
            else:
                self._gaps_ns.update([round(seconds * 1e9) for seconds in gaps])
        self._generated += iteration.num_generation_tokens
        self._preemptions += iteration.num_preempted_reqs
        if prompt := iteration.num_prompt_tokens:
            self._prompt += prompt
            stats = getattr(iteration, "prompt_token_stats", None)
            self._cached += int(getattr(stats, "cached_tokens", 0) or 0)
        for finished in iteration.finished_requests:
            self._finished.append((time_ns, engine, finished))

    def write_tokens(self, recorder: Recorder) -> None:
        """To be published, as the rest, with the next `Recorder.publish`."""
        recorder.tokens(
            self._prompt,
            self._generated,
            cached=self._cached,
            preemptions=self._preemptions,
            first_token_ns=tuple(self._first_token_ns),
            first_token_queue_ns=tuple(self._first_token_queue_ns),
            inter_token_ns=self._gaps_ns,
            own_ns=self._own_ns,
            later=True,
        )

    def write_finished(self, recorder: Recorder) -> None:
        """Requests that ended."""
        for time_ns, engine, finished in self._finished:
            try:
                _write_finished(recorder, time_ns, engine, finished)
            except Exception as error:  # noqa: BLE001 - the others are good
                self._failed("vllm.finished", error)

    def write_lags(self, recorder: Recorder) -> None:
        """How long outputs waited."""
        if self._lags_ns:
            recorder.output_lags(tuple(self._lags_ns))


def _write_finished(recorder: Recorder, time_ns: int, engine: int, finished: Any) -> None:
    generated = finished.num_generation_tokens
    first = finished.queued_time + finished.prefill_time
    recorder.request(
        time_ns,
        round(finished.e2e_latency * 1e9),
        ttft_ns=round(first * 1e9) if generated else -1,
        tpot_ns=round(finished.mean_time_per_output_token * 1e9) if generated > 1 else -1,
        queue_ns=round(finished.queued_time * 1e9),
        prompt_tokens=finished.num_prompt_tokens,
        generated_tokens=generated,
        cached_tokens=int(getattr(finished, "num_cached_tokens", 0) or 0),
        preemptions=int(getattr(finished, "num_preemptions", 0) or 0),
        engine=engine,
        finish=int(finished.finish_reason),
        later=True,
    )


def _token_gaps(iteration: Any) -> list[float]:
    """Seconds before each token of an iteration that is not a first one."""
    try:
        gaps: list[float] = iteration.inter_token_latencies_iter
    except AttributeError:  # 0.11
        gaps = iteration.time_per_output_tokens_iter
    return gaps
