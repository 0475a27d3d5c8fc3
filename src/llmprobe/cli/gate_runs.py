"""The ``run.json`` files that ``llmprobe gate`` compares, and the metrics in them by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmprobe.export.report import SCHEMA_VERSION

LATENCIES = {
    "ttft": "ttft_seconds",
    "tpot": "tpot_seconds",
    "inter_token": "inter_token_seconds",
    "duration": "duration_seconds",
    "queue": "queue_seconds",
}
ALIASES = {"prefill.ttft": "ttft", "decode.tpot": "tpot"}
_STATISTICS = ("p50", "p99", "mean")
_RATIOS = {"mbu": "mbu_step", "mfu": "mfu_step", "sync_gap": "sync_gap_ratio"}
_HIGHER_IS_BETTER = ("mbu", "mfu", "throughput")


class RunError(Exception):
    """A file, side or metric that cannot be used; the message says which, why, and what there is instead."""


@dataclass(frozen=True)
class Run:
    """One finished run of one server."""

    path: Path
    server: Mapping[str, Any]
    exit_code: int | None

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric that this run has, by name. Seconds, ratios, tokens per second."""
        return {**_latencies(self.server), **_phases(self.server)}

    @property
    def setup(self) -> dict[str, Any]:
        """What should be the same on both sides unless it is what is compared."""
        devices = sorted({str(rank["device"].get("name", "")) for rank in self.server["ranks"]})
        return {
            "model": self.server["model_name"],
            "device": ", ".join(filter(None, devices)) or None,
            "ranks": len(self.server["ranks"]),
            self.server["framework"]: self.server["framework_version"],
            **{f"flag {name}": value for name, value in self.server["flags"].items()},
        }


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good."""
    return metric.rpartition(".")[2] not in _HIGHER_IS_BETTER


def unit(metric: str) -> str:
    """``s`` for seconds, ``tokens/s``, or nothing for a ratio."""
    if metric == "throughput":
        return "tokens/s"
    return "" if metric.rpartition(".")[2] in _RATIOS else "s"


def files(side: str) -> list[Path]:
    """The files that one side names: files, directories and patterns, separated by commas.

    Raises:
        RunError: one of them leads to no file.
    """
    found: list[Path] = []
    for part in filter(None, side.split(",")):
        path = Path(part)
        try:
            if folder := path.is_dir():
                more = sorted(path.glob("*.json"))
            elif path.exists():
                more = [path]
            else:
                more = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        except (OSError, ValueError) as error:  # a folder that must not be searched, no pattern
            why = getattr(error, "strerror", None) or error
            raise RunError(f"cannot look for {part!r}: {why}") from None
        if not more:
            what = "holds no *.json" if folder else "does not exist"
            raise RunError(f"{part!r} {what}; `llmprobe run --output FILE -- COMMAND` makes one")
        found += more
    if not found:
        raise RunError(f"{side!r} names no file")
    return list(dict.fromkeys(found))


def load(path: Path, server: str | None) -> Run:
    """Read one file.

    Args:
        server: the label of the server that is meant, where a file has several.

    Raises:
        RunError: it cannot be read, is not a report of ``llmprobe run``, or has not that one server.
    """
    try:
        document = json.loads(path.read_text(), parse_constant=_no_number)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("servers"), list):
        raise RunError(f"{path} is not a report of `llmprobe run`: it has no list of servers")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{path} has schema_version {document.get('schema_version')!r}; "
            f"this llmprobe reads {SCHEMA_VERSION}"
        )
    if not all(isinstance(found, dict) for found in document["servers"]):
        raise RunError(f"{path} is not a report of `llmprobe run`: one of its servers is no object")
    servers = {str(found.get("server")): found for found in document["servers"]}
    if server is not None and server not in servers:
        raise RunError(f"{path} has no server {server!r}; it has: {', '.join(servers) or 'none'}")
    if not servers:
        raise RunError(f"{path} has no server: nothing was measured in that run")
    if server is None and len(document["servers"]) > 1:
        raise RunError(f"{path} has several servers, choose one with --server: {', '.join(servers)}")
    chosen = servers[server] if server is not None else document["servers"][0]
    run = Run(path, chosen, document.get("exit_code"))
    try:
        _ = run.setup
        wrong = [name for name, value in run.metrics.items() if not math.isfinite(value)]
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise RunError(f"{path} is not a report of `llmprobe run`: {error!r}") from None
    if wrong:
        raise RunError(f"{path} is not a report of `llmprobe run`: {wrong[0]} is no finite number")
    return run


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def values(side: list[Run], metric: str) -> list[float]:
    """A metric of each run. Raises RunError naming a run that lacks it, and what it has."""
    name = ALIASES.get(metric, metric)
    found = []
    for run in side:
        if name not in run.metrics:
            has = ", ".join(known(run)) or "none: nothing was measured"
            raise RunError(f"{run.path} has no metric {metric!r}; it has: {has}")
        found.append(run.metrics[name])
    return found


def has(run: Run, metric: str) -> bool:
    """Whether a run has a metric, by any of its names."""
    return ALIASES.get(metric, metric) in run.metrics


def known(run: Run) -> list[str]:
    """The names of a run's metrics; of p50, p99 and mean the short form."""
    return sorted({name for name in run.metrics if name.rpartition(".")[2] not in _STATISTICS})


