"""Which processes belong to one server, and what each server is called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmprobe.collect.process import Process


class Grouping:
    """Groups processes into views. One server is one group, except that a group may be inherited:

    every program is a view of its own, as are servers of one group that have the same ranks: told apart by
    their labels, or else rank by rank, so that no two ranks of a view are the same.
    """

    def __init__(self) -> None:
        self.keys: dict[Path, str] = {}
        self._split: set[str] = set()  # groups told apart by label, for their life
        self._alone: set[Path] = set()  # ranks that are a view of their own
        self._alone_before: set[str] = set()  # their journals' names, by an agent before this one
        self._labels: dict[str, str] = {}

    def update(self, processes: Mapping[Path, Process]) -> None:
        """Find the view of every process."""
        keys: dict[Path, str] = {}
        self._split &= {process.group for process in processes.values()}
        self._alone |= {path for path in processes if path.name in self._alone_before}
        self._alone_before.difference_update(path.name for path in processes)
        for attempt in ("group", "label"):
            taken: dict[tuple[str, int, int], Path] = {}
            for path, process in processes.items():
                key = process.group
                if process.role == "program":
                    keys[path] = f"{key}/{process.identity}"
                    continue
                if process.group in self._split:
                    key = f"{key}/{process.facts.get('server', '')}"
                if process.role == "worker" and process.alive:
                    rank = (key, process.engine, int(process.facts.get("rank", 0)))
                    if path in self._alone or taken.setdefault(rank, path) != path:
                        if attempt == "group":
                            self._split.add(process.group)
                        else:
                            self._alone.add(path)
                        key = f"{key}/{process.identity}"
                keys[path] = key
        self.keys = keys

    def save(self) -> dict[str, Any]:
        """As JSON: what an agent that starts anew needs so that every server keeps its key and its label."""
        return {
            "split": sorted(self._split),
            "alone": sorted(path.name for path in self._alone),
            "labels": self._labels,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from `save`, before the first `update`."""
        self._split = set(saved.get("split", ()))
        self._alone_before = set(saved.get("alone", ()))
        self._labels = dict(saved.get("labels", {}))

    def forget(self, path: Path) -> None:
        """A process is no longer read."""
        self.keys.pop(path)
        self._alone.discard(path)

    def living(self) -> set[str]:
        """The keys of views that still have a process."""
        return set(self.keys.values())

    def shown(self, keys: Collection[str]) -> None:
        """These views are shown from now on; labels of others, whose processes are dead, are free again.

        A program that is started once more has the label it had, while the journal of the first is kept.
        """
        self._labels = {key: label for key, label in self._labels.items() if key in keys}

    def label(self, key: str, server: str) -> str:
        """A label that no other server has: its name, with a number if that is taken. Stays for its life."""
        if key not in self._labels:
            taken = set(self._labels.values())
            numbered = (f"{server}-{number}" for number in range(2, len(taken) + 3))
            self._labels[key] = next(label for label in (server, *numbered) if label not in taken)
        return self._labels[key]

    def label_of(self, process: Process) -> str:
        """The label of a process's server, as far as one was given."""
        return self._labels.get(self.keys.get(process.path, ""), str(process.facts.get("server", "")))
