"""One partition's groups: their numbers, where a key is found, what is to be reserved anew. Owns no rule."""

from __future__ import annotations

from collections import defaultdict, deque

from transfer_queue.cursor import Cursor
from transfer_queue.errors import RowRefused
from transfer_queue.lanes import Lane
from transfer_queue.spans import Span
from transfer_queue.states import PENDING, Group

GROUP_BYTES, ROW_BYTES = 1 << 10, 1 << 4


class Partition:
    """groups: those with rows that somebody still needs. again: (group, attempt) by size, to be reserved before new
    ones."""

    def __init__(
        self, name: str, first_group: int, group_stride: int, cursor: Cursor | None = None, first_attempt: int = 0
    ) -> None:
        """cursor: of what an earlier life has left open, which is reserved anew before new groups."""
        left, next_group = (cursor or Cursor()).open_groups(first_group, group_stride)
        self.name = name
        self.first_attempt = first_attempt
        self.lanes: list[Lane] = []
        self.training: Lane | None = None
        self.group_size = 0
        self.next_group = next_group
        self.groups: dict[int, Group] = {}
        self.ledger_bytes = 0
        size = cursor.group_size if cursor is not None else 0
        self.again: defaultdict[int, deque[tuple[int, int]]] = defaultdict(deque)
        self.again[size].extend((group, first_attempt) for group in left)
        self._first_group = first_group
        self._group_stride = group_stride

    def next_number(self, group_size: int) -> tuple[int, int]:
        """(group, attempt): the first of this size that is to be reserved anew, or else the next number."""
        lost = self.again.get(group_size)
        if lost:
            return lost.popleft()
        number = self.next_group
        self.next_group += self._group_stride
        return number, self.first_attempt

    def open_groups(self) -> list[int]:
        """Those that are neither done nor given up, as far as training is concerned."""
        live = (number for number, group in self.groups.items() if self.is_open(group))
        return sorted({*live, *(number for lost in self.again.values() for number, _ in lost)})

    def is_open(self, group: Group) -> bool:
        """Whether it is still to be done, as far as training is concerned."""
        return group.progress[self._training_lane].done != group.all

    @property
    def group_stride(self) -> int:
        return self._group_stride

    def unready_by(self, deadline: int) -> list[Group]:
        """Groups that are due by then, in no update, and not all ready for training; earliest first. Walks them all."""
        due = (group for group in self.groups.values() if group.deadline <= deadline and group.claim is None)
        at = self._training_lane
        return sorted(
            (group for group in due if group.num_waiting(at)), key=lambda group: (group.deadline, group.number)
        )

    def overdue_at(self, version: int) -> list[Group]:
        """Groups that no update took and none may take any more, PENDING ones among them. Walks them all."""
        due = (group for group in self.groups.values() if group.deadline < version and group.claim in (None, PENDING))
        return [group for group in due if self.is_open(group)]

    @property
    def _training_lane(self) -> int:
        return self.training.position if self.training is not None else 0

    def reserve_anew(self, group: Group) -> None:
        self.try_again(group.size, group.number, group.attempt + 1)

    def try_again(self, group_size: int, number: int, attempt: int) -> None:
        """A group of an earlier life is counted by this one: that one may have got further than this one knows."""
        self.again[group_size].append((number, max(attempt, self.first_attempt)))

    def find(self, span: Span) -> Group | None:
        """The group, or None if that attempt at it is gone. Raises RowRefused for rows that never were."""
        group = self.groups.get(span.group)
        if group is not None and group.attempt == span.attempt:
            if not 0 <= span.first < span.end <= group.size:
                raise RowRefused(f"keys: {span}; the group has {group.size} rows")
            return group
        is_ours = span.group >= self._first_group and (span.group - self._first_group) % self._group_stride == 0
        if not is_ours or span.group >= self.next_group or (group is not None and span.attempt > group.attempt):
            raise RowRefused(f"keys: {span} was never reserved here")
        return None

    def add(self, group: Group) -> None:
        self.groups[group.number] = group
        self.ledger_bytes += ledger_bytes(group.size)

    def remove(self, group: Group) -> None:
        del self.groups[group.number]
        self.ledger_bytes -= ledger_bytes(group.size)

    def forget_if_finished(self, group: Group) -> None:
        if group.gone == group.all:
            self.remove(group)


def ledger_bytes(group_size: int) -> int:
    """About what a group takes in the ledger."""
    return GROUP_BYTES + ROW_BYTES * group_size
