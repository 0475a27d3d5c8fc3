"""Processor time and memory of processes that are being measured."""

from __future__ import annotations

from pathlib import Path

import psutil

from llmprobe.record.agent_launch import agent_info


class ProcessCost:
    """Some processes together."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes
        #: The most seen, of all together.
        self.resident_bytes = 0

    @classmethod
    def of_agent(cls, directory: Path) -> ProcessCost:
        """The agent of a directory."""
        info = agent_info(directory)
        if info is None:
            raise RuntimeError(f"no agent serves {directory}")
        return cls([psutil.Process(info["pid"])])

    @classmethod
    def of_tree(cls, pid: int) -> ProcessCost:
        """A process and those it has started so far. (An agent is not among them: it leaves the tree.)"""
        root = psutil.Process(pid)
        return cls([root, *root.children(recursive=True)])

    def cpu_seconds(self) -> float:
        """Processor time so far, of all threads, in ticks of 10 ms."""
        self.resident_bytes = max(
            self.resident_bytes, sum(process.memory_info().rss for process in self._processes)
        )
        times = [process.cpu_times() for process in self._processes]
        return float(sum(time.user + time.system for time in times))
