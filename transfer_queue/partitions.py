"""One partition's groups: their numbers, where a key is found, what is to be reserved anew. Owns no rule."""

from __future__ import annotations

from collections import deque

from transfer_queue.errors import RowRefused
from transfer_queue.rows import RowKey
from transfer_queue.states import Group, Lane, Row


class Partition:
    """groups: those with rows that somebody still needs. again: (group, attempt, size), to be reserved before new
    ones."""

    def __init__(self, name: str, first_group: int, group_stride: int) -> None:
        self.name = name
        self.lanes: list[Lane] = []
        self.training: Lane | None = None
        self.group_size = 0
        self.next_group = first_group
        self.groups: dict[int, Group] = {}
        self.again: deque[tuple[int, int, int]] = deque()
        self._first_group = first_group
        self._group_stride = group_stride

    def next_number(self, group_size: int) -> tuple[int, int]:
        """(group, attempt): the first of this size that is to be reserved anew, or else the next number."""
        for position, (number, attempt, size) in enumerate(self.again):
            if size == group_size:
                del self.again[position]
                return number, attempt
        number = self.next_group
        self.next_group += self._group_stride
        return number, 0

    def reserve_anew(self, group: Group) -> None:
        self.again.append((group.number, group.attempt + 1, len(group.rows)))

    def find(self, key: RowKey) -> Row | None:
        """The row, or None if it is gone. Raises RowRefused for one that never was."""
        group = self.groups.get(key.group)
        if group is not None and group.attempt == key.attempt:
            if not 0 <= key.index < len(group.rows):
                raise RowRefused(f"keys: {key}; the group has {len(group.rows)} rows")
            row = group.rows[key.index]
            return row if row.pending else None
        is_ours = key.group >= self._first_group and (key.group - self._first_group) % self._group_stride == 0
        if not is_ours or key.group >= self.next_group or (group is not None and key.attempt > group.attempt):
            raise RowRefused(f"keys: {key} was never reserved here")
        return None

    def forget_if_finished(self, group: Group) -> None:
        if not any(row.pending for row in group.rows):
            del self.groups[group.number]
