"""The session directory: everything of a node's that must not outlive its run, on tmpfs, mode 0700.

Whoever removes it has removed everything: sockets, published weights. The owner holds a lock on a file in it; a
directory whose lock is free has no living owner, and the next start removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from controllers.reaper import OWNER_FILE
from controllers.topology import Topology

# A Unix socket's path must fit 108 bytes with its terminator; the margin is for names inside the directory.
_MAX_SOCKET_PATH = 100
_LONGEST_SOCKET_NAME = "control.socket.0000"


def default_root() -> Path:
    return Path("/dev/shm") / f"flowrl-{os.getuid()}"


class Session:
    """A context manager: the directory exists inside it. Raises ValueError for a place that cannot serve."""

    def __init__(self, root: Path, topology: Topology, needed_bytes: int = 0) -> None:
        # torchrun may start a controller again while the reaper of the one before still removes what that had.
        attempt = f"-r{topology.restart}" if topology.restart else ""
        self.path = root / f"{topology.run_id}{attempt}-n{topology.node}"
        self._root = root
        self._needed_bytes = needed_bytes
        socket_path = self.path / _LONGEST_SOCKET_NAME
        if len(os.fsencode(socket_path)) > _MAX_SOCKET_PATH:
            raise ValueError(
                f"run.session_dir: {root}; the path of a socket in it, {socket_path}, is longer than "
                f"{_MAX_SOCKET_PATH} bytes; name a shorter directory"
            )

    def __enter__(self) -> Session:
        # Held while directories come and go, so that none is seen between its making and its locking.
        with _made_and_locked(self._root):
            if self._root.stat().st_uid != os.getuid():
                raise ValueError(f"run.session_dir: {self._root} belongs to another user; name one of your own")
            remove_dead_sessions(self._root)
            if self.path.exists():
                raise ValueError(f"run id: {self.path} belongs to a run that is alive; give this run another id")
            self._refuse_little_space()
            self.path.mkdir(mode=0o700)
            self._owner = (self.path / OWNER_FILE).open("w")
            fcntl.flock(self._owner, fcntl.LOCK_EX)
            self._owner.write(f"{os.getpid()}\n")
            self._owner.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _made_and_locked(self._root):
            shutil.rmtree(self.path)
            self._owner.close()
            if self._root == default_root() and not any(self._root.iterdir()):
                self._root.rmdir()

    def endpoint(self, name: str) -> str:
        """A ZeroMQ endpoint in the directory."""
        assert len(name) <= len(_LONGEST_SOCKET_NAME), f"{name}: too long a name for a socket"
        return f"ipc://{self.path / name}"

    def _refuse_little_space(self) -> None:
        status = os.statvfs(self._root)
        free = status.f_bavail * status.f_frsize
        if free < self._needed_bytes:
            raise ValueError(
                f"run.session_dir: {self._root} has {free / 2**20:.0f} MiB free, and the run needs "
                f"{self._needed_bytes / 2**20:.0f} MiB; free some, name another directory, or keep less there "
                "(queue.byte_limit_mb, weights.buffers)"
            )


@contextmanager
def _made_and_locked(directory: Path) -> Iterator[None]:
    """Whoever leaves last removes the directory, so it may go between its making and its locking: then again."""
    while True:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                yield
                return
        finally:
            os.close(descriptor)


def remove_dead_sessions(root: Path) -> list[Path]:
    """Removes the directories whose owner is dead, and says which. The caller holds the lock on the root."""
    removed = []
    for path in sorted(root.iterdir()):
        if path.is_dir() and not _has_living_owner(path):
            shutil.rmtree(path)
            removed.append(path)
    return removed


def _has_living_owner(path: Path) -> bool:
    try:
        owner = (path / OWNER_FILE).open("r")
    except FileNotFoundError:
        return False
    with owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
