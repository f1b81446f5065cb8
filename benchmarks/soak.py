"""A run that goes on for a while: memory, descriptors, threads and shared memory must be flat after the first minutes.

    python benchmarks/soak.py [--minutes 30] [--settle 5] [--out RESULT.json]

The quickstart without an end; every ten seconds each of its processes is looked at. The verdict compares, for each
process, the first third of the time after --settle with the last third: a median that grew by more than 5 % and by more
than --slack MiB of memory, or by more than 3 descriptors or threads, is named. Shared memory is what lies in the
session directory. Memory is what a process has of its own or in shared memory (RssAnon and RssShmem): pages of files,
such as libraries, come and go with what else runs on the machine. Exit code 1 if anything grew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
EVERY_S = 10.0
END_S = 600.0
"""The run's own findings and its page are made of some hundred megabytes of events."""
GROWTH = 1.05
FEW = 3
MEASURES = ("memory_mb", "descriptors", "threads")
Sample = dict[str, float]


def main() -> int:
    sys.path[0] = str(ROOT)  # some benchmarks in this folder have the names of packages
    given = parse()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as sessions:
        work, root = Path(folder), Path(sessions)
        process = start(work, root, given.recipe)
        try:
            samples = watch(process, work, root, given.minutes * 60)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(END_S)
        updates = last_update(work)
    settled = {name: each[settled_from(each, given.settle * 60) :] for name, each in samples.items()}
    grown = [text for name, each in sorted(settled.items()) for text in growth(name, each, given.slack)]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "minutes": given.minutes,
        "updates": updates,
        "grown": grown,
        "processes": {name: thirds(each) for name, each in sorted(settled.items()) if each},
        "every_minute": {name: by_minute(each) for name, each in sorted(samples.items())},
    }
    print(table(result["processes"]))
    print(f"{updates} updates in {given.minutes} minutes; " + ("; ".join(grown) if grown else "nothing grew"))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if grown else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--settle", type=float, default=5.0, help="minutes that are not judged")
    parser.add_argument("--slack", type=float, default=8.0, help="MiB that a process may grow by (8)")
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "quickstart.yaml"))
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def start(work: Path, root: Path, recipe: str) -> subprocess.Popen[bytes]:
    arguments = [
        "train.steps=100000000", "train.decay_steps=100000000", "run.checkpoint_every=500", "run.name=soak",
        f"run.dir={work}/runs", f"model.path={work}/model", f"run.session_dir={root}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "flowrl", "run", recipe, *arguments]
    with (work / "output").open("wb") as output:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )


def watch(process: subprocess.Popen[bytes], work: Path, root: Path, seconds: float) -> dict[str, list[Sample]]:
    """Of every process of the run and of its session directory, by name. Raises RuntimeError if the run ends early."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended after {passed:.0f} s:\n{(work / 'output').read_text()[-3000:]}")
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                samples[name_of(each)].append({
                    "t": passed,
                    "memory_mb": memory_of(each.pid) / 2**20,
                    "descriptors": each.num_fds(),
                    "threads": each.num_threads(),
                })  # fmt: skip
            except (psutil.Error, FileNotFoundError, ProcessLookupError):  # it ended since it was listed
                continue
        samples["session directory"].append({"t": passed, "memory_mb": size_of(root) / 2**20})
        time.sleep(EVERY_S)
    return dict(samples)


def memory_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kilobytes) << 10 for kilobytes in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.M))


def name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    line = " ".join(words)
    worker = re.search(r"-m controllers\.worker (\S+)", line)
    if worker is not None:
        return worker.group(1)
    if "-m flowrl run" in line:
        return "controller"
    module = re.search(r"-m (\S+)", line)
    return module.group(1) if module else process.name()


def size_of(folder: Path) -> int:
    """Bytes, of what is there: files and whole directories go while one looks."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def settled_from(samples: list[Sample], seconds: float) -> int:
    return next((place for place, each in enumerate(samples) if each["t"] >= seconds), len(samples))


def by_minute(samples: list[Sample]) -> list[Sample]:
    """The last look of every minute."""
    return list({int(each["t"] // 60): each for each in samples}.values())


def thirds(samples: list[Sample]) -> dict[str, list[float]]:
    """Measure -> median of the first third, median of the last."""
    part = max(1, len(samples) // 3)
    return {
        name: [round(statistics.median(each[name] for each in half), 1) for half in (samples[:part], samples[-part:])]
        for name in MEASURES
        if samples and name in samples[0]
    }


def growth(name: str, samples: list[Sample], slack_mb: float) -> list[str]:
    return [
        f"{name}: {measure} grew from {first} to {last}"
        for measure, (first, last) in thirds(samples).items()
        if last > GROWTH * first and last - first > (slack_mb if measure == "memory_mb" else FEW)
    ]


def last_update(work: Path) -> int:
    from flowrl.report.record import RunRecord

    steps = RunRecord.read(work / "runs" / "soak").series("critic/score/mean").step
    return int(steps[-1]) if len(steps) else 0


def table(processes: Any) -> str:
    lines = ["| process | " + " | ".join(f"{name}: first third, last third" for name in MEASURES) + " |"]
    lines.append("|---" * (len(MEASURES) + 1) + "|")
    for name, measured in processes.items():
        cells = [", ".join(map(str, measured[each])) if each in measured else "" for each in MEASURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
