"""Which requests of one front end are unfinished, and at which engine each of them is.

The engines of a dense model work each for itself: while one of them works on its requests another may have
nothing to do, and must not be said to wait for its host. vLLM's client chooses the engine of a request right
after the front end has taken it in, and we look on. Hooks run on the front end's event loop and cost the same
however many requests there are; only the end of one makes them look through the outputs it came with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from llmprobe.record.recorder import Recorder

#: Statistics may be older than the arrival of a request that was on its way to the engine meanwhile.
_ON_ITS_WAY_NS = 100_000_000
#: An engine that said it has nothing, and then nothing for so long, does not work on what is unfinished here.
_LEFT_BEHIND_NS = 2_000_000_000


def _now() -> int:
    return time.monotonic_ns()


class Engine:
    """One engine as a front end knows it."""

    __slots__ = (
        "forgotten",
        "has",
        "heard_ns",
        "index",
        "pending",
        "recorder",
        "requests",
        "sent_ns",
        "since_ns",
    )

    def __init__(self, index: int, recorder: Recorder | None) -> None:
        self.index = index
        #: None: it goes unrecorded.
        self.recorder = recorder
        #: Unfinished requests that were sent to it, and those of them that it does not know of.
        self.requests: set[str] = set()
        self.forgotten: set[str] = set()
        #: Whether the journal says that work is pending, and since when.
        self.pending = False
        self.since_ns = 0
        #: When it was sent a request last; when it last said how many it has, and how many that were.
        self.sent_ns = 0
        self.heard_ns = 0
        self.has = 0


class Unfinished:
    """Tells the journal of each engine when work is pending there."""

    def __init__(
        self,
        *,
        told: bool = True,
        settled: Callable[[], None] = lambda: None,
        clock: Callable[[], int] = _now,
    ) -> None:
        """
        Args:
            told: whether `sent` will be called; else an engine's own words must tell where requests are.
            settled: called when an engine has no unfinished request any more, before that is noted.
            clock: nanoseconds of CLOCK_MONOTONIC.
        """
        self.engines: dict[int, Engine] = {}
        self._told = told
        self._settled = settled
        self._clock = clock
        #: vLLM's ``OutputProcessor``, once it was seen.
        self.processor: Any = None
        self._client: Any = None
        #: Every unfinished request we know of → where it is; None: nobody has said. Others only look.
        self.at: dict[str, Engine | None] = {}
        self._on_their_way: dict[str, int] = {}  # not sent yet → when they arrived
        self._anywhere: set[str] = set()  # nobody will say where
        self._arrived_ns = 0
        self._looked: tuple[int, int] | None = None

    def take_over(self, other: Unfinished) -> None:
        """Go on with the engines and requests of another one, which is not asked any more."""
        self.processor, self._client = other.processor, other._client
        self.engines, self.at = other.engines, other.at
        self._on_their_way, self._anywhere = other._on_their_way, other._anywhere
        self._arrived_ns = other._arrived_ns

    def __len__(self) -> int:
        return len(self.at)

    def where(self, request_id: str) -> Engine | None:
        """The engine that an unfinished request was sent to; None if nobody has said."""
        return self.at.get(request_id)

    def arrived(self, processor: Any, request_id: str, since_ns: int) -> None:
        """The front end took in a request, or more input for one that is known."""
        self.processor = processor
        self._arrived_ns = self._clock()
        if request_id not in processor.request_states:  # the last input of one that had ended
            self._gone((request_id,))
        elif request_id in self.at:
            if (engine := self.at[request_id]) is not None:
                engine.sent_ns = self._arrived_ns
        else:
            self._add(request_id, since_ns, self._arrived_ns)

    def sent(self, client: Any, request_id: str, index: int) -> None:
        """vLLM's ``client`` sends a request to the engine with that data-parallel index."""
        self._client = client
        engine = self.engines.get(index)
        if engine is None:
            return
        engine.sent_ns = self._clock()
        if self.at.get(request_id, engine) is None:
            self._place(request_id, engine, self._on_their_way.pop(request_id, engine.sent_ns))
            self._anywhere.discard(request_id)

    def outputs(self, processor: Any, outputs: Any) -> None:
        """Outputs of an engine were processed. Only needed where vLLM knows of fewer requests than `at`."""
        self.processor = processor
        states, at = processor.request_states, self.at
        ended = len(at) - len(states)
        if ended <= 0:
            return
        gone = []
        for output in outputs:
            request_id = output.request_id
            if request_id in at and request_id not in states:  # others were aborted: what comes late of them
                gone.append(request_id)
                if len(gone) == ended:
                    break
        self._gone(gone)

    def aborted(self, processor: Any, ids: Collection[str]) -> None:
        """These requests are unfinished no longer."""
        self.processor = processor
        engines = {engine for name in ids if (engine := self.at.get(name)) is not None}
        self._gone(ids)
        for engine in engines or self.engines.values():
            self.settle(engine)

    def heard(self, engine: Engine, has: int, time_ns: int) -> int:
        """The engine said how many requests run or wait there. Returns `unfinished`."""
        engine.heard_ns = time_ns
        engine.has = has
        if has and not engine.pending and (engine.forgotten or self._anywhere):  # perhaps one of them
            engine.requests |= engine.forgotten
            engine.forgotten = set()
            self._begin(engine, time_ns)
        return len(engine.requests) + len(self._anywhere) if engine.pending else 0

    def unfinished(self, engine: Engine) -> int:
        """How many requests the engine may have to do something for."""
        return len(engine.requests) + len(self._anywhere) if engine.pending else 0

    def settle(self, engine: Engine) -> None:
        """Note it if nothing is unfinished at the engine any more."""
        if engine.pending and not engine.requests and not self._anywhere:
            self._end(engine, self._clock())

    def look(self, active: bool) -> None:
        """Set right what no hook was told of. For the housekeeping thread, a few times a second.

        Requests come and go while the probe is switched off. And a request that vLLM forgot to abort would be
        unfinished for ever, and all idle time after it a wait: it is left out once its engine has said, a
        moment after it was sent there, that nothing runs or waits, and then nothing more.

        Args:
            active: whether the hooks are at work.
        """
        if not active:
            self._forget_all()
            return
        if self.processor is None:
            return
        state = self._arrived_ns, len(self.processor.request_states)
        before, self._looked = self._looked, state
        if before is None:  # just switched on
            self._compare()
        elif before != state:
            return  # the hooks are in the middle of it
        elif state[1] != len(self.at):
            self._compare()
        for request_id in list(self._on_their_way):  # sent by a way we do not know
            self._nobody_says(request_id, self._on_their_way.pop(request_id, self._clock()))
        for engine in self.engines.values():
            self._look_at(engine)

    def _look_at(self, engine: Engine) -> None:
        now = self._clock()
        if engine.requests:
            if not engine.pending:
                self._begin(engine, now)
            elif (
                not engine.has
                and engine.heard_ns - engine.sent_ns >= _ON_ITS_WAY_NS
                and now - engine.heard_ns > _LEFT_BEHIND_NS
            ):
                engine.forgotten |= engine.requests
                engine.requests = set()
                self._end(engine, engine.heard_ns)
        elif not self._anywhere:
            self.settle(engine)
        elif engine.pending and not engine.has and self._accounted_for():
            self._end(engine, max(engine.since_ns, engine.heard_ns))

    def _accounted_for(self) -> bool:
        """Whether engines have said, after the newest request came, that they have as many as there are."""
        having = [engine for engine in self.engines.values() if engine.has]
        if any(engine.heard_ns <= self._arrived_ns for engine in having):
            return False
        return sum(engine.has for engine in having) >= len(self.at)

    def _add(self, request_id: str, since_ns: int, now_ns: int) -> None:
        if len(self.engines) == 1:
            (engine,) = self.engines.values()
            engine.sent_ns = now_ns
            self._place(request_id, engine, since_ns)
            return
        self.at[request_id] = None
        if self._told:
            self._on_their_way[request_id] = since_ns
        else:
            self._nobody_says(request_id, since_ns)

    def _nobody_says(self, request_id: str, since_ns: int) -> None:
        self._anywhere.add(request_id)
        for engine in self.engines.values():
            if not engine.pending:
                self._begin(engine, since_ns)

    def _place(self, request_id: str, engine: Engine, since_ns: int) -> None:
        self.at[request_id] = engine
        engine.requests.add(request_id)
        if not engine.pending:
            self._begin(engine, since_ns)

    def _gone(self, ids: Collection[str]) -> None:
        for request_id in ids:
            engine = self.at.pop(request_id, None)
            if engine is not None:
                engine.requests.discard(request_id)
                engine.forgotten.discard(request_id)
            else:
                self._on_their_way.pop(request_id, None)
                self._anywhere.discard(request_id)

    def _compare(self) -> None:
        """Hold what is known here against what vLLM knows."""
        states = self.processor.request_states
        in_flight = getattr(self._client, "reqs_in_flight", {})
        for request_id in list(states):
            if request_id not in self.at:
                now_ns = self._clock()
                self._add(request_id, now_ns, now_ns)
                if (identity := in_flight.get(request_id)) is not None:
                    self.sent(self._client, request_id, engine_index(identity))
        self._gone([request_id for request_id in list(self.at) if request_id not in states])

    def _forget_all(self) -> None:
        self._looked = None
        self._gone(list(self.at))
        for engine in self.engines.values():
            engine.heard_ns = 0  # what it said is no answer to what comes now
            if engine.pending:
                self._end(engine, self._clock())

    def _begin(self, engine: Engine, time_ns: int) -> None:
        engine.pending, engine.since_ns = True, time_ns
        if engine.recorder is not None:
            engine.recorder.pending(time_ns, self.unfinished(engine))

    def _end(self, engine: Engine, time_ns: int) -> None:
        engine.pending = False
        self._settled()
        if engine.recorder is not None:
            engine.recorder.pending(time_ns, 0)
            engine.recorder.publish()


def engine_index(identity: bytes) -> int:
    """The data-parallel index that vLLM's client makes an engine's identity of."""
    return int.from_bytes(identity, "little")
