"""Several recordings of about the same seconds, one of each process of a server, as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from llmprobe.analysis.events import (
    UNKNOWN,
    Activities,
    HostOperator,
    Ints,
    Spans,
    Trace,
    by_begin,
)
from llmprobe.analysis.names import NameTable


def together(traces: Sequence[tuple[str, Trace]]) -> Trace:
    """One trace of all.

    Args:
        traces: the name of each process, such as ``rank0``, and what was recorded of it, all on one clock.

    Returns:
        Devices carry the names of their processes where there are several. How idle each was is told by the
        seconds in which its own process recorded: they begin and end some tenths of a second apart.
    """
    if len(traces) == 1:
        return traces[0][1]
    table, devices = NameTable(), list[str]()
    activities, ranges, calls, on_devices, threads = [], [], [], [], 0
    for name, trace in traces:
        index = np.array([table.add(one) for one in trace.names] or [0], dtype=np.int64)
        first = len(devices)
        devices += [f"{name}: {device}" for device in trace.devices]
        activities.append(_activities(trace.activities, index, first, threads))
        ranges.append(_spans(trace.ranges, index, threads))
        calls.append(_spans(trace.calls, index, threads))
        on_devices.append(_spans(trace.device_ranges, index, first))
        threads += 1 + max(
            (
                int(one.max())
                for one in (trace.activities.thread, trace.ranges.thread, trace.calls.thread)
                if len(one)
            ),
            default=0,
        )
    recorded = [trace.recorded for _, trace in traces if trace.recorded is not None]
    return dataclasses.replace(
        traces[0][1],
        names=table.names,
        devices=devices,
        activities=by_begin(Activities(*_joined(activities))),
        ranges=Spans(*_joined(ranges)),
        calls=Spans(*_joined(calls)),
        device_ranges=Spans(*_joined(on_devices)),
        host_operators=_operators([trace for _, trace in traces]),
        recorded=_outer(np.concatenate(recorded)) if recorded else None,
        recordings=np.repeat(np.arange(len(traces)), [len(trace.devices) for _, trace in traces]),
        lost=[f"{name}: {text}" for name, trace in traces for text in trace.lost],
        implausible=sum(trace.implausible for _, trace in traces),
        cuda_traced=any(trace.cuda_traced for _, trace in traces),
    )


def _activities(one: Activities, names: Ints, devices: int, threads: int) -> Activities:
    return dataclasses.replace(
        one, name=names[one.name], device=one.device + devices, thread=_moved(one.thread, threads)
    )


def _spans(one: Spans, names: Ints, threads: int) -> Spans:
    return dataclasses.replace(one, name=names[one.name], thread=_moved(one.thread, threads))


def _moved(threads: Ints, by: int) -> Ints:
    return np.where(threads == UNKNOWN, UNKNOWN, threads + by)


def _joined(parts: Sequence[Activities] | Sequence[Spans]) -> list[Ints]:
    return [
        np.concatenate([getattr(part, column) for part in parts]) for column in parts[0].__dataclass_fields__
    ]


def _outer(recorded: Ints) -> Ints:
    return np.array([[recorded[:, 0].min(), recorded[:, 1].max()]], dtype=np.int64)


def _operators(traces: Sequence[Trace]) -> list[HostOperator]:
    sums: dict[str, HostOperator] = {}
    for one in (operator for trace in traces for operator in trace.host_operators):
        known = sums.get(one.name, HostOperator(one.name, 0, 0.0, 0.0))
        sums[one.name] = HostOperator(
            one.name,
            known.count + one.count,
            known.seconds + one.seconds,
            known.self_seconds + one.self_seconds,
        )
    return sorted(sums.values(), key=lambda one: -one.self_seconds)
