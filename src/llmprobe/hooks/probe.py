"""The probe of one process: its settings, guard, patches and, once armed, its recorder."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from llmprobe.hooks.guard import Guard
from llmprobe.hooks.naming import GROUP_VARIABLE
from llmprobe.hooks.patch import Patch
from llmprobe.processors import allowed
from llmprobe.record.journal import JournalError
from llmprobe.record.layout import DEFAULT_SIZE
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings, logger

#: How long a step that is open gets until it is given up by its next hook, and how often that is looked at.
_RANGES_SECONDS = 1.0
_LOOK_SECONDS = 0.005

_probes: weakref.WeakSet[Probe] = weakref.WeakSet()


def _forked() -> None:
    for probe in list(_probes):
        probe.forked()


os.register_at_fork(after_in_child=_forked)


class Probe:
    """State of llmprobe in one process. Made once by `llmprobe.hooks.session`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.guard = Guard()
        self.patches: list[Patch] = []
        #: False after ``llmprobe off`` or `disable`: wrappers then only call the original.
        self.enabled = True
        #: Whether this process has a journal: as ``recorder is not None``, for what is asked at each step.
        self.armed = False
        #: How often the wrappers were switched on again; state that followed requests is stale then.
        self.generation = 0
        #: Called with the first recorder when this process arms.
        self.on_armed: list[Callable[[Recorder], None]] = []
        #: Called a few times a second by the housekeeping thread: they write the steps that hooks have kept.
        self.writers: list[Callable[[], None]] = []
        #: Called when the wrappers are about to be switched off, maybe in the middle of a step.
        self.on_paused: list[Callable[[], None]] = []
        #: Called when the wrappers are switched on again, before they are.
        self.on_resumed: list[Callable[[], None]] = []
        #: Each says whether a thread has an NVTX range open, which only its next hook can close.
        self.open_ranges: list[Callable[[], bool]] = []
        #: Undo what is not a patch; called once by `llmprobe.disable`.
        self.cleanups: list[Callable[[], None]] = []
        #: Each says which profiler of the engine runs, or is about to; None if none does.
        self.profilers: list[Callable[[], str | None]] = []
        self._recorders: dict[str, Recorder] = {}
        self._adopted: list[Recorder] = []
        self._arming = threading.Lock()
        #: Where this process might run when it was made, before its engine pinned any thread.
        self.processors = allowed(started_by_engine=GROUP_VARIABLE in os.environ)
        self._refused_pid = 0
        self.guard.observers.append(self._count_error)
        _probes.add(self)

    @property
    def recorder(self) -> Recorder | None:
        """This process's first recorder; None before `arm`, in a forked child, or without a journal."""
        for recorder in self._recorders.values():
            return recorder if recorder.pid == os.getpid() else None
        return None

    def recorders(self) -> list[Recorder]:
        """Every recorder of this process: one a role, and a front end's further engines."""
        pid = os.getpid()
        return [found for found in (*self._recorders.values(), *self._adopted) if found.pid == pid]

    def adopt(self, recorder: Recorder) -> None:
        """Look after a recorder that was opened beside that of its role."""
        self._adopted.append(recorder)

    @property
    def refused(self) -> bool:
        """Whether this process has tried to make a journal in vain; it is not tried again."""
        return self._refused_pid == os.getpid()

    @property
    def active(self) -> bool:
        """Whether wrappers should do anything."""
        return self.enabled and not self.guard.inert

    def arm(
        self, role: str, facts: Callable[[], dict[str, Any]], size: int = DEFAULT_SIZE
    ) -> Recorder | None:
        """Make this process's journal for a role if it has none. Not for the step path.

        Args:
            role: ``worker``, ``frontend`` or ``program``.
            facts: builds the facts of this process; called once.
            size: bytes of the journal.

        Returns:
            The recorder, or None if no journal can be made; that is said in one line, once.
        """
        with self._arming:
            known = self._recorders.get(role)
            if known is not None and known.pid == os.getpid():
                return known
            if known is not None:  # a parent's, from before a fork
                self._recorders.clear()
                self._adopted.clear()
            if self.refused:
                return None
            try:
                recorder = Recorder.open(self.settings.directory, role, facts(), size)
            except JournalError as error:
                self._refused_pid = os.getpid()
                logger().error("the probe stays off: %s", error)
                return None
            first = self.recorder is None
            self._recorders[role] = recorder
            self.armed = True
        if not first:
            return recorder
        for called in self.on_armed:
            self.guard.call("on_armed", called, recorder)
        return recorder

    def running_profiler(self) -> str | None:
        """The profiler of the engine that runs, or is about to."""
        return next((said for ask in list(self.profilers) if (said := ask()) is not None), None)

    def disarm(self) -> None:
        """Close this process's journals and remove them."""
        recorders = self.recorders()
        self._recorders, self._adopted, self.armed = {}, [], False
        for recorder in recorders:
            recorder.close(remove=True)

    def forked(self) -> None:
        """This is a child: the journals are its parent's, and it has none until it arms for itself."""
        for recorder in (*self._recorders.values(), *self._adopted):
            recorder.closed = True  # hooks that know it may be called here too
        self._recorders, self._adopted, self.armed = {}, [], False
        self._arming = threading.Lock()  # another thread of the parent may have had it

    def patch(self, owner: Any, name: str, make: Callable[..., Callable[..., Any]]) -> Patch:
        """Wrap ``owner.name`` (once) and remember it for `remove_patches`."""
        for known in self.patches:
            if known.owner is owner and known.name == name:
                known.apply()
                return known
        patch = Patch(owner, name, make)
        patch.apply()
        self.patches.append(patch)
        return patch

    def remove_patches(self) -> None:
        """Silence every wrapper and take out those that are outermost; the latest goes first.

        Where a profiler listens, the engine's thread has its NVTX range to close before: it gets a second.
        """
        for paused in list(self.on_paused):
            self.guard.call_even_inert("pause", paused)  # whatever fails there, the wrappers go
        end = time.monotonic() + _RANGES_SECONDS
        while any(is_open() for is_open in list(self.open_ranges)) and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
        for patch in reversed(self.patches):
            patch.remove()

    def apply_patches(self) -> None:
        """Undo `remove_patches`."""
        self.generation += 1
        for resumed in list(self.on_resumed):
            resumed()
        for patch in self.patches:
            patch.apply()

    def _count_error(self, where: str, error: Exception) -> None:
        recorder = self.recorder
        if recorder is not None:
            recorder.error()
