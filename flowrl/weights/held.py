"""Versions that a relay holds open: as long as it does, nobody writes to their files again, once they are whole.

begun -> written                         whole
begun, held                              unsure: bytes are given as far as the ranks have come
begun -> failed, or another one begun    gone
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from flowrl.weights.progress import ProgressReader
from flowrl.weights.slices import Slice
from flowrl.weights.store import WeightStore, reading


class HeldVersions:
    """Of one node's store, for several users (other nodes) at a time. One version more is kept as the base of changes,
    the last that any of them has whole."""

    def __init__(self, store: WeightStore, keeps_base: bool) -> None:
        self._store = store
        self._keeps_base = keeps_base
        self._progress = ProgressReader(store.root)
        self._maps: dict[int, np.ndarray] = {}
        self._users: dict[int, int] = {}
        self._base = -1
        self._begun: tuple[int, Path] | None = None
        self._unsure: set[int] = set()

    def begun(self, version: int, path: Path) -> None:
        """The node's ranks write it, in the directory `path`. What they have neither shown before nor failed with is
        not to be had any more."""
        self._forget_unsure()
        self._begun = (version, path)

    def written(self, version: int) -> None:
        """It is whole."""
        self._unsure.discard(version)
        if self._begun is not None and self._begun[0] <= version:
            self._begun = None

    def failed(self) -> None:
        """The version begun last will not be whole."""
        self._forget_unsure()
        self._begun = None

    def hold(self, version: int, user: int) -> bool:
        """False if it is not there. What the user held before is let go."""
        self._users.pop(user, None)
        is_there = version in self._maps or self._map(version)
        if is_there:
            self._users[user] = version
        self._let_go()
        return is_there

    def done(self, version: int, user: int) -> None:
        """The user has it whole and needs it no longer."""
        self._users.pop(user, None)
        if self._keeps_base and version in self._maps:
            self._base = version
        self._let_go()

    def is_there(self, version: int) -> bool:
        return version in self._maps

    def bytes_of(self, version: int, part: Slice) -> np.ndarray | None:
        """Possibly a copy. None if the version is not held, or the slice not known to be in place."""
        held = self._maps.get(version)
        if held is None:
            return None
        if version not in self._unsure:
            return gathered(held, part)
        if not self._is_written(version, part):
            return None
        copied = np.array(gathered(held, part))
        # A version that is given up is written over. Whoever does that has gone on to another one.
        return copied if self._is_written(version, part) else None

    def close(self) -> None:
        self._maps.clear()
        self._progress.close()

    def _is_written(self, version: int, part: Slice) -> bool:
        return part.ranges[-1][1] <= self._progress.before(version)

    def _map(self, version: int) -> bool:
        """Of a version that is being written, which gets its name meanwhile, the directory is tried before the name."""
        paths = [self._store.path(version)]
        if self._begun is not None and self._begun[0] == version:
            paths = [paths[0], self._begun[1], paths[0]]
        for path in paths:
            try:
                mapped = _mapped(path)
            except FileNotFoundError:
                continue
            if path != paths[0]:
                if self._progress.newest() > version:
                    return False  # the directory may be another version's by now
                self._unsure.add(version)
            self._maps[version] = mapped
            return True
        return False

    def _forget_unsure(self) -> None:
        for version in self._unsure:
            self._maps.pop(version, None)
        self._unsure.clear()

    def _let_go(self) -> None:
        needed = {*self._users.values(), self._base}
        self._maps = {version: held for version, held in self._maps.items() if version in needed}
        self._unsure &= self._maps.keys()


def gathered(data: np.ndarray, part: Slice) -> np.ndarray:
    """The bytes of a slice, out of those of a file."""
    if len(part.ranges) == 1:
        begin, end = part.ranges[0]
        return data[begin:end]
    return np.concatenate([data[begin:end] for begin, end in part.ranges])


def scatter(data: np.ndarray, part: Slice, given: np.ndarray) -> None:
    """The reverse."""
    at = 0
    for begin, end in part.ranges:
        data[begin:end] = given[at : at + end - begin]
        at += end - begin


def _mapped(path: Path) -> np.ndarray:
    with reading(path) as (fd,):
        mapped = mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
    return np.frombuffer(mapped, np.uint8)
