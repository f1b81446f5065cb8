"""How far a node's ranks have got with the version that they are writing, for the node's relay, which gives to others
what is there already.

    root/.progress    for each rank of the node: the version, and the byte of the file before which all of its own are
                      written

Written and read by calls, in which the kernel keeps the order of what went before. A record that is met half written
says so by its third number, and counts as one of a version to come.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_NAME = ".progress"
_RECORD = struct.Struct("<qqq")
_SEAL = 0x5EA1
_TO_COME = 1 << 62


@dataclass(frozen=True)
class Followed:
    """What a node's relay is told, by the rank that publishes there, beside what is published. begun(version, path): it
    is being written to, in that directory. failed(version): it will not be published, nor written again under its
    number."""

    begun: Callable[[int, Path], None]
    failed: Callable[[int], None]


class Progress:
    """One rank's. root: of the node's store. place: of the rank among those of the node."""

    def __init__(self, root: Path, place: int) -> None:
        self._fd = os.open(root / _NAME, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._place = place
        self._version = -1
        self.begin(-1)

    def begin(self, version: int) -> None:
        """Before the first byte of a version is written."""
        self._version = version
        self.reach(0)

    def reach(self, offset: int) -> None:
        """All of this rank's bytes before that are in place."""
        record = _RECORD.pack(self._version, offset, self._version ^ offset ^ _SEAL)
        os.pwrite(self._fd, record, self._place * _RECORD.size)

    def close(self) -> None:
        os.close(self._fd)


class ProgressReader:
    """Of all ranks of the node."""

    def __init__(self, root: Path) -> None:
        self._path = root / _NAME
        self._fd: int | None = None

    def before(self, version: int) -> int:
        """The byte of the version's file before which all that the node's ranks write is there; 0 if one of them has
        not begun with it, or has gone on to another version."""
        return min((offset if found == version else 0 for found, offset in self._records()), default=0)

    def newest(self) -> int:
        """The newest version that any of them has begun with."""
        return max((found for found, _ in self._records()), default=-1)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _records(self) -> list[tuple[int, int]]:
        """(version, offset) of each rank."""
        if self._fd is None:
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return []
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        whole = len(data) // _RECORD.size * _RECORD.size
        return [
            (version, offset) if version ^ offset ^ _SEAL == seal else (_TO_COME, 0)
            for version, offset, seal in _RECORD.iter_unpack(data[:whole])
        ]
