"""The journal on disk: what lies where, to the byte. Shared by writer and reader.

A journal is one file of fixed size, little-endian::

    header      64 B    magic, version, sizes, random journal id, checksum
    facts       2 x 64 KiB slots: JSON about the process, the engine and the model
    progress    one pair: the step begun last, and the one ended last
    load        one pair: requests running and waiting, KV-cache use, own health
    totals      two pairs: the cumulative totals of steps, and those of requests
    histograms  one 32-byte pair a bucket
    ring        records of 256 bytes; record ``seq`` lies in slot ``seq % slots``

A *pair* is two copies, A then B, of ``payload + checksum``, written by one ``pwrite`` in that order. A
writer that dies at any byte leaves at least one whole copy, and readers take the newer of those that
check out. Readers never see a torn value: every copy and every record carries a CRC-32 that covers its
position too.
"""

from __future__ import annotations

import math
import struct
import zlib
from enum import IntEnum, IntFlag

import numpy as np

MAGIC = b"LLMPROBE"
VERSION = 3

HEADER = struct.Struct("<8sIIIII24sI")  # magic, version, size, ring offset, record size, slots, id, CRC
HEADER_SIZE = 64
FACTS_SLOT = 64 * 1024
RECORD_SIZE = 256
DEFAULT_SIZE = 4 * 1024 * 1024


class Kind(IntEnum):
    """What a record in the ring tells."""

    STEP = 1
    REQUEST = 2
    PENDING = 3
    MARK = 4


class Phase(IntEnum):
    """What a step worked on; the names are the values of the ``phase`` label."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2
    DRAFT = 3
    DUMMY = 4
    ENCODE = 5

    @property
    def label(self) -> str:
        return self.name.lower()


PHASES = tuple(phase.label for phase in Phase)
UNKNOWN_PHASE = 255  #: of a running step whose batch has not been read yet


class Clock(IntEnum):
    """Where a step's times come from."""

    HOST = 0  #: CLOCK_MONOTONIC around synchronous work on a CPU device
    CUDA = 1  #: CUDA events on the compute stream


class Flag(IntFlag):
    """Facts about one step record."""

    RESTARTED = 1  #: first step after arming or after a lost one: the gap before it is not known
    NO_SAMPLE = 2  #: the engine has no separate sampling call; e2 equals e1
    EMPTY = 4  #: no token was scheduled (an engine's "flush" step)
    NO_PARTS = 8  #: e1 and e2 were not stamped, to save time; both equal e3


KV_GROUPS = 4  #: KV-cache groups (by visible window) told apart in a step record

#: One step of the engine. Times are nanoseconds of CLOCK_MONOTONIC. ``e0`` forward start, ``e1`` forward
#: end, ``e2`` sampling start, ``e3`` step end. Context totals are tokens summed over requests, clamped to
#: the group's window; pairs are visible (query, key) pairs.
STEP = np.dtype(
    [
        ("seq", "<u8"),
        ("time", "<i8"),  # step entry on the host
        ("kind", "<u2"),
        ("phase", "u1"),
        ("clock", "u1"),
        ("flags", "<u4"),
        ("step", "<u8"),
        ("e0", "<i8"),
        ("e1", "<i8"),
        ("e2", "<i8"),
        ("e3", "<i8"),
        ("requests", "<u4"),
        ("prefill_requests", "<u4"),
        ("prompt_tokens", "<u4"),  # query tokens of prefilling requests
        ("decode_tokens", "<u4"),  # query tokens of decoding requests, drafts included
        ("draft_tokens", "<u4"),  # of them, speculative
        ("sampled", "<u4"),  # positions that went through the output head
        ("new_tokens", "<u4"),  # tokens generated, where the recording process knows
        ("own_ns", "<u4"),  # llmprobe's own host time in this step
        ("kv_used_bytes", "<u8"),  # 0 where the recording process does not know
        ("encode_ns", "<u8"),
        ("context_prefill", "<u4", (KV_GROUPS,)),  # keys visible to prefilling requests
        ("context_decode", "<u4", (KV_GROUPS,)),
        ("pairs_prefill", "<u8", (KV_GROUPS,)),
        ("pairs_decode", "<u8", (KV_GROUPS,)),
        ("reserved", "V44"),
        ("crc", "<u4"),
    ]
)

#: One finished request, as the process that talks to the client saw it. Durations in nanoseconds;
#: ``ttft``, ``tpot`` and ``queue`` are -1 where they do not exist (no token, one token, not queued).
REQUEST = np.dtype(
    [
        ("seq", "<u8"),
        ("time", "<i8"),  # when it finished
        ("kind", "<u2"),
        ("phase", "u1"),
        ("clock", "u1"),
        ("flags", "<u4"),
        ("duration", "<i8"),
        ("ttft", "<i8"),
        ("tpot", "<i8"),
        ("queue", "<i8"),
        ("prompt_tokens", "<u4"),
        ("generated_tokens", "<u4"),
        ("cached_tokens", "<u4"),
        ("preemptions", "<u4"),
        ("engine", "<u4"),
        ("finish", "<u4"),
        ("reserved", "V172"),
        ("crc", "<u4"),
    ]
)

#: Work became pending (``unfinished`` > 0) or stopped being so (0) at ``time``.
PENDING = np.dtype(
    [
        ("seq", "<u8"),
        ("time", "<i8"),
        ("kind", "<u2"),
        ("phase", "u1"),
        ("clock", "u1"),
        ("flags", "<u4"),
        ("unfinished", "<u4"),
        ("engine", "<u4"),
        ("reserved", "V220"),
        ("crc", "<u4"),
    ]
)

