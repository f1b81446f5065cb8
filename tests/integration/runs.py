"""Starts real runs of a small recipe and looks at what they leave. Used by the integration tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SESSIONS = Path("/dev/shm") / f"flowrl-tests-{os.getpid()}"
SMALL = (
    "data.size=3000",
    "data.held_out=50",
    "data.dev=50",
    "warm_start.max_steps=16",
    "train.batch_groups=8",
    "eval.every=10",
)


def command(*overrides: str, recipe: str = "recipes/quickstart.yaml") -> list[str]:
    return [sys.executable, "-m", "flowrl", "run", str(ROOT / recipe), *overrides]


def small_run(directory: Path, *overrides: str, name: str = "small", steps: int = 12) -> list[str]:
    """The quickstart, shrunk to seconds, in `directory`."""
    return command(
        *SMALL, f"train.steps={steps}", f"run.name={name}", f"run.dir={directory}/runs",
        f"model.path={directory}/model", f"run.session_dir={sessions(directory)}", *overrides,
    )  # fmt: skip


def sessions(directory: Path) -> Path:
    """A session root of the test's own, short enough for sockets, so that what is left in it is this run's."""
    return SESSIONS / f"{zlib.crc32(str(directory).encode()):08x}"


@contextmanager
def started(arguments: list[str], cwd: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def finish(process: subprocess.Popen[str], timeout_s: float) -> str:
    """Waits for the end and returns the output; says so if there is none."""
    output, _ = process.communicate(timeout=timeout_s)
    return output


def run_to_end(arguments: list[str], timeout_s: float = 100, cwd: Path = ROOT) -> tuple[int, str]:
    with started(arguments, cwd) as process:
        output = finish(process, timeout_s)
        return process.returncode, output


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def workers(process: subprocess.Popen[str]) -> Mapping[str, int]:
    """Worker -> pid, of those that live now."""
    found: dict[str, int] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:
            continue
        match = re.search(r"-m controllers\.worker (\S+)", line)
        if match:
            found[match.group(1)] = child.pid
    return found


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def trained_updates(run: Path) -> int:
    path = run / "events.jsonl"
    if not path.exists():
        return 0
    return max((event["update"] + 1 for event in events_so_far(path) if event["kind"] == "trained"), default=0)


def events_so_far(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a log that is still written."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
