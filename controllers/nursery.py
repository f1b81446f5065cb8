"""Workers that start at once: a process that has imported what they need, and is forked for each.

    controller --(3 descriptors)--> nursery --fork--> midwife --fork--> worker
                                                      ends at once

The midwife's end makes the worker a child of the controller, which is the subreaper at that moment: it is waited for,
signalled and tied to its parent's death like one that the controller has started itself. The nursery has one thread,
touches no GPU, and dies with its controller. Workers on a GPU are never born here: CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import setproctitle

from controllers import worker

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 120.0
"""For the imports, on a machine that is busy with other things."""
_ADOPTION_S = 10.0
_MESSAGE_BYTES = 256


class Nursery:
    """The controller's end, for the main thread. modules: those whose workers are born here."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.modules = frozenset(modules)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_PATIENCE_S)
        with theirs:
            command = [sys.executable, "-m", "controllers.nursery", str(theirs.fileno()), str(os.getpid()), *modules]
            self._popen = subprocess.Popen(
                command,
                env={**environment, "SPT_NOENV": "1"},  # a worker's title goes where arguments were, not over these
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def bear(self, name: str, threads: int, spec_fd: int, lifeline_fd: int, log_fd: int) -> int | None:
        """A worker's process id, as soon as it is a child of this process. None if the nursery has failed: then it is
        closed, and workers must be started in another way."""
        if self._socket.fileno() < 0:
            return None
        _call_prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            socket.send_fds(self._socket, [f"{threads} {name}".encode()], [spec_fd, lifeline_fd, log_fd])
            answer = self._socket.recv(_MESSAGE_BYTES)
        except OSError:
            answer = b""
        finally:
            _call_prctl(_PR_SET_CHILD_SUBREAPER, 0)
        if not answer:
            self.close()
            return None
        return int(answer)

    def close(self) -> None:
        """May be called again. Workers live on."""
        self._socket.close()
        self._popen.kill()
        self._popen.wait()


def main(channel_fd: int, controller: int, modules: Sequence[str]) -> int:
    """In the nursery, and then in every worker: the exit code."""
    _call_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in modules:
        with contextlib.suppress(Exception):  # the worker that needs it will say so
            importlib.import_module(module)
    with socket.socket(fileno=channel_fd) as channel:
        while os.getppid() == controller:
            message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 3)
            if not message:
                break
            threads, _, name = message.decode().partition(" ")
            midwife = os.fork()
            if midwife == 0:
                if os.fork() != 0:
                    os._exit(0)
                return _live(name, int(threads), channel, controller, *descriptors)
            os.waitpid(midwife, 0)
            for descriptor in descriptors:
                os.close(descriptor)
    return 0


def _live(
    name: str, threads: int, channel: socket.socket, controller: int, spec_fd: int, lifeline_fd: int, log_fd: int
) -> int:
    """The new worker's first steps, to where a program of its own would begin."""
    os.setsid()
    setproctitle.setproctitle(f"{sys.executable} -m controllers.worker {name}")
    for descriptor in (1, 2):
        os.dup2(log_fd, descriptor)
    os.close(log_fd)
    _wait_for_parent(controller)
    channel.send(str(os.getpid()).encode())
    channel.close()
    worker.limit_threads(threads)
    _reseed()
    return worker.main(spec_fd, lifeline_fd)


def _wait_for_parent(controller: int) -> None:
    give_up_s = time.monotonic() + _ADOPTION_S
    while os.getppid() != controller:
        if time.monotonic() > give_up_s:
            os._exit(1)
        os.sched_yield()


def _reseed() -> None:
    """Global generators that would otherwise be the same in all workers."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _call_prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
