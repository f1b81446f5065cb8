"""A trainer rank's bytes of the newest version, flat, beside room for the next: what engines are given from.

    open -> (written) -> show          the newest is there to be held
            hold -> let_go             an engine is being given a version; nobody writes to it

Two buffers are enough for a trainer that never waits for an engine, because engines that hold something hold the same
version: rank 0 grants no other one meanwhile, and engines ask it first and leave it last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

_WAIT_S = 0.1
_WRITE_TIMEOUT_S = 120.0


@dataclass(eq=False)
class Staged:
    """bytes: uint8, the rank's stream. version: -1 while there is none. num_holds: engines that are being given it."""

    bytes: torch.Tensor
    version: int = -1
    num_holds: int = 0


class Staging:
    """num_bytes: of the stream. arbitrates: on rank 0. Usable from any thread, `open` and `show` from one."""

    def __init__(self, num_bytes: int, device: torch.device, arbitrates: bool) -> None:
        self._buffers = [Staged(torch.zeros(num_bytes, dtype=torch.uint8, device=device)) for _ in range(2)]
        self._arbitrates = arbitrates
        self._newest = -1
        self._changed = threading.Condition()

    def open(self) -> Staged:
        """The buffer to write the next version to; what was in it is there no more."""
        with self._changed:
            # Another rank's engine may be a message behind in letting go; never more than that.
            if not self._changed.wait_for(lambda: any(not one.num_holds for one in self._buffers), _WRITE_TIMEOUT_S):
                raise TimeoutError(f"weights: engines hold all buffers for {_WRITE_TIMEOUT_S:.0f} s")
            free = [one for one in self._buffers if not one.num_holds]
            chosen = min(free, key=lambda one: one.version)
            chosen.version = -1
            return chosen

    def show(self, staged: Staged, version: int) -> None:
        with self._changed:
            staged.version = self._newest = version
            self._changed.notify_all()

    def hold(self, version: int, is_over: Callable[[], bool]) -> Staged | None:
        """Waits for a version that has been announced and is on its way, and for engines with another one. None if a
        newer one has taken its place, or if it `is_over`."""
        with self._changed:
            while not is_over():
                found = next((one for one in self._buffers if one.version == version), None)
                if found is None and version <= self._newest:
                    return None
                others = any(one.num_holds for one in self._buffers if one is not found)
                if found is not None and not (self._arbitrates and others):
                    found.num_holds += 1
                    return found
                self._changed.wait(_WAIT_S)
            return None

    def let_go(self, staged: Staged) -> None:
        with self._changed:
            staged.num_holds -= 1
            self._changed.notify_all()

    def discard_newer_than(self, version: int) -> None:
        """They will be published anew."""
        with self._changed:
            for one in self._buffers:
                if one.version > version:
                    one.version = -1
            self._newest = max(one.version for one in self._buffers)
