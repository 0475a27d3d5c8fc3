"""The probe of this process as a whole: switched on by the environment or by `llmprobe.enable`."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from multiprocessing.util import Finalize
from typing import Any

from llmprobe.hooks.naming import GROUP_VARIABLE
from llmprobe.hooks.on_import import forget_all, when_imported
from llmprobe.hooks.probe import Probe
from llmprobe.processors import run_on
from llmprobe.record.asked_capture import AskedCaptures
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings, SettingsError, logger

_POLL_SECONDS = 0.25
_KEEPALIVE_SECONDS = 1.0
_LAST_WRITE_SECONDS = 1.0  # a program that ends waits no longer for a round that is under way

_lock = threading.Lock()
_probe: Probe | None = None
_installed: set[str] = set()
_environ_before: dict[str, str | None] = {}


def current() -> Probe | None:
    """The probe of this process, if any."""
    return _probe


def install_vllm() -> None:
    """Install the vLLM hooks if the environment asks for them; idempotent."""
    probe = _start()
    if probe is not None and "vllm" not in _installed:
        _installed.add("vllm")
        from llmprobe.hooks import vllm

        probe.guard.call("install", vllm.install, probe)


def install_transformers() -> None:
    """Install the transformers hooks if the environment asks for them; idempotent.

    Called right after ``transformers.generation.utils`` was imported.
    """
    probe = _start()
    if probe is not None and "transformers" not in _installed:
        _installed.add("transformers")
        from llmprobe.hooks import transformers

        probe.guard.call("install", transformers.install, probe)


def enable(**settings: str) -> Probe:
    """Switch the probe on in this process, whatever ``LLMPROBE`` says.

    Args:
        settings: further ``LLMPROBE_*`` values by lower-case name, such as ``server="notebook"``.

    Raises:
        SettingsError: a value is not allowed.
    """
    global _probe
    # Exported, so that engine processes started from here follow; `disable` puts back what was there.
    given = {"LLMPROBE": "1", **{f"LLMPROBE_{name.upper()}": str(value) for name, value in settings.items()}}
    wanted = Settings.from_env({**os.environ, **given})
    with _lock:
        for name, value in given.items():
            _environ_before.setdefault(name, os.environ.get(name))
            os.environ[name] = value
        if _probe is None:
            _probe = _make(wanted)
    probe = _probe
    probe.enabled = True
    probe.apply_patches()
    install_vllm()
    when_imported("transformers.generation.utils", lambda module: install_transformers())
    return probe


def disable() -> None:
    """Make every wrapper inert at once, take out those that are outermost, and end the journal."""
    global _probe
    probe = _probe
    if probe is None:
        return
    probe.enabled = False
    probe.remove_patches()
    forget_all()
    probe.disarm()
    _environ_before.setdefault("LLMPROBE", None)
    for name, value in _environ_before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _environ_before.clear()
    if all(not patch.installed for patch in probe.patches):
        # Nothing of ours is left: forget it all. Under another tool's wrapper ours stays, silent.
        for cleanup in probe.cleanups:
            probe.guard.call("disable", cleanup)
        _installed.clear()
        _probe = None


def _start() -> Probe | None:
    global _probe
    with _lock:
        if _probe is None:
            try:
                settings = Settings.from_env()
            except SettingsError as error:
                if "bad settings" not in _installed:
                    _installed.add("bad settings")
                    logger().error("the probe stays off: %s", error)
                return None
            if not settings.enabled:
                return None
            _probe = _make(settings)
        return _probe


def _make(settings: Settings) -> Probe:
    logger(settings)
    probe = Probe(settings)
    if GROUP_VARIABLE not in os.environ:
        _environ_before[GROUP_VARIABLE] = None
        os.environ[GROUP_VARIABLE] = secrets.token_hex(6)
    probe.on_armed.append(lambda recorder: _Housekeeping(probe, recorder).start())
    return probe


class _Housekeeping(threading.Thread):
    """What must happen now and then, away from the step path: the switch, the agent, own errors."""

    def __init__(self, probe: Probe, recorder: Recorder) -> None:
        super().__init__(name="llmprobe-housekeeping", daemon=True)
        self._probe = probe
        self._recorder = recorder
        self._control = probe.settings.directory / "control.json"
        # A switch thrown before this process armed was meant for others.
        self._seen = self._control_state()
        self._published: Any = None
        self._keepalive_at = 0.0
        self._asked: dict[Recorder, AskedCaptures] = {}
        self._watched: Recorder | None = None
        self._writing = threading.Lock()
        self._gave_up = False  # the guard, as of the last time that all was written

    def run(self) -> None:
        # Engines pin workers to processors that their threads then fill. A thread there takes what those
        # need, and an agent that it starts answers no one for minutes.
        run_on(self._probe.processors)
        # Not `atexit`: forked workers of `multiprocessing`, as vLLM's may be, end without it. In a child that
        # this process forks it does not run.
        last = Finalize(None, self._write_last, exitpriority=0)
        while self._probe.recorder is self._recorder:
            self.round()
            self._recorder.own_thread(time.thread_time_ns())
            time.sleep(_POLL_SECONDS)
        last.cancel()
        for asked in self._asked.values():
            asked.close()

    def round(self) -> None:
        """Everything once."""
        guard = self._probe.guard
        guard.call("housekeeping.control", self._follow_switch)
        if not guard.inert and self._probe.settings.agent == "auto":
            guard.call("housekeeping.agent", self._keep_agent)
        guard.call_even_inert("housekeeping.status", self._publish)
        self._write()
        guard.call("housekeeping.captures", self._look_for_asks)
        guard.call("housekeeping.kernels", self._watch_kernels)

    def _write(self, wait: float = -1) -> None:
        if not self._writing.acquire(timeout=wait):
            return
        guard = self._probe.guard
        # What was kept when the guard gave up is written all the same, once: then nothing is added.
        call = guard.call if self._gave_up else guard.call_even_inert
        self._gave_up = guard.inert
        try:
            for write in list(self._probe.writers):  # workers come and go
                call("housekeeping.write", write)
            for recorder in self._probe.recorders():
                call("housekeeping.publish", recorder.publish)
        finally:
            self._writing.release()

    def _write_last(self) -> None:
        """The program ends: its last steps are not left to a round that never comes, or is cut off."""
        self._write(_LAST_WRITE_SECONDS)

    def _control_state(self) -> tuple[int, int] | None:
        try:
            stat = self._control.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _follow_switch(self) -> None:
        state = self._control_state()
        if state is None or state == self._seen:
            return
        self._seen = state
        control = json.loads(self._control.read_text())
        journals = control.get("journals")  # labels may be equal, and a group may have several servers
        if journals is not None and not any(
            recorder.writer.path.name in journals for recorder in self._probe.recorders()
        ):
            return
        armed = bool(control.get("armed", True))
        if armed == self._probe.enabled:
            return
        if armed:
            self._probe.enabled = True
            self._probe.apply_patches()
        else:
            self._probe.enabled = False
            self._probe.remove_patches()
        logger().info("switched %s", "on" if armed else "off")

    def _look_for_asks(self) -> None:
        """An agent may ask any process that records steps for a capture."""
        probe = self._probe
        for recorder in probe.recorders():
            if recorder not in self._asked:
                if recorder.facts.get("role") == "frontend":
                    continue
                self._asked[recorder] = AskedCaptures(
                    recorder, profiler=probe.running_profiler, failed=probe.guard.failed
                )
            self._asked[recorder].look()

    def _watch_kernels(self) -> None:
        """Open kernel windows in a process that drives a CUDA device, if the settings ask for them.

        One thread for the process: the recorder that drives the device may come after the first one, where a
        front end and its worker share a process.
        """
        plan = self._probe.settings.kernel_windows
        if plan is None or self._watched is not None:
            return
        for recorder in self._probe.recorders():
            if recorder.facts.get("clock") == "cuda":
                from llmprobe.record.kernels import KernelWindowThread

                self._watched = recorder
                active, failed = (lambda: self._probe.active), self._probe.guard.failed
                KernelWindowThread(recorder, plan, active=active, failed=failed).start()
                return

    def _keep_agent(self) -> None:
        now = time.monotonic()
        if now < self._keepalive_at:
            return
        self._keepalive_at = now + _KEEPALIVE_SECONDS
        from llmprobe.record.agent_launch import ensure_agent

        ensure_agent(self._probe.settings)

    def _publish(self) -> None:
        """Tell the reader whether this process is armed, and which errors it swallowed."""
        probe = self._probe
        state = (probe.enabled, probe.guard.inert, sum(probe.guard.errors.values()), len(probe.recorders()))
        if state == self._published:
            return
        self._published = state
        for recorder in probe.recorders():
            probe.guard.call_even_inert("housekeeping.status", self._publish_to, recorder)

    def _publish_to(self, recorder: Recorder) -> None:
        probe = self._probe
        recorder.status(armed=probe.enabled, inert=probe.guard.inert)
        if probe.guard.errors and recorder is self._recorder:
            recorder.update_facts(errors=dict(probe.guard.errors))
