"""What a recorder tells of the running step, whichever threads tell it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprobe.record.journal_reader import JournalReader, Progress
from llmprobe.record.layout import Phase
from llmprobe.record.recorder import Recorder


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    opened = Recorder.open(tmp_path, "worker", {"role": "worker"})
    yield opened
    opened.close(remove=True)


def published(recorder: Recorder) -> Progress:
    recorder.publish()
    reader = JournalReader(recorder.writer.path, recorder.writer)
    try:
        progress = reader.progress()
    finally:
        reader.close()
    assert progress is not None
    return progress


def step(recorder: Recorder, number: int) -> None:
    recorder.step(
        number,
        number,
        Phase.DECODE,
        0,
        0,
        (1, 2, 3, 4),
        requests=1,
        prefill_requests=0,
        prompt_tokens=0,
        decode_tokens=1,
    )


def test_a_step_given_up_while_another_thread_writes_a_later_one_takes_nothing_back(
    recorder: Recorder,
) -> None:
    class Late(int):
        """A step's number; when it is compared, the other thread has its turn."""

        def __gt__(self, other: int) -> bool:
            step(recorder, 2)
            return int(self) > other

    numbers = [recorder.begin(Phase.DECODE, 1, 1) for _ in range(2)]
    recorder.abandon(Late(numbers[0]))
    assert published(recorder).ended == 2


def test_switched_off_no_step_runs_and_switched_on_the_next_one_does(recorder: Recorder) -> None:
    recorder.begin(Phase.DECODE, 1, 1)
    assert (published(recorder).begun, published(recorder).ended) == (1, 0)
    recorder.status(armed=False, inert=False)
    assert published(recorder).ended == 1
    recorder.begin(Phase.DECODE, 1, 2)  # whoever had looked just before
    assert published(recorder).ended == 2
    recorder.status(armed=True, inert=False)
    recorder.begin(Phase.DECODE, 1, 3)
    assert (published(recorder).begun, published(recorder).ended) == (3, 2)
