"""Runs the scenarios of `scenarios.py` as real processes, and leaves none behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_MARK = "CONTROLLERS_TEST_RUN"
_PRELOAD = "CONTROLLERS_TEST_PRELOAD"
_WORKERS = "scenario_workers controllers.executor"
Event = dict[str, Any]


class Run:
    """A scenario under way. `mark` is in the environment of every process that belongs to it."""

    def __init__(self, name: str, run_dir: Path, num_nodes: int, preload: str) -> None:
        self.run_dir = run_dir
        self.mark = uuid.uuid4().hex
        # Short, because sockets lie below it.
        self.session_root = Path("/dev/shm") / f"flowrl-test-{self.mark[:8]}"
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_nodes}", "--master-port=0", "--standalone"]
        script = [str(_HERE / "scenarios.py"), name, str(run_dir), str(self.session_root)]
        stderr = (run_dir / "stderr").open("w")
        self.popen = subprocess.Popen(
            [sys.executable, *(launcher if num_nodes > 1 else []), *script],
            env={**os.environ, _MARK: self.mark, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", _PRELOAD: preload},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        stderr.close()
        self.events: list[Event] = []

    def wait_for(self, *wanted: tuple[str, str]) -> None:
        """Reads on until each (worker, state) has come, in whatever order."""
        missing = set(wanted)
        assert self.popen.stdout is not None
        while missing:
            line = self.popen.stdout.readline()
            assert line, f"ended without {missing}:\n{self.describe()}"
            self.events.append(json.loads(line))
            missing.discard((self.events[-1].get("worker", ""), self.events[-1].get("state", "")))

    def finish(self) -> int:
        """Reads to the end; the exit code."""
        assert self.popen.stdout is not None
        self.events += [json.loads(line) for line in self.popen.stdout]
        return self.popen.wait()

    def texts(self, worker: str, state: str) -> list[str]:
        return [event["text"] for event in self.events if event.get("worker") == worker and event.get("state") == state]

    @property
    def end(self) -> Event:
        return next(event for event in self.events if "end" in event)

    def processes(self) -> list[psutil.Process]:
        """All that live, apart from the one that was started here."""
        others = (process for process in psutil.process_iter() if process.pid != self.popen.pid)
        return [process for process in others if self._is_marked(process)]

    def assert_nothing_left(self, within_s: float = 0.5) -> None:
        """No process, nothing in the parent of the session directories."""
        _, left = psutil.wait_procs(self.processes(), timeout=within_s)
        living = [process for process in left if not _is_dead(process)]
        assert not living, f"still alive: {living}"
        assert not list(self.session_root.iterdir())

    def describe(self) -> str:
        logs = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.run_dir.glob("logs/*.log"))
        return f"{self.events}\n{(self.run_dir / 'stderr').read_text()}\n{logs}"

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        shutil.rmtree(self.session_root, ignore_errors=True)

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self.mark
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start_run(name: str, num_nodes: int = 1, preload: str = _WORKERS) -> Run:
        """Workers are forked from a nursery, as those of a run on a CPU are, unless nothing is preloaded."""
        runs.append(Run(name, tmp_path, num_nodes, preload))
        return runs[-1]

    yield start_run
    for run in runs:
        run.close()


def _is_dead(process: psutil.Process) -> bool:
    """Gone, or waiting for a new parent that is busy to take note of it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
