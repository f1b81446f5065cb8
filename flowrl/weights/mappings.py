"""Mappings of buffers that readers on the node keep, so that pages are not faulted in anew for each version.

    reader -> root/.readers: the number of a file it has opened by name -> the writer's own open file, to be mapped

A mapping of the writer's open file is not counted as a reader (`buffers.py`), so it may stay while the buffer is
written to again. Bytes may therefore be taken from it only while the file is also held open by name (`store.reading`),
which is what the writer asks the kernel about.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

NAME = ".readers"
TIMEOUT_S = 1.0
"""For what takes microseconds unless somebody is stopped. Who waited in vain reads the file without a mapping."""
_INODE = struct.Struct("<Q")

FindFile = Callable[[int], int | None]
"""The open descriptor of the buffer with that inode, if there is one."""


class MappingServer:
    """The writer's side: a thread that hands out its open files. `find` is called from it. (Should the file be closed
    the moment after and its number be another's, the reader will notice.)"""

    def __init__(self, root: Path, find: FindFile) -> None:
        self._find = find
        self._path = root / NAME
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with short_path(root, NAME) as address:
            self._listener.bind(address)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="weight-readers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or else the thread would wait for ever
        self._thread.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                reader, _ = self._listener.accept()
            except OSError:
                return
            with reader, suppress(OSError, struct.error):
                reader.settimeout(TIMEOUT_S)
                (inode,) = _INODE.unpack(reader.recv(_INODE.size))
                fd = self._find(inode)
                socket.send_fds(reader, [_INODE.pack(inode)], [] if fd is None else [fd])


_Identity = tuple[int, int]
"""Of a file: its device and its number there."""


class _Mapping:
    """Of the writer's open file, all of it in memory. It goes when nobody refers to it."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.fd = fd
        mapped = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        self.bytes = np.frombuffer(mapped, np.uint8)

    def __del__(self) -> None:
        os.close(self.fd)


class Mappings:
    """The reader's side; used from one thread. A file is mapped by a thread of its own, for the next time: that takes
    longer than to read it. Those of files that have no name any more are let go with the next version."""

    def __init__(self) -> None:
        self._kept: dict[_Identity, _Mapping] = {}
        self._new: queue.SimpleQueue[tuple[_Identity, _Mapping | None]] = queue.SimpleQueue()
        self._asked: set[_Identity] = set()

    def of(self, fd: int, directory: Path) -> np.ndarray | None:
        """The file's bytes, uint8, read-only: to be read only while `fd`, which was opened by name in a version's
        directory, is open. None the first time, and for a directory of no living writer."""
        self._settle()
        opened = os.fstat(fd)
        identity = (opened.st_dev, opened.st_ino)
        if identity in self._kept:
            return self._kept[identity].bytes
        if identity not in self._asked:
            self._asked.add(identity)
            arguments = (identity, directory.parent, self._new)
            threading.Thread(target=_map, args=arguments, name="weight-mapping", daemon=True).start()
        return None

    def _settle(self) -> None:
        """Takes what has been mapped, and lets go of what has gone."""
        while not self._new.empty():
            identity, mapping = self._new.get()
            self._asked.discard(identity)
            if mapping is not None:
                self._kept[identity] = mapping
        for identity, mapping in list(self._kept.items()):
            if not os.fstat(mapping.fd).st_nlink:
                del self._kept[identity]


def _map(identity: _Identity, root: Path, found: queue.SimpleQueue[tuple[_Identity, _Mapping | None]]) -> None:
    mapping = None
    fd = _ask(root, identity[1])
    if fd is not None:
        state = os.fstat(fd)
        if (state.st_dev, state.st_ino) != identity:
            os.close(fd)
        else:
            with suppress(OSError):  # then it is read, as before
                mapping = _Mapping(fd, state.st_size)
    found.put((identity, mapping))


def _ask(root: Path, inode: int) -> int | None:
    """The writer's open file."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.settimeout(TIMEOUT_S)
            with short_path(root, NAME) as address:
                asking.connect(address)
            asking.send(_INODE.pack(inode))
            _, fds, _, _ = socket.recv_fds(asking, _INODE.size, 1)
    except OSError:
        return None
    return fds[0] if fds else None


@contextmanager
def short_path(root: Path, name: str) -> Iterator[str]:
    """A socket's address has room for 107 characters; through a descriptor of the directory any path fits."""
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{name}"
    finally:
        os.close(directory)
