"""What must not break: exceptions, threads, other tools' wrappers, compilation, our own errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmprobe.hooks import transformers as hooks
from llmprobe.record.layout import Flag

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    SIZES,
    Recording,
    column,
    endless,
    llama,
    phases,
    prompt,
)
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.utils import GenerationMixin  # noqa: E402

pytestmark = pytest.mark.integration


def test_an_exception_ends_the_request_as_aborted_and_is_not_swallowed(recording: Recording) -> None:
    class Fails(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return scores

    model = llama()
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt(), logits_processor=LogitsProcessorList([Fails()]), **endless())
    records = recording.records()
    assert phases(records) == ["prefill", "decode", "decode"]
    assert column(records, "new_tokens") == [1, 1, 0]
    assert recording.counters()["requests_aborted"] == 1
    assert recording.counters()["generated_tokens"] == 2
    assert records.pending["unfinished"].tolist() == [1, 0]
    model.generate(prompt(), **endless())
    assert phases(recording.records()) == ["prefill"] + ["decode"] * 4


def test_a_forward_that_fails_leaves_no_step_and_does_not_look_stalled(recording: Recording) -> None:
    model = llama()
    broken = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(prompt(), **endless())
    broken.remove()
    assert len(recording.records().steps) == 0
    recorder = recording.probe.recorder
    assert recorder is not None
    recorder.publish()
    progress = recording.reader.progress()
    assert progress is not None
    assert (progress.begun, progress.ended) == (1, 1)
    model.generate(prompt(), **endless())
    assert recording.records().steps["step"].tolist() == [2, 3, 4, 5, 6]


def test_four_threads_keep_their_requests_apart(recording: Recording) -> None:
    model = llama()
    errors: list[BaseException] = []

    def work(tokens: int) -> None:
        try:
            for _ in range(3):
                model.generate(prompt(2, 4), **endless(max_new_tokens=tokens))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(3 + index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    records = recording.records()
    counters = recording.counters()
    steps = 3 * (3 + 4 + 5 + 6)
    assert len(records.steps) == steps and phases(records).count("prefill") == 12
    assert sorted(column(records, "step")) == list(range(1, steps + 1))
    assert sorted(records.requests["generated_tokens"].tolist()) == sorted([3, 4, 5, 6] * 6)
    assert (counters["requests"], counters["prompt_tokens"]) == (24, 96)
    assert counters["generated_tokens"] == 2 * steps
    assert (records.pending["unfinished"][0] > 0) and records.pending["unfinished"][-1] == 0
    assert recording.load().running == 0


def test_custom_generate_is_followed_by_its_methods(recording: Recording) -> None:
    def custom(model: Any, input_ids: Any, **kwargs: Any) -> Any:
        return model._sample(input_ids, **{k: v for k, v in kwargs.items() if k != "tokenizer"})

    llama().generate(prompt(), custom_generate=custom, **endless())
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert recording.counters()["generated_tokens"] == 5


def test_a_decoding_loop_called_without_generate_is_a_request(recording: Recording) -> None:
    original: dict[str, Any] = {}

    def capture(model: Any, input_ids: Any, **kwargs: Any) -> Any:
        original.update(kwargs, input_ids=input_ids)
        return input_ids

    model = llama()
    model.generate(prompt(1, 6), custom_generate=capture, **endless())
    recording.records()
    model._sample(original.pop("input_ids"), **original)
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    (request,) = records.requests
    assert (request["prompt_tokens"], request["generated_tokens"]) == (6, 5)


def test_prepare_may_be_bypassed_by_a_method_on_the_instance(recording: Recording) -> None:
    model = llama()
    bound = GenerationMixin.prepare_inputs_for_generation.__wrapped__.__get__(model)  # type: ignore[attr-defined]
    model.prepare_inputs_for_generation = lambda *args, **kwargs: bound(*args, **kwargs)  # as PEFT does
    model.generate(prompt(1, 6), **endless())
    records = recording.records()
    assert phases(records) == ["prefill"] + ["decode"] * 4
    assert column(records, "prompt_tokens")[0] == 6
    assert recording.counters()["generated_tokens"] == 5


def test_a_class_that_overrides_prepare_is_followed_once(recording: Recording) -> None:
    class Overriding(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    torch.manual_seed(7)
    own = vars(Overriding)["prepare_inputs_for_generation"]
    model = Overriding(LlamaConfig(**SIZES)).eval()
    model.generate(prompt(), **endless())
    assert phases(recording.records()) == ["prefill"] + ["decode"] * 4
    assert vars(Overriding)["prepare_inputs_for_generation"] is not own
    recording.probe.remove_patches()
    assert vars(Overriding)["prepare_inputs_for_generation"] is own


def test_hooks_removed_and_applied_again_record_again(recording: Recording) -> None:
    model = llama()
    model.generate(prompt(), **endless())
    recording.records()
    recording.probe.enabled = False
    recording.probe.remove_patches()
    model.generate(prompt(), **endless())
    assert len(recording.records().steps) == 0
    recording.probe.enabled = True
    recording.probe.apply_patches()
    model.generate(prompt(), **endless())
    steps = recording.records().steps
    assert len(steps) == 5
    assert steps["flags"][0] & int(Flag.RESTARTED)


def test_switching_off_in_the_middle_of_a_call_stops_the_records_and_ends_the_load(
    recording: Recording,
) -> None:
    class Switch(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                recording.probe.enabled = False
                recording.probe.remove_patches()
            return scores

    model = llama()
    model.generate(prompt(), logits_processor=LogitsProcessorList([Switch()]), **endless())
    records = recording.records()
    assert phases(records) == ["prefill", "decode"]
    assert len(records.requests) == 0
    assert records.pending["unfinished"].tolist() == [1, 0]
    assert recording.load().running == 0
    recording.probe.enabled = True
    recording.probe.apply_patches()
    model.generate(prompt(), **endless())
    assert phases(recording.records()) == ["prefill"] + ["decode"] * 4


@pytest.mark.parametrize("name", ["generate", "_has_unfinished_sequences"])
def test_another_tools_wrapper_on_top_stays_and_ours_goes_silent(recording: Recording, name: str) -> None:
    calls: list[str] = []
    ours = vars(GenerationMixin)[name]

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return ours(self, *args, **kwargs)

    setattr(GenerationMixin, name, theirs)
    model = llama()
    try:
        model.generate(prompt(), **endless())
        assert len(recording.records().steps) == 5 and calls
        recording.probe.enabled = False
        recording.probe.remove_patches()
        assert vars(GenerationMixin)[name] is theirs
        calls.clear()
        model.generate(prompt(), **endless())
        assert calls and len(recording.records().steps) == 0
    finally:
        setattr(GenerationMixin, name, ours)


@pytest.mark.swallows
def test_ten_internal_errors_make_the_probe_inert_and_generate_goes_on(tmp_path: Path) -> None:
    found = Recording(tmp_path / "probe")
    hooks.install(found.probe)
    model = llama()
    try:
        model.generate(prompt(), **endless())
        recorder = found.probe.recorder
        assert recorder is not None

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("on purpose")

        recorder.begin = broken  # type: ignore[method-assign]
        expected = model.generate(prompt(), **endless(max_new_tokens=20))
        assert found.probe.guard.inert
        assert sum(found.probe.guard.errors.values()) == 10
        assert found.counters()["errors"] == 10
        assert torch.equal(expected, model.generate(prompt(), **endless(max_new_tokens=20)))
    finally:
        found.probe.remove_patches()
        found.probe.disarm()


def test_no_journal_means_no_hooks_and_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = Recording(tmp_path / "file" / "below")
    hooks.install(found.probe)
    try:
        llama().generate(prompt(), **endless())
        assert found.probe.recorder is None
    finally:
        found.probe.remove_patches()


def test_a_compiled_forward_has_the_graphs_it_has_without_hooks(recording: Recording) -> None:
    graphs = 0

    def backend(module: Any, inputs: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward  # type: ignore[no-any-return]

    def count() -> int:
        nonlocal graphs
        graphs = 0
        torch._dynamo.reset()
        model = llama(num_hidden_layers=1)
        model.forward = torch.compile(model.forward, backend=backend, dynamic=True, fullgraph=True)
        model.generate(prompt(), **endless())
        return graphs

    with_hooks = count()
    assert len(recording.records().steps) == 5
    recording.probe.remove_patches()
    assert with_hooks == count()
