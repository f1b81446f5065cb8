"""How much one take gets, and how a batch is spread over ranks. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from transfer_queue.spans import lowest, ranges

T = TypeVar("T")


class Basket(Generic[T]):
    """Says of ready rows, in the order offered, how many still fit into one take: at most `max_rows` of them and, with
    a `cost`, at most `budget` of it. What comes first fits nevertheless if it is above the budget, because otherwise it
    would never be delivered."""

    def __init__(self, max_rows: int, budget: int = 0, cost: Callable[[T, int], int] | None = None) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: {max_rows}; must be at least 1")
        if cost is not None and budget < 1:
            raise ValueError(f"budget: {budget}; must be at least 1")
        self._room = max_rows
        self._budget = budget
        self._cost = cost
        self._is_empty = True

    def fill(self, group: T, bits: int, is_whole: bool) -> int:
        """The rows of the group that are in now, of those offered as bits; all or none if `is_whole`. If not all are,
        the take is complete."""
        if is_whole:
            return bits if self._accepts(group, bits) else 0
        if self._cost is None:
            taken = bits if bits.bit_count() <= self._room else lowest(bits, self._room)
            self._room -= taken.bit_count()
            return taken
        taken = 0
        for first, end in ranges(bits):
            for index in range(first, end):
                if not self._accepts(group, 1 << index):
                    return taken
                taken |= 1 << index
        return taken

    def _accepts(self, group: T, bits: int) -> bool:
        count = bits.bit_count()
        if count > self._room:
            if self._is_empty:
                raise ValueError(f"max_rows: {self._room}; a group of {count} rows is taken whole or not at all")
            return False
        if self._cost is not None:
            cost = self._cost(group, bits)
            if cost > self._budget and not self._is_empty:
                return False
            self._budget -= cost
        self._room -= count
        self._is_empty = False
        return True


def balanced_partition(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices for each rank, with sums of lengths as even as longest-first makes them (Graham 1969, at most 4/3 of the
    optimum). Indices of a rank are in ascending order."""
    if num_ranks < 1:
        raise ValueError(f"num_ranks: {num_ranks}; must be at least 1")
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, rank = heapq.heappop(loads)
        parts[rank].append(index)
        heapq.heappush(loads, (load + int(lengths[index]), rank))
    return [sorted(part) for part in parts]
