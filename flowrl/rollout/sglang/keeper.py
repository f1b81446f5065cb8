"""Runs a program in a process group of its own, and leaves nothing of the group behind:

    python keeper.py PARENT_PID PROGRAM [ARGUMENT ...]

The group ends when the program ends, at SIGTERM (the program is asked first), and at once when the parent dies (the
kernel sends SIGHUP then) or sends SIGHUP itself. A program could tie itself to its parent, but not its children in the
moments before they have tied themselves to it. The program's temporary directory is its own and goes with it, and so
does the shared memory that SGLang leaves. The exit code is the program's, or 128 + the signal that ended it.

Run as a script, by path: it imports nothing of FlowRL and costs a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = {signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD}
_REMAINS_GRACE_S = 2.0
_SHARED_MEMORY = ("sglang_loads_", "sgl_shm_")


def main(parent: int, command: list[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    # Orphans of the group become children of this process, which can then wait for all of them.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        sys.exit(f"keeper: process {parent} ended before {command[0]} was started")
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="sglang-", ignore_cleanup_errors=True) as temporary:
        os.environ["TMPDIR"] = temporary
        program = _fork(command)
        code = _wait(program)
        _end_remains(program)
    _remove_shared_memory(started)
    return code


def _remove_shared_memory(since: float) -> None:
    """SGLang's segments made since then that no process has mapped: it names them by nothing that is known here."""
    left = [path for prefix in _SHARED_MEMORY for path in Path("/dev/shm").glob(f"{prefix}*")]
    held = "".join(_maps(process) for process in Path("/proc").glob("[0-9]*")) if left else ""
    for path in left:
        with suppress(FileNotFoundError, PermissionError):
            if str(path) not in held and path.stat().st_ctime >= since:
                path.unlink()


def _maps(process: Path) -> str:
    with suppress(OSError):
        return (process / "maps").read_text()
    return ""


def _fork(command: list[str]) -> int:
    program = os.fork()
    if program:
        with suppress(PermissionError, ProcessLookupError):  # it was faster
            os.setpgid(program, program)
        return program
    try:
        os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"keeper: {command[0]}: {error}", file=sys.stderr, flush=True)
    os._exit(127)


def _wait(program: int) -> int:
    """Passes signals on until the program has ended. Returns its exit code."""
    while True:
        signum = signal.sigwait(_SIGNALS)
        if signum == signal.SIGHUP:
            os.killpg(program, signal.SIGKILL)
        elif signum == signal.SIGTERM:
            os.kill(program, signal.SIGTERM)
        pid, status = os.waitpid(program, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _end_remains(group: int) -> None:
    """What the program started may put its own things away; whatever takes longer, or joins in, is killed."""
    deadline = time.monotonic() + _REMAINS_GRACE_S
    with suppress(ChildProcessError, ProcessLookupError):
        while True:
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
            signal_info = signal.sigtimedwait(_SIGNALS, max(0.0, deadline - time.monotonic()))
            if signal_info is None or signal_info.si_signo == signal.SIGHUP:
                os.killpg(group, signal.SIGKILL)
                deadline = time.monotonic() + _REMAINS_GRACE_S


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
