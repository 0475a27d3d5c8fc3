"""The form of a finding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Operation = Literal[
    "is", "is_not", "above", "above_fact", "at_most", "doubled_at_most_fact", "known", "absent"
]


@dataclass(frozen=True)
class When:
    """A condition on one fact: an engine flag by its own name, or one of these about the verdict:

    ``@framework`` · ``@clock`` · ``@measurable`` (by ``llmprobe calibrate``) · ``@phase`` · ``@operator`` ·
    ``@healthy`` · ``@sign.NAME`` (`llmprobe.compute.signs.SIGNS`) · ``@batch`` (sequences that decode in a
    step) · ``@batch_ratio`` and, of pressure, ``@running_ratio`` (how many decode, or run, of
    ``max_num_seqs``), ``@running`` (how many run), ``@front_end_wait`` (share of the time that the front
    end's thread is known to have waited for a core). A fact that is not known fulfils ``is_not`` and
    ``absent`` alone.
    ``above_fact`` compares with the fact that ``value`` names; so does ``doubled_at_most_fact``, with twice
    the fact: what a change to ``x2`` would set.
    """

    fact: str
    operation: Operation = "is"
    value: Any = True

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether ``facts`` fulfil it."""
        known = facts.get(self.fact)
        if self.operation == "is_not":
            return bool(known != self.value)
        if self.operation == "absent":
            return known is None
        if known is None:
            return False
        if self.operation == "is":
            return bool(known == self.value)
        if self.operation == "known":
            return True
        if self.operation == "above_fact":
            other = facts.get(self.value)
            return other is not None and bool(known > other)
        if self.operation == "doubled_at_most_fact":
            other = facts.get(self.value)
            return other is not None and bool(2 * known <= other)
        return bool(known > self.value) if self.operation == "above" else bool(known <= self.value)


@dataclass(frozen=True)
class Change:
    """A setting by the engine's own name, and what to make of it: a value, ``x2``, ``/2``, or ``@running``.

    ``told_by`` is the fact that tells what is set now, where it is not the setting's own.
    """

    flag: str
    to: Any
    told_by: str = ""

    def proposed(self, current: Any, facts: Mapping[str, Any]) -> Any:
        """The value to try; None if it depends on a current one, or a fact, that is not known."""
        if self.to == "@running":
            return facts.get(self.to)
        if self.to not in ("x2", "/2"):
            return self.to
        if isinstance(current, bool) or not isinstance(current, (int, float)):
            return None
        return current * 2 if self.to == "x2" else max(current // 2, 1)


@dataclass(frozen=True)
class Entry:
    """One finding.

    Attributes:
        finding: its name, unique; begins with the class.
        bottleneck: a class of `llmprobe.compute.verdict.BOTTLENECKS`, ``pressure`` or ``stall``.
        cause: of that class (for pressure its kind, for a stall where it is), or several; None for every one.
        reason: what is likely so, in one sentence.
        risk: what the change may cost.
        gain: a formula of `llmprobe.compute.advice.gain`; "" where nothing can be said.
        when: all must hold.
        change: None where no setting helps.
        look: the next thing to run, which says more than a status does; ``{server}``, ``{pid}`` (of rank 0,
            or of the rank that is stalled), ``{core_pid}`` (of what schedules its steps, often the same),
            ``{pids}`` (of both) and ``{metrics}`` (where vLLM serves its own) are filled in.
    """

    finding: str
    bottleneck: str
    cause: str | tuple[str, ...] | None
    reason: str
    risk: str
    look: str
    gain: str = ""
    when: tuple[When, ...] = ()
    change: Change | None = None

    def is_of(self, cause: str | None) -> bool:
        """Whether it is a finding about that cause of its class."""
        return self.cause is None or cause in self.causes

    @property
    def causes(self) -> tuple[str, ...]:
        """Those that it is about; empty where it is about every one."""
        return (self.cause,) if isinstance(self.cause, str) else self.cause or ()


VLLM = When("@framework", "is", "vllm")
TRANSFORMERS = When("@framework", "is", "transformers")
GPU = When("@clock", "is_not", "host")
CPU = When("@clock", "is", "host")
CAPTURE = "llmprobe capture {server} --seconds 2"
#: Which kernels take the time, by class and by name; the cheapest look at a GPU that there is.
KERNELS = "llmprobe capture {server} --tool kernels --seconds 2"
TOP = "llmprobe top"  #: where there is nothing to look into, only to watch
THREADS = "top -H -b -n 1 | head -n 20"
MEMORY_IN_USE = "nvidia-smi --query-gpu=index,memory.used,memory.total --format=csv"
#: What looks at whatever runs, and once that has ended shows nothing of it.
OF_NOW = (TOP, THREADS, MEMORY_IN_USE)


def vllm_metrics(pattern: str) -> str:
    """vLLM's own metrics whose names match, from a server on this machine."""
    return f"curl -s {{metrics}} | grep -E '^vllm:{pattern}'"


#: Whether the KV cache holds more requests, and whether more are there.
ROOM = vllm_metrics("(kv_cache_usage_perc|num_requests_)")
#: vLLM refuses a limit on sequences that is above its budget of tokens.
SEQS_FIT_TWICE = When("max_num_seqs", "doubled_at_most_fact", "max_num_batched_tokens")
#: A limit on the batch matters only to a batch that comes near it.
AT_LIMIT = When("@batch_ratio", "above", 0.8)
