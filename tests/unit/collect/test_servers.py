"""Which processes make a server, what it is called, and what stays of those that died."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmprobe.collect.collector import Collector
from llmprobe.collect.views import ServerView
from llmprobe.record.recorder import Recorder

from .pretended import (
    SECOND,
    Clock,
    Server,
    busy_second,
    collector,
    one_step,
    only,
    program,
    series,
)


def test_work_is_pending_while_any_front_end_has_some(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, fronts=2)
    start = clock.now
    found = collector(tmp_path, clock, server)
    one, two = server.fronts
    one.pending(start, 1)
    server.step(start, start + SECOND)
    two.pending(start + SECOND // 2, 1)
    one.pending(start + SECOND, 0)
    server.step(start + 2 * SECOND, start + 3 * SECOND)
    two.pending(start + 3 * SECOND, 0)
    clock.now = start + 4 * SECOND
    parts = only(found).ranks[0].device_time
    assert parts["decode"]["host_gap"] == pytest.approx(1)
    assert parts["none"]["no_work"] == pytest.approx(0.5)
    server.close()


def test_a_dead_worker_leaves_the_views_and_its_journal_is_removed_later(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    found = Collector(tmp_path, clock=clock, own_writers=dict, remove_dead=True)
    other = Server(tmp_path, group="h", server="vllm-2")
    path = other.worker.writer.path
    other.close()  # its lock is gone, as after a kill
    clock.now += SECOND
    found.tick()
    clock.now += 2 * SECOND
    found.tick()
    assert "vllm-2" not in {view.server for view in found.views()}
    assert path.exists()
    clock.now += 40 * SECOND
    found.tick()
    clock.now += 2 * SECOND
    found.tick()
    assert not path.exists()


def test_two_servers_of_one_name_get_numbers(tmp_path: Path, clock: Clock) -> None:
    servers = [Server(tmp_path, group=group, server="generate") for group in ("g", "h")]
    writers = {r.writer.path: r.writer for s in servers for r in (s.worker, *s.fronts)}
    found = Collector(tmp_path, clock=clock, own_writers=lambda: writers)
    found.tick(final=True)
    assert [view.server for view in found.views()] == ["generate", "generate-2"]
    for made in servers:
        made.close()


def test_what_a_dead_front_end_left_pending_ends_with_it(
    tmp_path: Path, clock: Clock, dead: set[Path]
) -> None:
    made = Server(tmp_path, fronts=2)
    found = collector(tmp_path, clock, made)
    start = clock.now
    made.fronts[0].pending(start, 1)
    made.step(start, start + SECOND)
    clock.now = start + SECOND
    found.tick()
    dead.add(made.fronts[0].writer.path)
    found.tick()
    clock.now = start + 5 * SECOND
    assert only(found).ranks[0].device_time["none"]["no_work"] == pytest.approx(3.5)
    made.close()


def test_dead_processes_stay_for_a_report_if_asked(tmp_path: Path, clock: Clock) -> None:
    made = Server(tmp_path)
    keeping = Collector(tmp_path, clock=clock, keep_dead=True)
    made.close()
    for _ in range(3):
        keeping.tick(final=True)
        clock.now += 60 * SECOND
    keeping.tick()
    assert len(keeping.views()[0].ranks) == 1


def test_a_program_started_once_more_has_the_label_it_had(
    tmp_path: Path, clock: Clock, dead: set[Path]
) -> None:
    first = program(tmp_path, group="a")
    writers = {first.writer.path: first.writer}
    found = Collector(tmp_path, clock=clock, own_writers=lambda: writers)
    found.tick()
    assert [view.server for view in found.views()] == ["generate"]
    dead.add(first.writer.path)  # its journal is kept for half a minute
    again = program(tmp_path, group="b")
    writers[again.writer.path] = again.writer
    for _ in range(2):
        clock.now += 2 * SECOND
        found.tick()
    assert [(view.group, view.server) for view in found.views()] == [("b", "generate")]
    assert first.writer.path.exists()
    for made in (first, again):
        made.close()


def test_a_server_whose_workers_are_not_recorded_is_not_called_idle(tmp_path: Path, clock: Clock) -> None:
    """No room for a worker's journal, or workers on another node."""
    facts = {"group": "g", "server": "vllm-1", "framework": "vllm", "engine": 0, "role": "frontend"}
    front = Recorder.open(tmp_path, "frontend", facts)
    found = Collector(tmp_path, clock=clock, own_writers=lambda: {front.writer.path: front.writer})
    front.pending(clock.now, 20)
    front.load(20, 3, 0.4, 23)
    (headline,) = (view.headline for view in seen(found))
    assert headline == "CAN'T TELL: no worker of this server is recorded; requests: 20 running, 3 waiting."
    front.load(0, 0, 0.0, 0)
    (headline,) = (view.headline for view in seen(found))
    assert headline == "CAN'T TELL: no worker of this server is recorded."
    front.close()


