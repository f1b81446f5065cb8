"""What `flowrl doctor` estimates, beside what a run takes.

    python benchmarks/doctor.py [--recipe recipes/quickstart.yaml] [--updates 30] [field.name=value …]

Memory is what a worker has of its own (RssAnon), its largest of a look every 20 ms; the estimate is that of its process
and of what it holds. What it maps of shared memory is counted once: the most that lay in the session directory, which
the queue fills as far as the run needs. The disk is what the run's directory holds in the end. On a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from soak import size_of

if TYPE_CHECKING:
    from flowrl.doctor.estimate import Need
    from flowrl.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
EVERY_S = 0.02
LOGS = ("events.jsonl", "metrics.jsonl", "samples.jsonl", "record, for flowrl replay")
Amounts = dict[str, float]


def main() -> int:
    sys.path[0] = str(ROOT)  # some benchmarks in this folder have the names of packages
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    from flowrl import config, pipeline

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as sessions:
        overrides = [
            "run.name=x", f"run.dir={folder}/runs", f"run.session_dir={sessions}", f"model.path={folder}/model",
            f"train.steps={given.updates}", *given.overrides,
        ]  # fmt: skip
        recipe = config.load(str(ROOT / given.recipe), overrides)
        estimated = estimates(pipeline.build(recipe, 1))
        measured, code = run(given.recipe, overrides, Path(sessions))
        measured |= on_disk(Path(folder) / "runs" / "x", given.updates)
    print("| | estimated, MiB | measured, MiB | estimated / measured |\n|---|---|---|---|")
    for name, amount in estimated.items():
        print(f"| {name} | {amount:.4g} | {measured[name]:.4g} | {amount / measured[name]:.2f} |")
    for name in sorted(set(measured) - set(estimated)):
        print(f"| {name} | | {measured[name]:.4g} | |")
    return code


def estimates(built: Pipeline) -> Amounts:
    from flowrl.doctor import estimate
    from flowrl.doctor.shape import shape_of

    recipe, shape = built.recipe, shape_of(built.recipe)
    found = {
        plan.name: estimate.process_bytes(plan) + total(estimate.worker_memory(plan, recipe, shape))
        for plan in built.workers
    }
    found["shared memory"] = total(estimate.shared_memory(recipe, shape))
    found |= {f"disk, an update: {need.what}": need.amount for need in estimate.disk_per_update(recipe)}
    found["disk in all"] = total(estimate.disk_in_all(recipe, shape))
    return {name: amount / 2**20 for name, amount in found.items()}


def total(needs: list[Need]) -> int:
    return sum(need.amount for need in needs)


def run(recipe: str, overrides: list[str], sessions: Path) -> tuple[Amounts, int]:
    """The most of each, and the exit code."""
    command = [sys.executable, "-m", "flowrl", "run", recipe, *overrides]
    most: Amounts = defaultdict(float)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for name, resident in residents(process.pid):
                most[name] = max(most[name], resident)
            most["shared memory"] = max(most["shared memory"], size_of(sessions) / 2**20)
            time.sleep(EVERY_S)
    return most, process.returncode


def residents(controller: int) -> Iterator[tuple[str, float]]:
    """(worker, or what else the run consists of; MiB)"""
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        main = psutil.Process(controller)
        yield "controller", resident_mb(controller)
        for child in main.children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                line = " ".join(child.cmdline())
                found = re.search(r"-m controllers\.worker (\S+)", line)
                yield found[1] if found else name_of(line), resident_mb(child.pid)


def name_of(line: str) -> str:
    known = re.search(r"controllers[./](\w+)", line)
    return known[1] if known else "others"


def resident_mb(pid: int) -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    return int(found[1]) / 2**10 if found else 0.0


def on_disk(run: Path, updates: int) -> Amounts:
    logs = {f"disk, an update: {name}": sum_of(run / name.split(",")[0]) / updates for name in LOGS}
    return logs | {"disk in all": sum_of(run)}


def sum_of(path: Path) -> float:
    """MiB, apparent: of a record the ranks' files alone."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    if path.name == "record":
        files = [each for each in files if each.name.startswith("rank")]
    return sum(each.lstat().st_size for each in files) / 2**20


if __name__ == "__main__":
    sys.exit(main())
