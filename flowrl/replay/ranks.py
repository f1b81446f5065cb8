"""Starts the ranks of a replay, waits for them, and says what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from controllers.process import log_tail
from controllers.roster import installed_versions
from flowrl.replay.lineage import Lineage, record_files

_TAIL_LINES = 12
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Replayed:
    """divergence: where the weights first were not what the run had, in words; empty if they were to the end."""

    steps: int
    world_size: int
    out: Path
    divergence: str


def replay(run: Path, out: Path, timeout_s: float | None = None) -> Replayed:
    """Raises ValueError for a run that cannot be replayed here, or if a rank fails."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"run: {str(run)!r}; is no run's directory")
    lineages = [Lineage(run, rank) for rank in sorted({rank for rank, _, _ in record_files(run)} or {0})]
    beginning = lineages[0].beginning
    if len(lineages) != beginning.world_size:
        raise ValueError(f"run: {str(run)!r} has records of {len(lineages)} of its {beginning.world_size} ranks")
    refuse_other_packages(beginning.versions)
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"--out: {str(out)!r} exists already; name another directory") from None
    _run_ranks(run, out, beginning.world_size, beginning.threads, timeout_s)
    results = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(beginning.world_size)]
    return Replayed(min(lineage.steps for lineage in lineages), beginning.world_size, out, _describe(results))


def refuse_other_packages(recorded: dict[str, str]) -> None:
    """Raises ValueError: other packages compute other bits."""
    for package, version in installed_versions().items():
        if recorded.get(package, version) != version:
            raise ValueError(
                f"{package}: {version} is installed, the run had {recorded[package]}; a replay needs the same"
            )


def _run_ranks(run: Path, out: Path, world_size: int, threads: int, timeout_s: float | None) -> None:
    environment = {**os.environ, **{name: str(threads) for name in _THREAD_VARIABLES}}
    processes = []
    try:
        for rank in range(world_size):
            command = [sys.executable, "-m", "flowrl.replay.stage", str(run), str(out), str(rank)]
            with (out / f"rank{rank}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        for rank, process in enumerate(processes):
            if process.wait(timeout_s):
                log_path = out / f"rank{rank}.log"
                raise ValueError(
                    f"rank {rank} of the replay failed; {log_path} ends:\n{log_tail(log_path, _TAIL_LINES)}"
                )
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _describe(results: list[dict]) -> str:
    found = [
        (result["divergence"]["update"], result["rank"], result["divergence"])
        for result in results
        if result["divergence"]
    ]
    if not found:
        return ""
    update, rank, divergence = min(found, key=lambda item: item[:2])
    names = divergence["parameters"]
    others = f" and {len(names) - 1} more of {divergence['of']} parameters" if len(names) > 1 else ""
    return f"after update {update}, first in {names[0]}{others} (shard of rank {rank})"
