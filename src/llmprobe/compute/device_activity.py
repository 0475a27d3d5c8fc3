"""What ran on a device, told apart by whether it computes, communicates or moves data.

Shared by live kernel windows and by the analysis of traces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmprobe.compute.intervals import Intervals, subtract, union

#: Roles of activities. A kernel that copies or fills counts as computing: it holds the same execution units.
COMPUTE, COMMUNICATION, TRANSFER = range(3)


@dataclass(frozen=True)
class DeviceActivity:
    """When anything ran, and when only something ran that does not compute."""

    busy: Intervals
    exposed_communication: Intervals  #: communication kernels ran and nothing that computes
    exposed_transfer: Intervals  #: copies or sets ran and no kernel did


def device_activity(rows: Intervals, role: np.ndarray) -> DeviceActivity:
    """
    Args:
        rows: (N, 2) begin and end of each activity in nanoseconds, in any order, overlapping or not.
        role: (N,) of `COMPUTE`, `COMMUNICATION` and `TRANSFER`.
    """
    busy = union(rows)
    compute = busy if (role == COMPUTE).all() else union(rows[role == COMPUTE])
    communication = subtract(union(rows[role == COMMUNICATION]), compute)
    transfer = union(rows[role == TRANSFER])
    if len(transfer):
        transfer = subtract(transfer, union(rows[role != TRANSFER]))
    return DeviceActivity(busy, communication, transfer)
