"""What a vLLM worker says of itself once it is warm: its runner, rank, device and model, and what lacks."""

from __future__ import annotations

from typing import Any

from llmprobe.hooks.naming import server_name
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.torch_model import device_facts
from llmprobe.hooks.vllm import engine_core, facts, seams
from llmprobe.settings import logger

#: What a step of a worker goes through.
STEP_METHODS = ("execute_model", "sample_tokens", "execute_dummy_batch")


def worker_facts(
    probe: Probe, worker: Any, clock: str, seam: seams.Seam | None, kv_cache_config: Any
) -> dict[str, Any]:
    """The facts of its journal. What lacks is logged, too.

    Args:
        worker: vLLM's, after its warm-up.
        clock: what its steps are stamped with.
        seam: where its forward passes begin.
        kv_cache_config: vLLM's layout of its KV cache.
    """
    config = worker.vllm_config
    said = facts.process_facts(
        probe.settings, server_name(probe.settings), "worker", config, facts.engine_of(config)
    )
    said["runner"] = seams.runner_kind(worker.model_runner)
    said["rank"] = int(worker.rank)
    said["clock"] = clock
    said[engine_core.PID_FACT] = engine_core.pid_of_parent(config.parallel_config)
    said["device"] = device_facts(worker.device)
    said["hooks"] = [f"{owner.__name__}.{name}" for owner, name in seams.methods(type(worker), STEP_METHODS)]
    notes = said["notes"]
    if seam is None:
        notes.append("this vLLM has no known place where the forward pass begins: gaps are lower bounds")
    if not seams.tried(said["framework_version"]):
        notes.append(f"vLLM {said['framework_version']} has not been tried with this llmprobe")
    said["model"] = probe.guard.call("vllm.model_facts", facts.model_facts, worker, kv_cache_config)
    if said["model"] is None:
        notes.append("the model could not be read: no MBU, no MFU")
    for line in notes:
        logger().warning("%s", line)
    return said
