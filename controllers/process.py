"""One worker process, seen from the controller: started or born, signalled, reaped. When and why is `supervisor.py`'s.

A worker leads a session and process group of its own, and its group is killed whenever it ends, so that nothing it
started outlives it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from controllers.messages import WorkerSpec
from controllers.nursery import Nursery
from controllers.placement import HOST_DEVICE, backing_device
from controllers.reaper import Reaper
from controllers.topology import without_torchrun
from controllers.worker import THREAD_VARIABLES

_TAIL_BYTES = 8192


class WorkerProcess:
    """pidfd: readable when the process has ended. Must be made in the thread that lives as long as the controller: the
    kernel's parent-death signal is tied to it."""

    def __init__(self, spec: WorkerSpec, log_path: Path, reaper: Reaper, nursery: Nursery | None = None) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        lifeline_read, self._lifeline = os.pipe()
        spec_fd = _memory_file(msgspec.json.encode(spec))
        self._popen: subprocess.Popen[bytes] | None = None
        with log_path.open("ab") as log:
            born = None
            if nursery is not None and _can_be_born(spec, nursery):
                born = nursery.bear(spec.name, spec.threads, spec_fd, lifeline_read, log.fileno())
            if born is None:
                self._popen = subprocess.Popen(
                    [sys.executable, "-m", "controllers.worker", spec.name, str(spec_fd), str(lifeline_read)],
                    env=environment(spec.threads),
                    pass_fds=(spec_fd, lifeline_read),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                born = self._popen.pid
        os.close(spec_fd)
        os.close(lifeline_read)
        self.pid = born
        self.pidfd = os.pidfd_open(self.pid)
        self._reaper = reaper
        reaper.watch(self.pid)

    def signal(self, signum: int) -> None:
        """To the worker alone."""
        os.kill(self.pid, signum)

    def signal_group(self, signum: int) -> None:
        """To the worker and all that it started. It has not been reaped, so the group's number is still its own."""
        os.killpg(self.pid, signum)

    def reap(self) -> int:
        """The exit code, negative for a signal. Call it once `pidfd` is readable."""
        self.signal_group(signal.SIGKILL)
        code = self._wait()
        self._reaper.forget(self.pid)
        os.close(self.pidfd)
        os.close(self._lifeline)
        return code

    def _wait(self) -> int:
        if self._popen is not None:
            return self._popen.wait()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _can_be_born(spec: WorkerSpec, nursery: Nursery) -> bool:
    is_on_host = all(backing_device(device) == HOST_DEVICE for device in spec.devices)
    return is_on_host and spec.target.partition(":")[0] in nursery.modules


def exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"


def log_tail(path: Path, num_lines: int) -> str:
    """The last lines of a log."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-num_lines:])


def _memory_file(content: bytes) -> int:
    """A descriptor to read `content` from: no size limit, unlike a pipe's, and no name."""
    descriptor = os.memfd_create("worker-spec")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def environment(threads: int) -> dict[str, str]:
    """Of a worker's process, or of a nursery's."""
    variables = without_torchrun(os.environ)
    variables.update({name: str(threads) for name in THREAD_VARIABLES})
    variables["PYTHONUNBUFFERED"] = "1"  # the last words of a killed worker are in its log
    # The worker finds modules where the controller does, wherever that was started. Directories of the interpreter
    # itself are left out, because a worker may start a server that has another interpreter.
    own = (sys.prefix, sys.base_prefix)
    paths = [os.path.abspath(entry) for entry in sys.path if not os.path.abspath(entry).startswith(own)]
    variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return variables
