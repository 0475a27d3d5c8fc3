"""Findings about ranks that have stopped getting on."""

from __future__ import annotations

from llmprobe.compute.advice.entry import GPU, VLLM, Entry, When, vllm_metrics

_STALL = "stall"
#: Of the engine core and every worker, by the names that vLLM gives them.
_ALL_STACKS = "for pid in $(pgrep -f VLLM::); do py-spy dump --native --pid $pid; done"
_STACKS = "py-spy dump --native --pid {pid}"
_TRACED = (
    "Processes stop while their stacks are read; it needs the right to trace them (root, or SYS_PTRACE)."
)
_LOOK = "None: only a look."
_OTHERS = When("@framework", "is_not", "vllm")

ENTRIES = (
    Entry(
        "stall.step.stacks",
        _STALL,
        "step",
        "A step does not end: the stacks of the engine's processes say in what (a collective, a copy, a "
        "compiler, a lock).",
        _TRACED,
        _ALL_STACKS,
        when=(VLLM,),
    ),
    Entry(
        "stall.step.stack",
        _STALL,
        "step",
        "A step does not end: the program's stacks say in what (a collective, a copy, a compiler, a lock).",
        _TRACED,
        _STACKS,
        when=(_OTHERS,),
    ),
    Entry(
        "stall.step.ranks",
        _STALL,
        "step",
        "Ranks that wait in a collective keep their GPUs at full use: one that is not is what they wait for.",
        _LOOK,
        "nvidia-smi --query-gpu=index,utilization.gpu,memory.used --format=csv",
        when=(GPU, When("tensor_parallel_size", "above", 1)),
    ),
    Entry(
        "stall.step.fault",
        _STALL,
        "step",
        "A GPU that faulted or fell off its bus ends no kernel: the kernel log of the machine says so (Xid).",
        _LOOK,
        "dmesg -T | grep -i xid",
        when=(GPU,),
    ),
    Entry(
        "stall.between_steps.stacks",
        _STALL,
        "between_steps",
        "Requests wait and no step begins: the scheduler waits for something (a grammar, a remote cache, a "
        "worker that is gone).",
        _TRACED,
        _ALL_STACKS,
        when=(VLLM,),
    ),
    Entry(
        "stall.between_steps.stack",
        _STALL,
        "between_steps",
        "Work waits and no step begins: the program's stacks say for what.",
        _TRACED,
        _STACKS,
        when=(_OTHERS,),
    ),
    Entry(
        "stall.between_steps.waiting",
        _STALL,
        "between_steps",
        "vLLM counts what its requests wait for.",
        _LOOK,
        vllm_metrics("num_requests_"),
        when=(VLLM,),
    ),
    Entry(
        "stall.log",
        _STALL,
        None,
        "The engine's own log may say what timed out or died; this is where it goes.",
        _LOOK,
        "readlink /proc/{pid}/fd/2",
    ),
    Entry(
        "stall.snapshot",
        _STALL,
        None,
        "Steps, load, flags and signs of the host until now, kept for when the server has been started anew.",
        _LOOK,
        "llmprobe snapshot",
    ),
)
