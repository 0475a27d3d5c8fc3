"""One capture as data: what was asked for, the state it is in, and which state may follow.

Pure: no clock and no I/O. `llmprobe.capture.store` writes it to disk at every change.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

SCHEMA = 1

State = Literal["pending", "recording", "importing", "analysing", "done", "failed", "cancelled"]
Tool = Literal["nsys", "torch", "kernels"]

STATES: tuple[State, ...] = (
    "pending",
    "recording",
    "importing",
    "analysing",
    "done",
    "failed",
    "cancelled",
)
#: In these nothing will change any more.
FINAL: frozenset[State] = frozenset({"done", "failed", "cancelled"})
_NEXT: dict[State, frozenset[State]] = {
    "pending": frozenset({"recording", "failed", "cancelled"}),
    "recording": frozenset({"importing", "failed", "cancelled"}),
    "importing": frozenset({"analysing", "failed", "cancelled"}),
    "analysing": frozenset({"done", "failed", "cancelled"}),
    "done": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


class TransitionError(Exception):
    """A state that may not follow the present one."""


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of a capture's id, and so can be nothing else in a path."""
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True)
class Request:
    """What was asked for. Exactly one of ``seconds`` and ``steps`` is given.

    ``when`` is text for `llmprobe.capture.condition.parse`; ``wait_seconds`` is how long it may take to come.
    ``ranks``: of which workers; None means all. ``torch_cpu`` and ``torch_stacks``: what torch's profiler
    records beside the GPU.
    """

    tool: Tool
    seconds: float | None
    steps: int | None
    when: str = "now"
    wait_seconds: float = 300.0
    label: str = ""
    ranks: tuple[int, ...] | None = None
    torch_cpu: bool = False
    torch_stacks: bool = False


@dataclass(frozen=True)
class Capture:
    """One capture. ``times`` holds when each state was entered, in Unix seconds, for whoever reads it.

    ``clocks`` holds the same moments in seconds of CLOCK_MONOTONIC, which nobody sets; durations go by it. It
    begins anew with each boot, so it is of ``boot`` alone. An agent that starts anew finds the same clock.
    ``owner`` is the shared directory of the agent that runs it, ``group`` and ``server`` what it looks at.
    ``progress`` (0–1) is that of the present state, None where nobody knows. ``reason`` says why it failed or
    was cancelled, in the tool's own last words where it had any; ``notes`` what else is worth knowing.
    """

    id: str
    owner: str
    server: str
    group: str
    request: Request
    state: State = "pending"
    times: Mapping[str, float] = field(default_factory=dict)
    progress: float | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    clocks: Mapping[str, float] = field(default_factory=dict)
    boot: str = ""

    @property
    def live(self) -> bool:
        """Whether it still goes on."""
        return self.state not in FINAL

    def enter(
        self, state: State, at: float, *, reason: str | None = None, clock: float | None = None
    ) -> Capture:
        """This capture in the next state.

        Args:
            at: Unix seconds.
            clock: the same moment in seconds of CLOCK_MONOTONIC, where it is to be known.

        Raises:
            TransitionError: ``state`` may not follow, or an end that needs a reason has none.
        """
        if state not in _NEXT[self.state]:
            raise TransitionError(f"{self.id}: {state} cannot follow {self.state}")
        if (state in ("failed", "cancelled")) != (reason is not None):
            raise TransitionError(f"{self.id}: {state} {'without' if reason is None else 'with'} a reason")
        clocks = self.clocks if clock is None else {**self.clocks, state: clock}
        times = {**self.times, state: at}
        return dataclasses.replace(
            self, state=state, times=times, clocks=clocks, progress=None, reason=reason
        )

    def since(self, state: State, at: float, clock: float) -> float:
        """Seconds since a state was entered, given the time now; by Unix time where nothing else is known."""
        if state in self.clocks:
            return max(0.0, clock - self.clocks[state])
        return max(0.0, at - self.times.get(state, at))

    def in_boot(self, boot: str) -> Capture:
        """This capture without moments on the clock of another boot."""
        return self if self.boot == boot else dataclasses.replace(self, clocks={}, boot=boot)

    def at(self, progress: float | None) -> Capture:
        """This capture with another progress (cut to 0–1)."""
        return dataclasses.replace(
            self, progress=None if progress is None else round(min(max(progress, 0.0), 1.0), 3)
        )

    def noting(self, note: str) -> Capture:
        """This capture with one more note."""
        return self if note in self.notes else dataclasses.replace(self, notes=(*self.notes, note))

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {"schema": SCHEMA, **dataclasses.asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Any) -> Capture:
        """What `to_json` gave.

        Raises:
            ValueError: it is something else, or what no JSON in UTF-8 can say.
        """
        try:
            if data["schema"] != SCHEMA or not is_id(data["id"]) or data["state"] not in STATES:
                raise ValueError("not a capture of this version")
            found = cls(
                id=data["id"],
                owner=str(data["owner"]),
                server=str(data["server"]),
                group=str(data["group"]),
                request=_request(data["request"]),
                state=cast("State", data["state"]),
                times={str(state): float(at) for state, at in data["times"].items()},
                progress=None if data["progress"] is None else float(data["progress"]),
                reason=None if data["reason"] is None else str(data["reason"]),
                notes=tuple(map(str, data["notes"])),
                clocks={str(state): float(at) for state, at in data.get("clocks", {}).items()},
                boot=str(data.get("boot", "")),
            )
            # Surrogates and infinite numbers get as far as here.
            json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False).encode()
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a capture: {error}") from None
        return found


def _request(data: Mapping[str, Any]) -> Request:
    ranks = data.get("ranks")
    if data["tool"] not in get_args(Tool):
        raise ValueError("not a tool of this version")
    return Request(
        tool=cast("Tool", data["tool"]),
        seconds=None if data["seconds"] is None else float(data["seconds"]),
        steps=None if data["steps"] is None else int(data["steps"]),
        when=str(data["when"]),
        wait_seconds=float(data["wait_seconds"]),
        label=str(data["label"]),
        ranks=None if ranks is None else tuple(map(int, ranks)),
        torch_cpu=bool(data.get("torch_cpu", False)),
        torch_stacks=bool(data.get("torch_stacks", False)),
    )
