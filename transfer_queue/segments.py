"""Segments: pieces of memory that payload lies in, mapped by every process of the node that writes or reads it.

    generation (uint64), zeros up to HEADER_BYTES | payload, written once a generation, front to back

A segment is a file, on tmpfs or on disk, or private memory where nobody else is to see it. Whoever makes one fills it;
the shard alone raises its generation, once nothing in it is live any more. A reader copies out first and looks at the
generation afterwards: if it has moved, what was copied may be torn. (Stores and loads must not be reordered by the
processor for this; x86-64 does not.) Segment files are named `writer.number` and no name is used twice.

Owns the files of one shard and their directory. What lies where in a segment is `writer.py`'s, what is live
`storage.py`'s.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np

from transfer_queue.errors import QueueError, WireError

HEADER_BYTES = 64
_NAME = re.compile(r"\d{1,9}\.\d{1,12}")
_LOCK, _TOKEN = "owner", "token"


class Segment:
    """`bytes`: uint8 (capacity,), header included. It lives as long as somebody holds an array on it."""

    __slots__ = ("_generation", "_lent", "bytes", "capacity", "memory", "name")

    def __init__(self, name: str, memory: mmap.mmap, capacity: int) -> None:
        self.name = name
        self.memory = memory
        self.capacity = capacity
        self.bytes = np.frombuffer(memory, np.uint8, capacity)
        self._generation = self.bytes[:8].view("<u8")
        self._lent: list[weakref.ref[np.ndarray]] = []

    def lend(self, array: np.ndarray) -> np.ndarray:
        """An array on the same bytes of this segment. Until it and all that is made of it are gone, the segment is
        lent, and must not be written to."""
        # Of a memoryview: what is made of a plain view of the segment would refer to that, and not to the view.
        lent = np.frombuffer(array.data, array.dtype)
        self._lent.append(weakref.ref(lent))
        return lent

    @property
    def is_lent(self) -> bool:
        self._lent = [view for view in self._lent if view() is not None]
        return bool(self._lent)

    @property
    def generation(self) -> int:
        return int(self._generation[0])

    def advance(self) -> None:
        """Whoever still reads will notice."""
        self._generation[0] += 1

    @property
    def writer(self) -> int:
        return int(self.name.partition(".")[0])


class PrivateSpace:
    """Memory of this process alone."""

    path = ""
    token = ""

    def __init__(self) -> None:
        self._segments: dict[str, Segment] = {}

    def create(self, name: str, capacity: int) -> Segment:
        segment = self._segments[name] = Segment(name, mmap.mmap(-1, capacity), capacity)
        return segment

    def open(self, name: str) -> Segment:
        if name not in self._segments:
            raise WireError(f"segment {name!r}: is not there; this shard keeps its rows in private memory")
        return self._segments[name]

    def names(self) -> list[str]:
        return list(self._segments)

    def remove(self, name: str) -> None:
        """Its memory goes with its last array."""
        del self._segments[name]

    def is_writer_alive(self, writer: int) -> bool:
        return True

    def close(self) -> None:
        """Nothing is left."""


class SharedSpace:
    """The directory of one shard's segments. The shard `make`s it; others `visit`."""

    def __init__(self, path: Path, token: str) -> None:
        self.path = str(path)
        self.token = token
        self._directory = path
        self._locks: list[int] = []
        self._is_kept = False

    @classmethod
    def make(cls, path: Path) -> SharedSpace:
        """A new directory, mode 0700, held by this process: `sweep` leaves it alone as long as the process lives."""
        hidden = path.with_name(f".{path.name}")
        hidden.mkdir(mode=0o700, parents=True)
        space = cls(path, secrets.token_hex(16))
        _hold(hidden / _LOCK, space._locks)
        (hidden / _TOKEN).write_text(space.token)
        hidden.rename(path)
        return space

    @classmethod
    def keep(cls, path: Path) -> SharedSpace:
        """A directory that outlives this process: the one that an earlier shard has left, or a new one. Raises
        ValueError if a living process has it."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        token_path = path / _TOKEN
        if not token_path.exists():
            token_path.write_text(secrets.token_hex(16))
        space = cls(path, token_path.read_text())
        try:
            _hold(path / _LOCK, space._locks)
        except BlockingIOError:
            raise ValueError(f"durable_dir: {path}; another shard is using it") from None
        space._is_kept = True
        return space

    @classmethod
    def visit(cls, path: str, token: str) -> SharedSpace | None:
        """The shard's directory, if this process sees the same one."""
        try:
            seen = (Path(path) / _TOKEN).read_text() if path else ""
        except OSError:
            return None
        return cls(Path(path), token) if token and seen == token else None

    def create(self, name: str, capacity: int) -> Segment:
        """All of its memory is there when this returns. Raises QueueError where there is no room for it."""
        path = self._directory / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise QueueError(f"segment {path}: {error.strerror}") from error
        try:
            os.posix_fallocate(fd, 0, capacity)
            memory = mmap.mmap(fd, capacity, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            path.unlink()
            raise QueueError(f"segment {path}: no room for {capacity} bytes: {error.strerror}") from error
        finally:
            os.close(fd)
        return Segment(name, memory, capacity)

    def open(self, name: str, is_reader: bool = False) -> Segment:
        """One that is there already. A reader cannot write to it. Raises WireError if it is not there."""
        if not _NAME.fullmatch(name):
            raise WireError(f"segment {name!r}: not a name of a segment")
        try:
            fd = os.open(self._directory / name, (os.O_RDONLY if is_reader else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise WireError(f"segment {name!r}: {error.strerror}") from error
        try:
            capacity = os.fstat(fd).st_size
            if capacity < HEADER_BYTES:
                raise WireError(f"segment {name!r}: has {capacity} bytes")
            rights = mmap.PROT_READ if is_reader else mmap.PROT_READ | mmap.PROT_WRITE
            memory = mmap.mmap(fd, capacity, flags=mmap.MAP_SHARED, prot=rights)
        finally:
            os.close(fd)
        return Segment(name, memory, capacity)

    def remove(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Of the segments that are there."""
        return [name for name in os.listdir(self._directory) if _NAME.fullmatch(name)]

    def enter_writer(self, writer: int) -> None:
        """Holds a lock that ends with this process, however it ends."""
        _hold(self._directory / f"writer-{writer}", self._locks)

    def leave_writer(self, writer: int) -> None:
        (self._directory / f"writer-{writer}").unlink(missing_ok=True)
        self.let_go()

    def is_writer_alive(self, writer: int) -> bool:
        return _is_held(self._directory / f"writer-{writer}")

    def close(self) -> None:
        """By its maker: everything is removed, unless it is to be kept."""
        if not self._is_kept:
            shutil.rmtree(self._directory, ignore_errors=True)
        self.let_go()

    def let_go(self) -> None:
        for fd in self._locks:
            os.close(fd)
        self._locks = []


def default_root() -> Path:
    """Where shards make their directories unless told otherwise: a place of this user's on tmpfs."""
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"transfer-queue-{os.getuid()}"


def sweep(root: Path) -> list[Path]:
    """Removes what shards that are dead have left under `root`; which directories."""
    swept = []
    for directory in root.iterdir() if root.is_dir() else ():
        is_being_made = directory.name.startswith(".")
        if not is_being_made and (directory / _LOCK).exists() and not _is_held(directory / _LOCK):
            shutil.rmtree(directory, ignore_errors=True)
            swept.append(directory)
    return swept


def check_room(root: Path, needed_bytes: int, setting: str) -> None:
    """Raises ValueError where a shard could not keep what its limit allows."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = os.statvfs(root)
    free = stat.f_bavail * stat.f_frsize
    if free < needed_bytes:
        raise ValueError(
            f"byte_limit: {needed_bytes >> 20} MiB; {root} has {free >> 20} MiB free. Lower byte_limit, or set "
            f"{setting} to a directory with more room"
        )


def _hold(path: Path, locks: list[int]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    locks.append(fd)


def _is_held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