def seen(found: Collector) -> list[ServerView]:
    found.tick(final=True)
    return found.views()


def test_settings_do_not_depend_on_which_journal_was_found_first(
    tmp_path: Path, clock: Clock, server: Server
) -> None:
    """And the graphs are those that the worker's attention backend can do."""
    server.fronts[0].update_facts(
        flags={
            "cudagraph_mode": "FULL",
            "max_cudagraph_capture_size": 512,
            "api_server_count": 4,
            "dtype": "a",
        }
    )
    server.worker.update_facts(flags={"cudagraph_mode": "NONE", "dtype": "b"})
    names = [recorder.writer.path for recorder in (server.worker, *server.fronts)]
    for order in (names, names[::-1]):
        found = collector(tmp_path, clock, server)
        for path in order:  # as a folder may list them
            hidden = [other.rename(other.with_suffix(".hidden")) for other in names if other != path]
            found.tick(final=True)
            for other in hidden:
                other.rename(other.with_suffix(".journal"))
        assert only(found).flags == {"cudagraph_mode": "NONE", "api_server_count": 4, "dtype": "a"}
        found.close()


@pytest.mark.parametrize("group_of_both", [None, "shared"])
def test_a_label_stays_when_the_agent_starts_anew(
    tmp_path: Path, clock: Clock, dead: set[Path], group_of_both: str | None
) -> None:
    """Counters go on under it: the second of two is not to be taken for the first, once that has ended."""
    recorders = [program(tmp_path, group=group_of_both or str(number)) for number in range(2)]
    if group_of_both:
        for recorder in recorders:
            recorder.close(remove=True)
        recorders = [
            Server(tmp_path, group=group_of_both, server="generate", fronts=0).worker for _ in range(2)
        ]
    writers = {recorder.writer.path: recorder.writer for recorder in recorders}

    def collect() -> Collector:
        return Collector(
            tmp_path,
            clock=clock,
            own_writers=lambda: writers,
            checkpoint=tmp_path / "state",
            remove_dead=True,
        )

    found = collect()
    seen(found)
    labels = {view.journals[0]: view.server for view in seen(found)}
    assert sorted(labels.values()) == ["generate", "generate-2"]
    first, second = sorted(labels, key=labels.__getitem__)
    dead.add(first)
    for _ in range(3):  # past the time at which a dead process is forgotten
        clock.now += 40 * SECOND
        found.tick()
    assert not first.exists()
    found.save()
    found.close()
    again = collect()
    assert [(view.server, view.journals) for view in seen(again)] == [("generate-2", (second,))]
    again.close()
    for recorder in recorders:
        recorder.close()


