"""`Sandbox`: runs a piece of Python that nobody has read, and says what became of it.

`full` isolation: a user, a root directory, a network, processes and a host name of its own, all of them gone at its
end; where the machine does not allow that, nothing runs. `limits`: the limits alone, in an empty directory. What is not
kept out in either: faults of the kernel itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.config.episodes import SandboxConfig

# Beyond what the code may take, to start and to clean up on a busy machine; then the launcher itself is killed.
LAUNCH_S = 20.0
# Root's untrusted code runs as a user that nobody else is: this number plus the number of the call.
FIRST_USER = 0x6F000000
NUM_USERS = 1 << 20

_SOURCES = Path(__file__).resolve().parents[2]
_LAUNCH = f"import sys; sys.path.insert(0, {str(_SOURCES)!r}); from flowrl.sandbox.launch import main; main()"


class SandboxUnavailable(RuntimeError):
    """This machine cannot isolate as asked. The message names the step that failed; no code has run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """exit_code: 0 for a program that ended well, 128 + signal for one that was killed. stdout, stderr: their first
    `output_kb`; cut_bytes: how much more there was."""

    exit_code: int
    timed_out: bool
    stdout: str
    stderr: str
    cut_bytes: int
    wall_s: float


class Sandbox:
    """Any number of calls at a time, of which `concurrency` run. `close` when done."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        for path in config.paths:
            if not Path(path).is_dir():
                raise ValueError(f"rollout.sandbox.paths: {path!r}; no such directory")
        self._num_calls = 0
        self._counting = threading.Lock()
        self._pool = ThreadPoolExecutor(config.concurrency or os.cpu_count() or 1, "sandbox")

    async def run(self, code: str) -> Outcome:
        """Raises SandboxUnavailable."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.run_blocking, code)

    def run_blocking(self, code: str) -> Outcome:
        """As `run`, in this thread and at once."""
        if self.config.isolation == "full":
            return self._launch(code, directory="")
        directory = tempfile.mkdtemp(prefix="flowrl-sandbox-")
        try:
            return self._launch(code, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def check(self) -> None:
        """Raises SandboxUnavailable if nothing can run here."""
        outcome = self.run_blocking("print(6 * 7)")
        if outcome.stdout != "42\n":
            raise SandboxUnavailable(f"a program of one line did not run: {outcome}")

    def close(self) -> None:
        """Waits for what runs; what waits does not run any more."""
        self._pool.shutdown(cancel_futures=True)

    def _launch(self, code: str, directory: str) -> Outcome:
        job = self._job(code, directory)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCH],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(json.dumps(job).encode(), self.config.wall_s + LAUNCH_S)
        except subprocess.TimeoutExpired:
            raise SandboxUnavailable(f"the launcher gave no report in {self.config.wall_s + LAUNCH_S} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return self._outcome(stdout, stderr, process.returncode)

    def _outcome(self, stdout: bytes, stderr: bytes, returncode: int) -> Outcome:
        if returncode or not stdout:
            said = stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"status {returncode}"]
            raise SandboxUnavailable(f"the launcher failed: {said[0]}")
        report: dict[str, Any] = json.loads(stdout)
        if "refused" in report:
            isolation = self.config.isolation
            hint = "give the run the right to make namespaces, or, for code that you trust, set it to 'limits'"
            raise SandboxUnavailable(
                f"rollout.sandbox.isolation: {isolation!r}; not possible here ({report['refused']})"
                + (f"; {hint}" if isolation == "full" else "")
            )
        return Outcome(**report)

    def _job(self, code: str, directory: str) -> dict[str, Any]:
        config = self.config
        with self._counting:
            self._num_calls += 1
            number = self._num_calls
        user = 0 if os.geteuid() else FIRST_USER + (os.getpid() * 4096 + number) % NUM_USERS
        if user and directory:
            os.chown(directory, user, user)
        return {
            "code": code,
            "isolation": config.isolation,
            "user": user,
            "wall_s": config.wall_s,
            "cpu_s": config.cpu_s,
            "memory_bytes": config.memory_mb << 20,
            "processes": config.processes + _num_own_tasks(config.isolation),
            "files_bytes": config.files_mb << 20,
            "output_bytes": config.output_kb << 10,
            "paths": config.paths,
            "python": sys.base_prefix,
            "directory": directory,
        }


def _num_own_tasks(isolation: str) -> int:
    """What the limit of processes already counts when the code starts: in namespaces its own init, and without
    namespaces, for a user who is not root, all that this user runs."""
    if isolation == "full" or os.geteuid() == 0:
        return 1
    number = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                number += len(os.listdir(f"/proc/{entry.name}/task"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return number + 1
