"""A buffer: a directory in the node's shared memory with one weights file, written to again for version after version.

Fresh pages cost more than what is written to them, so files are kept and reused; but never while somebody could read
them. That is the kernel's to say: it grants a write lease on a file only if nobody else has it open or mapped, and all
ranks of a node write through one open file, passed on to them over a socket (`lending.py`).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE: faults the pages in, all at once


class Blank(Protocol):
    """A file before any tensor is in it."""

    @property
    def file_name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def header(self) -> bytes: ...


class Buffer:
    """The writer's side. `path`: the directory, wherever it has been moved. `key`: tells it from others, for good."""

    def __init__(self, key: int, path: Path, blank: Blank, companions: Sequence[Path]) -> None:
        """Raises OSError naming the size if there is no room."""
        self.key = key
        self.path = path
        path.mkdir(parents=True)
        try:
            for source in companions:
                link(source, path / source.name)
            self.fd = create_file(path / blank.file_name, blank)
        except BaseException:
            shutil.rmtree(path)
            raise
        self.bytes = map_bytes(self.fd, [(0, blank.num_bytes)])

    def is_unread(self) -> bool:
        """Whether nobody else has the file open, mapped, or under another name. To be asked once its own name is
        hidden, for until then somebody may open it the moment after."""
        return os.fstat(self.fd).st_nlink == 1 and is_open_here_alone(self.fd)

    def is_pinned(self) -> bool:
        return os.fstat(self.fd).st_nlink > 1

    def move(self, path: Path) -> None:
        """By one rename; readers that have it open keep it."""
        self.path.rename(path)
        self.path = path

    def set_read_only(self, is_read_only: bool) -> None:
        os.fchmod(self.fd, 0o444 if is_read_only else 0o644)

    def drop(self) -> None:
        """Removes the directory. The file lives on as long as somebody has it, or a pin."""
        shutil.rmtree(self.path)
        self.close()

    def close(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self.fd)


def create_file(path: Path, blank: Blank) -> int:
    """An open descriptor of a new file with its header in place. Raises OSError naming the size if there is no room."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        # Allocated first: writing to a mapping of a file system that has run full would be a signal, not an error.
        os.posix_fallocate(fd, 0, blank.num_bytes)
        os.pwrite(fd, blank.header, 0)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.EFBIG):
            raise OSError(errno.ENOSPC, f"no room for {blank.num_bytes} bytes of weights", str(path.parent)) from error
        raise
    return fd


def map_bytes(fd: int, touched: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The file as uint8, mapped for writing; the ranges that will be written are faulted in at once."""
    mapped = mmap.mmap(fd, os.fstat(fd).st_size)
    for begin, end in touched:
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            mapped.madvise(_POPULATE_WRITE, first, end - first)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel before 5.14 faults page by page
                raise
    return torch.frombuffer(mapped, dtype=torch.uint8)


def is_open_here_alone(fd: int) -> bool:
    """Whether this is the only open file of its inode, mappings included."""
    # An opener that meets the lease makes the kernel signal its holder: with SIGIO, which kills, unless told otherwise.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def has_leases(directory: Path) -> bool:
    """Whether the file system of `directory` tells of readers; where it does not, no file is written twice."""
    probe = directory / f".probe-{os.getpid()}"
    fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with probe.open("rb"):
            notices = not is_open_here_alone(fd)
        return notices and is_open_here_alone(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
        probe.unlink()


def link(source: Path, target: Path) -> None:
    """A hard link lives on when the model directory goes; between file systems only a symbolic one is possible."""
    try:
        os.link(source, target)
    except OSError:
        os.symlink(source, target)
