"""Memory for what is copied out of segments, used again once nobody refers to what lay in it.

A fresh page costs several times the copy of its contents, and the allocator gives large pieces back to the system as
soon as they are free. Owns buffers; that arrays on them are alive it sees by their reference counts (CPython).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from transfer_queue.rows import SMALL_BYTES, Array

KEPT_BYTES = 64 << 20
_OVERSIZE = 2


class Buffers:
    def __init__(self) -> None:
        self._kept: list[Array] = []
        self._sizes: list[int] = []

    def take(self, num_bytes: int) -> Array:
        """uint8 (num_bytes,), of any contents."""
        if num_bytes < SMALL_BYTES:
            return np.empty(num_bytes, np.uint8)
        for at in range(len(self._kept) - 1, -1, -1):  # those taken last first, which may still be in a cache
            fits = num_bytes <= self._sizes[at] <= _OVERSIZE * num_bytes
            if fits and _references(self._kept, at) == _UNUSED:
                buffer = self._kept.pop(at)
                self._kept.append(buffer)
                self._sizes.append(self._sizes.pop(at))
                return buffer[:num_bytes]
        buffer = np.empty(num_bytes, np.uint8)
        self._kept.append(buffer)
        self._sizes.append(num_bytes)
        while len(self._kept) > 1 and sum(self._sizes) > KEPT_BYTES:
            del self._kept[0], self._sizes[0]
        return buffer[:]


def _references(buffers: Sequence[Array], at: int) -> int:
    return sys.getrefcount(buffers[at])


_UNUSED = _references([np.empty(0, np.uint8)], 0)
"""Of an array that its list alone refers to. Measured, because it differs between versions of Python."""
