"""Memory for what is copied out of segments, used again once nobody refers to what lay in it.

A fresh page costs several times the copy of its contents, and the allocator gives large pieces back to the system as
soon as they are free. Owns buffers; that arrays on them are alive it sees by their reference counts (CPython).
"""

from __future__ import annotations

import sys

import numpy as np

from transfer_queue.rows import Array

KEPT_BYTES = 64 << 20
SMALL_BYTES = 256 << 10
"""Below this the allocator does well by itself."""
_OVERSIZE = 2
_FREE = 3  # the list, the loop's name and the argument of getrefcount


class Buffers:
    def __init__(self) -> None:
        self._kept: list[Array] = []

    def take(self, num_bytes: int) -> Array:
        """uint8 (num_bytes,), of any contents."""
        if num_bytes < SMALL_BYTES:
            return np.empty(num_bytes, np.uint8)
        for buffer in self._kept:
            if num_bytes <= len(buffer) <= _OVERSIZE * num_bytes and sys.getrefcount(buffer) == _FREE:
                return buffer[:num_bytes]
        buffer = np.empty(num_bytes, np.uint8)
        self._kept.append(buffer)
        while len(self._kept) > 1 and sum(map(len, self._kept)) > KEPT_BYTES:
            del self._kept[0]
        return buffer[:]
