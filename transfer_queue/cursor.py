"""Which groups of a partition are still to be done: what a queue that begins anew has to know of its past. Pure.

Groups are done in no strict order, so a cursor is a number from which on none was ever reserved, and a list of those
below it that are open: reserved, ready or in an update that is not committed. All others are done, or given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

ATTEMPTS_A_LIFE = 1000
"""Keys are never used twice: in its k-th life a queue counts the attempts at every group from 1000·k on."""


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """group_size: rows of each group; 0 if none was reserved."""

    end: int = 0
    open: tuple[int, ...] = ()
    group_size: int = 0

    def without(self, groups: Iterable[int]) -> Cursor:
        """After these have been done too, some of which may have been reserved since. What was reserved beside them is
        open."""
        done = set(groups)
        end = max(self.end, max(done, default=-1) + 1)
        left = {*self.open, *range(self.end, end)} - done
        return msgspec.structs.replace(self, end=end, open=tuple(sorted(left)))

    def open_groups(self, first: int, stride: int) -> tuple[list[int], int]:
        """For the shard that owns groups first + stride·k: its open groups, and its next new one. The number of shards
        may differ from that of the past."""
        mine = [group for group in self.open if group >= first and (group - first) % stride == 0]
        return mine, max(first, self.end + (first - self.end) % stride)


def cursor_of(shards: Iterable[Mapping[str, Any]]) -> Cursor:
    """From what every shard tells of one partition (`introspect`). A shard may lag behind the others with its numbers;
    those that it has not come to are open too."""
    parts = list(shards)
    end = max(part["next_group"] for part in parts)
    open_groups = {group for part in parts for group in part["open"]}
    for part in parts:
        open_groups.update(range(part["next_group"], end, part["group_stride"]))
    sizes = {part["group_size"] for part in parts} - {0}
    assert len(sizes) <= 1, f"a partition has groups of one size, not of {sorted(sizes)}"
    return Cursor(end=end, open=tuple(sorted(open_groups)), group_size=max(sizes, default=0))
