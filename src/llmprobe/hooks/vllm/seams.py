"""Where a step's forward begins, and where an encoder runs before it, version by version.

The worker's ``execute_model`` prepares inputs first; stamping its entry would let an idle device look
busy. The seam of the forward is a method that vLLM calls once a step right before the model runs; that of the
encoder of a multimodal model is the method that runs it, on the way there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from llmprobe.hooks.patch import Patch


class Seam(NamedTuple):
    """A method of vLLM's that all workers of a process share."""

    owner: Any
    name: str
    runner: str  # "v1" or "v2"


class Steps(Protocol):
    """What a seam tells of its being called."""

    def forward_start(self) -> None:
        """The model is about to run. Guards itself: it is called on vLLM's own call path."""

    def encode_start(self) -> None:
        """The encoder is about to run. Guards itself."""

    def encode_end(self) -> None:
        """The encoder has run, on the host. Guards itself."""


class Running:
    """Whose step began last in this process: the seam is a method that all workers share."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps: Steps | None = None


#: Releases whose seams were read, and run where docs/compatibility.md says so.
TRIED = ("0.11", "0.16", "0.20", "0.24", "0.32", "0.33")


def forward_start(runner: Any) -> Seam | None:
    """The seam of a model runner, or None if it has none we know."""
    timing = getattr(runner, "step_timing", None)  # V2 from 0.32
    if timing is not None and "forward_start" in vars(type(timing)):
        return Seam(type(timing), "forward_start", "v2")
    owner = _defining_class(type(runner), "_model_forward")  # V1
    if owner is not None:
        return Seam(owner, "_model_forward", "v1")
    connector = getattr(runner, "kv_connector", None)  # V2 before 0.32
    owner = _defining_class(type(connector), "pre_forward") if connector is not None else None
    if owner is not None:
        return Seam(owner, "pre_forward", "v2")
    module = _module_of(runner)
    if module is not None and callable(getattr(module, "set_forward_context", None)):  # 0.11
        return Seam(module, "set_forward_context", "v1")
    return None


def encoder(runner: Any) -> Seam | None:
    """The seam of the encoder, or None: the model has none, or not one we know."""
    if not getattr(runner, "supports_mm_inputs", False):
        return None
    owner = _defining_class(type(runner), "_execute_mm_encoder")
    if owner is not None:
        return Seam(owner, "_execute_mm_encoder", "v1")
    encodes = getattr(getattr(runner, "model_state", None), "encoder_runner", None)
    owner = _defining_class(type(encodes), "execute_mm_encoder") if encodes is not None else None
    return Seam(owner, "execute_mm_encoder", "v2") if owner is not None else None


def runner_kind(runner: Any) -> str:
    """``v1`` or ``v2``, by the module that the runner's base class lives in."""
    modules = [cls.__module__ for cls in type(runner).__mro__]
    return "v2" if any(".worker.gpu." in name for name in modules) else "v1"


def tried(version: str) -> bool:
    """Whether this vLLM release is one the seams were read in."""
    return ".".join(version.split(".")[:2]) in TRIED


def methods(cls: type, names: tuple[str, ...]) -> list[tuple[type, str]]:
    """Every (class, name) in the MRO that defines one of ``names`` itself."""
    return [(owner, name) for owner in cls.__mro__ for name in names if callable(vars(owner).get(name))]


def entering(running: Running, original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
    """A wrapper of the seam that tells the worker whose step is open."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        steps = running.steps
        if steps is not None and patch.active:
            steps.forward_start()
        return original(*args, **kwargs)

    return wrapper


def encoding(running: Running, original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
    """A wrapper of the encoder's seam that tells the worker whose step is open when it begins and ends."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps = running.steps
        # V1 comes by at every step, with all of the scheduler's output; V2 only with something to encode.
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        if steps is None or not patch.active or not getattr(inputs, "scheduled_encoder_inputs", inputs):
            return original(self, *args, **kwargs)
        steps.encode_start()
        try:
            return original(self, *args, **kwargs)
        finally:
            steps.encode_end()

    return wrapper


def _defining_class(cls: type, name: str) -> type | None:
    return next((owner for owner in cls.__mro__ if name in vars(owner)), None)


def _module_of(runner: Any) -> Any:
    import sys

    return sys.modules.get(type(runner).__module__)