def test_a_label_stays_with_its_server_and_is_never_taken_twice(
    tmp_path: Path, clock: Clock, dead: set[Path]
) -> None:
    names = {"a": "x", "b": "x", "c": "x-2"}
    servers = {group: Server(tmp_path, group=group, server=name) for group, name in names.items()}
    writers = {r.writer.path: r.writer for s in servers.values() for r in (s.worker, *s.fronts)}
    found = Collector(tmp_path, clock=clock, own_writers=lambda: writers)
    found.tick(final=True)
    before = {view.group: view.server for view in found.views()}
    assert len(set(before.values())) == 3
    (plain,) = (group for group, label in before.items() if label == "x")
    dead |= {r.writer.path for r in (servers[plain].worker, *servers[plain].fronts)}
    clock.now += 2 * SECOND
    found.tick()
    assert {view.group: view.server for view in found.views()} == {
        group: label for group, label in before.items() if group != plain
    }
    for made in servers.values():
        made.close()


def test_totals_keep_what_a_dead_front_end_counted_while_the_server_lives(
    tmp_path: Path, clock: Clock, dead: set[Path]
) -> None:
    made = Server(tmp_path, fronts=2)
    found = collector(tmp_path, clock, made, checkpoint=tmp_path / "state", remove_dead=True)
    for front in made.fronts:
        front.tokens(10, 4, first_token_ns=(2_000_000,))
    found.tick(final=True)
    dead.add(made.fronts[0].writer.path)
    for _ in range(4):  # past the time at which a dead process is forgotten
        clock.now += 20 * SECOND
        found.tick()
        (engine,) = found.views()[0].engines
        assert engine.prompt_tokens == 20
        assert engine.latency["time_to_first_token"].count == 2
    assert found.alive() == 2
    found.save()
    dead_path = made.fronts[0].writer.path
    assert not dead_path.exists()
    (engine,) = only(collector(tmp_path, clock, made, checkpoint=tmp_path / "state")).engines
    assert engine.prompt_tokens == 20
    assert engine.latency["time_to_first_token"].count == 2
    made.close()


def test_programs_that_inherit_a_group_are_told_apart(tmp_path: Path, clock: Clock) -> None:
    programs = [program(tmp_path, rank=0), program(tmp_path, rank=0)]
    writers = {made.writer.path: made.writer for made in programs}
    found = Collector(tmp_path, clock=clock, own_writers=lambda: writers, only_group="g")
    for number, made in enumerate(programs):
        made.pending(clock.now, 1)
        one_step(made, clock.now, clock.now + (number + 1) * SECOND)
        made.pending(clock.now + (number + 1) * SECOND, 0)
    clock.now += 5 * SECOND
    found.tick(final=True)
    assert sorted(view.server for view in found.views()) == ["generate", "generate-2"]
    assert sorted(round(view.ranks[0].device_time["none"]["no_work"], 6) for view in found.views()) == [
        2.5,
        3.5,
    ]
    assert {view.group for view in found.views()} == {"g"}
    assert len(series(found)) == len(set(series(found)))
    for made in programs:
        made.close()


@pytest.mark.parametrize("labels", [("v-1", "v-2"), ("v", "v")])
def test_servers_of_one_group_with_the_same_ranks_make_no_series_twice(
    tmp_path: Path, clock: Clock, dead: set[Path], labels: tuple[str, str]
) -> None:
    servers = [Server(tmp_path, server=label) for label in labels]
    writers = {r.writer.path: r.writer for s in servers for r in (s.worker, *s.fronts)}
    found = Collector(tmp_path, clock=clock, own_writers=lambda: writers, only_group="g")
    for made in servers:
        busy_second(made, clock.now)
    clock.now += 3 * SECOND
    found.tick(final=True)
    assert [len(view.ranks) for view in found.views()] == [1, 1]
    assert len(series(found)) == len(set(series(found)))
    before = {view.server for view in found.views()}
    dead.add(servers[0].worker.writer.path)
    clock.now += 2 * SECOND
    found.tick()
    assert {view.server for view in found.views() if view.ranks} < before
    for made in servers:
        made.close()
