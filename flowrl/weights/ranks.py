"""What the ranks that publish together tell each other: who writes where, and whether everybody could. A few integers,
between hosts, never between devices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(minutes=5)
"""Of those that have connections of their own: a dead rank is noticed at once, this is for one that hangs."""


class Ranks:
    """The world that has been joined, or a single rank if none has. `_group`: the world's own, if None."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        is_joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_joined else 0
        self.size = dist.get_world_size() if is_joined else 1
        self._group = group

    def apart(self) -> Ranks:
        """On every rank: the same ranks, with connections of their own, so that what one thread says there may pass
        what another says elsewhere. To be closed. (Of all ranks: a group without some of them is, beside NCCL, a
        collective on those that are not in it.)"""
        return Ranks(dist.new_group(None, _TIMEOUT, "gloo") if self.size > 1 else None)

    def close(self) -> None:
        """Their own connections, if they have some."""
        if self._group is not None and dist.is_initialized():  # leaving the world ends all groups in it
            dist.destroy_process_group(self._group)
        self._group = None

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Those of every rank, all of one length."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self._group)
        return [theirs.tolist() for theirs in gathered]

    def gather_objects(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def agree(self, error: Exception | None, what: str) -> None:
        """On every rank: raises this rank's error, or one naming the ranks that have one."""
        failed = [rank for rank, (code,) in enumerate(self.gather_numbers([error is not None])) if code]
        raise_for(error, failed, what)


def raise_for(error: Exception | None, failed: Collection[int], what: str) -> None:
    """What this rank has to raise. error: its own; failed: the ranks that have one."""
    if error is not None:
        raise error
    if failed:
        raise WeightsError(f"{what}: ranks {list(failed)} could not; see their logs")


class WeightsError(RuntimeError):
    """A version could not be published; the one before it is in force."""
