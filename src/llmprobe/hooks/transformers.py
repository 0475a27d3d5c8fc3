"""Wrappers around the methods that every decoding loop of transformers calls from eager Python.

``forward``, ``__call__`` and module hooks stay alone: wrapping them breaks ``torch.compile``. Four methods
tell all: ``generate`` begins and ends a request, ``prepare_inputs_for_generation`` returns when a forward is
about to run, ``_update_model_kwargs_for_generation`` is entered when it is over, and
``_has_unfinished_sequences`` stands between two tokens: it has just read the stop flag from the device, so
stamping tokens at its return adds no synchronisation. The decoding loops are wrapped as a second entry,
because some models (MusicGen, Dia) call them directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.transformers_tracker import Tracker

_Make = Callable[[Callable[..., Any], Patch], Callable[..., Any]]

# Those of all supported versions; a version has some of them.
LOOPS = (
    "_sample",
    "_beam_search",
    "_assisted_decoding",
    "_contrastive_search",
    "_constrained_beam_search",
    "_dola_decoding",
    "_group_beam_search",
)


def install(probe: Probe) -> None:
    """Wrap ``GenerationMixin``. The classes of a model that override a method follow at its first call.

    Raises:
        ImportError: transformers is not installed.
        AttributeError: this version of transformers lacks one of the methods.
    """
    from transformers.generation.utils import GenerationMixin

    tracker = Tracker(probe)
    makers = _makers(probe, tracker)
    for name, make in makers.items():
        if name in vars(GenerationMixin) or name not in LOOPS:
            probe.patch(GenerationMixin, name, make)


def _makers(probe: Probe, tracker: Tracker) -> dict[str, _Make]:
    makers: dict[str, _Make] = {
        "prepare_inputs_for_generation": _wrap_prepare(probe, tracker),
        "_update_model_kwargs_for_generation": _wrap_update(probe, tracker),
        "_has_unfinished_sequences": _wrap_boundary(probe, tracker),
    }
    overridable = dict(makers)
    known: set[type] = set()

    def follow(model: Any) -> None:
        """Wrap what the classes of ``model`` override; each class once."""
        for cls in type(model).__mro__:
            if cls not in known:
                known.add(cls)
                for name, make in overridable.items():
                    if name in vars(cls):
                        probe.patch(cls, name, make)

    for name in LOOPS:
        makers[name] = overridable[name] = _wrap_loop(probe, tracker, follow, name)
    makers["generate"] = _wrap_generate(probe, tracker, follow)
    return makers


def _wrap_generate(probe: Probe, tracker: Tracker, follow: Callable[[Any], None]) -> _Make:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not patch.active or not probe.active:
                return original(self, *args, **kwargs)
            probe.guard.call("transformers.follow", follow, self)
            call = probe.guard.call("transformers.generate", tracker.enter, self, args, kwargs)
            if call is None:
                return original(self, *args, **kwargs)
            return _run(probe, tracker, call, original, self, args, kwargs)

        return generate

    return make


def _wrap_loop(probe: Probe, tracker: Tracker, follow: Callable[[Any], None], name: str) -> _Make:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not patch.active or not probe.active:
                return original(self, *args, **kwargs)
            guard = probe.guard
            call = tracker.current.top
            if call is not None and call.model is self:
                if not call.looping:
                    guard.call("transformers.loop", tracker.enter_loop, call, name, args, kwargs)
                return original(self, *args, **kwargs)
            guard.call("transformers.follow", follow, self)
            call = guard.call("transformers.generate", tracker.enter, self, args, kwargs)
            if call is None:
                return original(self, *args, **kwargs)
            guard.call("transformers.loop", tracker.enter_loop, call, name, args, kwargs)
            return _run(probe, tracker, call, original, self, args, kwargs)

        return loop

    return make


def _run(
    probe: Probe,
    tracker: Tracker,
    call: Any,
    original: Callable[..., Any],
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    result = None
    failed = True
    try:
        result = original(model, *args, **kwargs)
        failed = False
    finally:  # whatever ends the call: a BaseException too
        tracker.pop(call)
        # Even if the guard has given up since: what is open is closed.
        probe.guard.call_even_inert("transformers.leave", tracker.leave, call, result, failed)
    return result


def _wrap_prepare(probe: Probe, tracker: Tracker) -> _Make:
    guard, current = probe.guard, tracker.current

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = current.top if patch.active and probe.active else None
            if call is None or call.busy or call.model is not self:
                return original(self, *args, **kwargs)
            call.busy = True
            try:
                if call.stamps is not None:
                    guard.call("transformers.prepare", tracker.before_prepare, call)
                inputs = original(self, *args, **kwargs)
            finally:
                call.busy = False
            guard.call("transformers.step", tracker.begin_step, call, inputs, args, kwargs)
            return inputs

        return prepare_inputs_for_generation

    return make


def _wrap_update(probe: Probe, tracker: Tracker) -> _Make:
    guard, current = probe.guard, tracker.current

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def _update_model_kwargs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = current.top if patch.active and probe.active else None
            if call is not None and call.model is self:
                # (outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1)
                outputs = args[0] if args else kwargs.get("outputs")
                new_tokens = args[3] if len(args) > 3 else kwargs.get("num_new_tokens", 1)
                guard.call("transformers.forward", tracker.forward_end, call, outputs, new_tokens)
            return original(self, *args, **kwargs)

        return _update_model_kwargs_for_generation

    return make


def _wrap_boundary(probe: Probe, tracker: Tracker) -> _Make:
    guard, current = probe.guard, tracker.current

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def _has_unfinished_sequences(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = current.top if patch.active and probe.active else None
            if call is None or call.model is not self:
                return original(self, *args, **kwargs)
            guard.call("transformers.step_end", tracker.end_step, call)
            going_on = original(self, *args, **kwargs)
            guard.call("transformers.boundary", tracker.boundary, call, going_on)
            return going_on

        return _has_unfinished_sequences

    return make