DTYPES = {Kind.STEP: STEP, Kind.REQUEST: REQUEST, Kind.PENDING: PENDING}
if any(dtype.itemsize != RECORD_SIZE for dtype in DTYPES.values()):
    raise AssertionError("every record takes RECORD_SIZE bytes")

STEP_PACK = struct.Struct("<QqHBBIQ4q8I2Q8I8Q44x")
REQUEST_PACK = struct.Struct("<QqHBBI4q6I172x")
PENDING_PACK = struct.Struct("<QqHBBI2I220x")
CRC = struct.Struct("<I")

#: Cumulative totals of steps, one a phase where named so; ``*_ns`` are nanoseconds.
STEP_COUNTERS = (
    *(f"steps_{phase}" for phase in PHASES),
    *(f"span_ns_{phase}" for phase in PHASES),
    *(f"gap_ns_{phase}" for phase in PHASES),
    "step_prompt_tokens",
    "step_decode_tokens",
    "own_ns_step",
    "thread_ns_step",  # processor time of llmprobe's own thread, where the process records steps
)
#: Cumulative totals of requests, and of llmprobe itself.
REQUEST_COUNTERS = (
    "own_ns_request",
    "thread_ns_request",  # the same of a front end's
    "errors",
    "dropped",
    "requests",
    "requests_aborted",
    "prompt_tokens",
    "generated_tokens",
    "cached_tokens",
    "preemptions",
    # Sums of the latency histograms below; those of steps are span_ns_*.
    "sum_ns_time_to_first_token",
    "sum_ns_time_per_output_token",
    "sum_ns_inter_token_latency",
    "sum_ns_request_duration",
    "sum_ns_request_queue",
    "sum_ns_output_lag",
    # Of requests when they have their first token: how many told how long they were queued, and the sum.
    "first_tokens_queued",
    "sum_ns_first_token_queue",
)
COUNTERS = STEP_COUNTERS + REQUEST_COUNTERS
COUNTER_INDEX = {name: index for index, name in enumerate(COUNTERS)}

#: Latency histograms; their sums are counters.
HISTOGRAMS = (
    "time_to_first_token",
    "time_per_output_token",
    "inter_token_latency",
    "request_duration",
    "request_queue",
    "output_lag",  # of each iteration's outputs: engine core to front end, see `Recorder.output_lags`
    *(f"step_{phase}" for phase in PHASES[:3]),
)
HISTOGRAM_INDEX = {name: index for index, name in enumerate(HISTOGRAMS)}

# Buckets 1 % apart from 10 µs to about 1000 s; the first also takes what is shorter, the last what is longer.
BUCKET_LOW_NS = 10_000
BUCKET_STEP = 1.01
BUCKETS = 1852
_PER_LOG = 1 / math.log(BUCKET_STEP)

CELL = struct.Struct("<QI4x")  # value, CRC of (index, value)
CELL_PAIR = 2 * CELL.size
_POSITION_VALUE = struct.Struct("<QQ")

PROGRESS = struct.Struct("<QqQII")  # step begun last, when, step ended last, phase, tokens
#: update number, time, running, waiting, KV use (ratio of capacity), unfinished, armed, inert; then how many
#: requests of this front end, at any of its engines, had no token yet
LOAD = struct.Struct("<QqIIdIIII")
LOAD_FIELDS = (
    *("update", "time", "running", "waiting", "kv_usage", "unfinished", "armed", "inert"),
    "tokenless",
)
#: Totals of steps follow the ring by a moment: first the ``seq`` up to which (exclusive) they count.
STEP_TOTALS = struct.Struct(f"<Q{len(STEP_COUNTERS)}Q")
REQUEST_TOTALS = struct.Struct(f"<Q{len(REQUEST_COUNTERS)}Q")  # update number, totals

FACTS_OFFSET = HEADER_SIZE
PROGRESS_OFFSET = FACTS_OFFSET + 2 * FACTS_SLOT
LOAD_OFFSET = PROGRESS_OFFSET + 128
STEP_TOTALS_OFFSET = LOAD_OFFSET + 256
REQUEST_TOTALS_OFFSET = STEP_TOTALS_OFFSET + 1024
HISTOGRAMS_OFFSET = REQUEST_TOTALS_OFFSET + 1024
RING_OFFSET = -(-(HISTOGRAMS_OFFSET + len(HISTOGRAMS) * BUCKETS * CELL_PAIR) // 4096) * 4096


def bucket_of(nanoseconds: int) -> int:
    """The histogram bucket of a duration: the first whose upper bound is not below it."""
    if nanoseconds <= BUCKET_LOW_NS:
        return 0
    return min(math.ceil(math.log(nanoseconds / BUCKET_LOW_NS) * _PER_LOG), BUCKETS - 1)


def bucket_bounds_seconds() -> np.ndarray:
    """Upper bounds of the buckets in seconds; the last is infinite."""
    bounds = BUCKET_LOW_NS / 1e9 * np.power(BUCKET_STEP, np.arange(BUCKETS, dtype=np.float64))
    bounds[-1] = np.inf
    return bounds


def cell_crc(position: int, value: int) -> int:
    """Of a histogram's cell at ``position``; never 0, so that a cell nobody wrote is told from one of 0."""
    return zlib.crc32(_POSITION_VALUE.pack(position, value)) or 1
