"""Versions that a relay holds open: as long as it does, nobody writes to their files again."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from flowrl.weights.slices import Slice
from flowrl.weights.store import WeightStore, reading, weights_file


class HeldVersions:
    """Of one node's store, for several users (other nodes) at a time. One version more is kept as the base of changes,
    the last that any of them has whole."""

    def __init__(self, store: WeightStore, keeps_base: bool) -> None:
        self._store = store
        self._keeps_base = keeps_base
        self._maps: dict[int, np.ndarray] = {}
        self._users: dict[int, int] = {}
        self._base = -1

    def hold(self, version: int, user: int) -> bool:
        """False if it is not there. What the user held before is let go."""
        self._users.pop(user, None)
        if version not in self._maps:
            path = self._store.path(version)
            try:
                self._maps[version] = _map(path)
            except FileNotFoundError:
                self._let_go()
                return False
        self._users[user] = version
        self._let_go()
        return True

    def done(self, version: int, user: int) -> None:
        """The user has it whole and needs it no longer."""
        self._users.pop(user, None)
        if self._keeps_base and version in self._maps:
            self._base = version
        self._let_go()

    def bytes_of(self, version: int, part: Slice) -> np.ndarray | None:
        """A copy if the slice is in several ranges; None if the version is not held."""
        held = self._maps.get(version)
        return None if held is None else gathered(held, part)

    def close(self) -> None:
        self._maps.clear()

    def _let_go(self) -> None:
        needed = {*self._users.values(), self._base}
        self._maps = {version: held for version, held in self._maps.items() if version in needed}


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


def _map(path: Path) -> np.ndarray:
    with reading(path), weights_file(path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, prot=mmap.PROT_READ)
    return np.frombuffer(mapped, np.uint8)
