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
    """`rank` is this one's among `members`, the ranks of the world that has been joined; a single one if none has."""

    def __init__(self, members: Sequence[int] | None = None, group: dist.ProcessGroup | None = None) -> None:
        is_joined = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if is_joined else 1
        self.members = list(range(world)) if members is None else list(members)
        self.size = len(self.members)
        mine = dist.get_rank() if is_joined else 0
        self.rank = self.members.index(mine) if mine in self.members else -1
        self._group = group

    def apart(self, members: Sequence[int] | None = None) -> Ranks:
        """On every rank of the world: some of them, or all, with connections of their own, so that what one thread says
        there may pass what another says elsewhere. To be closed."""
        members = self.members if members is None else members
        return Ranks(members, dist.new_group(members, _TIMEOUT, "gloo") if len(members) > 1 else None)

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
        raised = self.gather_numbers([error is not None])
        raise_for(error, [rank for rank, (code,) in zip(self.members, raised, strict=True) if code], what)

    def union(self, failed: Collection[int], num: int) -> list[int]:
        """Of what every rank gives, numbers below `num`, in order."""
        given = self.gather_numbers([number in failed for number in range(num)])
        return [number for number, said in enumerate(zip(*given, strict=True)) if any(said)]


def raise_for(error: Exception | None, failed: Collection[int], what: str) -> None:
    """What this rank has to raise. error: its own; failed: the ranks that have one."""
    if error is not None:
        raise error
    if failed:
        raise WeightsError(f"{what}: ranks {list(failed)} could not; see their logs")


class WeightsError(RuntimeError):
    """A version could not be published; the one before it is in force."""
