"""What to do about a verdict: findings as data, and the code that fits them to one server.

The findings are Python tables, not TOML: frozen dataclasses are checked by mypy, load without I/O, which
compute does not do, and need no file beside the code in the wheel. They hold no code: conditions name a fact,
an operation and a value, gains name a formula of `llmprobe.compute.advice.gain`.
"""

from llmprobe.compute.advice.advise import Advice, Target, advise, advise_pressure, advise_stall
from llmprobe.compute.advice.entry import Change, Entry, When
from llmprobe.compute.advice.ncu import ncu_metrics
from llmprobe.compute.advice.table import ENTRIES

__all__ = [
    "ENTRIES",
    "Advice",
    "Change",
    "Entry",
    "Target",
    "When",
    "advise",
    "advise_pressure",
    "advise_stall",
    "ncu_metrics",
]