def differences(base: list[Run], new: list[Run]) -> Iterator[str]:
    """What is not the same within or between the sides, one line each."""
    first = base[0].setup
    seen: set[str] = set()
    for run in [*base[1:], *new]:
        setup = run.setup
        for name in {**first, **setup}:
            if first.get(name) != setup.get(name) and name not in seen:
                seen.add(name)
                yield f"{name} differs: {first.get(name)} in {base[0].path}, {setup.get(name)} in {run.path}"
    for run in [*base, *new]:
        if run.exit_code:
            yield f"the command of {run.path} ended with {run.exit_code}"


def _latencies(server: Mapping[str, Any]) -> dict[str, float]:
    """Over all engines, weighted by how much each saw."""
    found: dict[str, float] = {}
    for name, key in LATENCIES.items():
        seen = [engine[key] for engine in server["engines"] if engine.get(key)]
        found |= _statistics(name, [(quantiles, quantiles["count"]) for quantiles in seen])
    generated = sum(engine["generated_tokens"] for engine in server["engines"])
    seconds = max(
        (sum(phase["seconds"] for phase in rank["phases"].values()) for rank in server["ranks"]), default=0.0
    )
    if generated > 0 and seconds > 0:
        found["throughput"] = generated / seconds
    return found


def _phases(server: Mapping[str, Any]) -> dict[str, float]:
    """Over all ranks, weighted by their steps."""
    found: dict[str, float] = {}
    for phase in {phase for rank in server["ranks"] for phase in rank["phases"]}:
        ranks = [rank["phases"][phase] for rank in server["ranks"] if phase in rank["phases"]]
        steps = [(rank["step_seconds"], rank["steps"]) for rank in ranks if rank.get("step_seconds")]
        found |= _statistics(f"{phase}.step", steps)
        ranks = [rank for rank in ranks if rank["steps"] > 0]
        elapsed = [(rank["seconds"] / rank["steps"], rank["steps"]) for rank in ranks if rank["seconds"] > 0]
        if elapsed:
            found[f"{phase}.elapsed"] = _mean(elapsed)
        for name, key in _RATIOS.items():
            if known_values := [(rank[key], rank["steps"]) for rank in ranks if rank.get(key) is not None]:
                found[f"{phase}.{name}"] = _mean(known_values)
    return found


def _statistics(name: str, seen: list[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    seen = [(quantiles, weight) for quantiles, weight in seen if weight > 0]
    if not seen:
        return {}
    found = {
        f"{name}.{statistic}": _mean([(quantiles[statistic], weight) for quantiles, weight in seen])
        for statistic in _STATISTICS
    }
    return {name: found[f"{name}.p50"], **found}


def _mean(weighted: list[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)
