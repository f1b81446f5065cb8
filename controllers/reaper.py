"""The last resort: a tiny process that outlives a killed controller just long enough to leave nothing behind.

A worker dies with its controller by itself (`worker.py`); what the worker had started in turn does not. The reaper
holds the numbers of the workers' process groups and, when the controller's end of its pipe closes, kills those
that are left and removes the session directory, unless a successor has it by now. The file imports the standard library
alone, to start at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_IN_ORDER = "0\n"
"""The controller has cleaned up by itself."""
OWNER_FILE = "owner"
"""In a session directory: locked by the controller that it belongs to, as long as that lives."""
DYING_S = 5.0


class Reaper:
    """The controller's end. `close` ends the process, which then does nothing."""

    def __init__(self, session_dir: Path) -> None:
        command = [sys.executable, "-I", "-S", __file__, str(session_dir)]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self._popen.stdin is not None
        self._pipe = self._popen.stdin

    def watch(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        self._tell(f"-{group}\n")

    def close(self) -> None:
        self._tell(_IN_ORDER)
        self._pipe.close()
        self._popen.wait()

    def _tell(self, line: str) -> None:
        self._pipe.write(line.encode())
        self._pipe.flush()


def main(session_dir: str) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        if line == _IN_ORDER:
            return
        change = groups.add if line[0] == "+" else groups.discard
        change(int(line[1:]))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
    root = os.path.dirname(session_dir)
    # A dying controller's pipe may be closed before its lock is free.
    until = time.monotonic() + DYING_S
    with contextlib.suppress(FileNotFoundError):
        while not remove_if_dead(root, session_dir) and time.monotonic() < until:
            time.sleep(0.02)
    if root == f"/dev/shm/flowrl-{os.getuid()}":
        with contextlib.suppress(OSError):  # other sessions are in it
            os.rmdir(root)


def remove_if_dead(root: str, session_dir: str) -> bool:
    """Under the lock that whoever makes or removes session directories holds. False if the owner lives."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.ExitStack() as opened:
            with contextlib.suppress(FileNotFoundError):
                owner = opened.enter_context(open(os.path.join(session_dir, OWNER_FILE)))
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(session_dir, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


if __name__ == "__main__":
    main(sys.argv[1])
