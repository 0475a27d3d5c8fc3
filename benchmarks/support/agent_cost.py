"""Processor time and memory of the agent."""

from __future__ import annotations

from pathlib import Path

import psutil

from llmprobe.record.agent_launch import agent_info


class AgentCost:
    """What the agent of a directory takes of the machine while it watches."""

    def __init__(self, directory: Path) -> None:
        info = agent_info(directory)
        if info is None:
            raise RuntimeError(f"no agent serves {directory}")
        self._process = psutil.Process(info["pid"])
        #: The most seen.
        self.resident_bytes = 0

    def cpu_seconds(self) -> float:
        """Processor time so far, of all its threads."""
        self.resident_bytes = max(self.resident_bytes, self._process.memory_info().rss)
        times = self._process.cpu_times()
        return float(times.user + times.system)
