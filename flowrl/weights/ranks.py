"""What the ranks that publish together tell each other: who writes where, and whether everybody could. A few integers,
between hosts, never between devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The world that has been joined, or a single rank if none has."""

    def __init__(self) -> None:
        is_joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_joined else 0
        self.size = dist.get_world_size() if is_joined else 1

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Those of every rank, all of one length."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine)
        return [theirs.tolist() for theirs in gathered]

    def gather_objects(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, error: Exception | None, what: str) -> None:
        """On every rank: raises this rank's error, or one naming the ranks that have one."""
        failed = [rank for rank, (code,) in enumerate(self.gather_numbers([error is not None])) if code]
        if error is not None:
            raise error
        if failed:
            raise WeightsError(f"{what}: ranks {failed} could not; see their logs")


class WeightsError(RuntimeError):
    """A version could not be published; the one before it is in force."""
