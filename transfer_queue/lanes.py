"""One consumer's view of its partition, its *lane*: which groups have something for it, in the order in which they are
taken, and what it has leased. Pure: time is an argument.

Entries of groups that have left the state meanwhile are skipped when they surface, so a take costs what it takes.
"""

from __future__ import annotations

import heapq
import itertools

from transfer_queue.config import ConsumerSpec
from transfer_queue.policies import OrderPolicy, ReadyGroup, deadline, order_policy
from transfer_queue.sampling import Basket
from transfer_queue.states import Group, Lease, Pick

Entry = tuple[float, int, int, int, Group]
"""(key, deadline, number, arrival, group)."""


class Lane:
    """pushes: how often something came. A lane that takes groups is shown one once all of it is ready; one that takes
    rows, as soon as any is. With an order that is not by deadline there is a second heap, for what the clock grants
    when it refuses the first choice."""

    def __init__(self, name: str, spec: ConsumerSpec, position: int) -> None:
        self.name = name
        self.spec = spec
        self.columns = frozenset(spec.columns)
        self.takes_groups = spec.takes_groups
        self.position = position
        self.pushes = 0
        self.redelivered = 0
        self.done = 0
        self.is_by_deadline = order_policy(spec.order) is deadline
        self._order: OrderPolicy = order_policy(spec.order)
        self._by_order: list[Entry] = []
        self._by_deadline: list[Entry] = []
        self._arrivals = itertools.count()
        self._leases: list[tuple[float, int, Lease]] = []
        self._num_leases = itertools.count()

    # What is ready

    def push(self, group: Group) -> None:
        """Some of its rows have become ready."""
        if self.push_back(group):
            self.pushes += 1

    def push_back(self, group: Group) -> bool:
        """Of one that was popped and refused by the clock: nothing new for those who wait."""
        if self.takes_groups and group.num_waiting(self.position):
            return False
        if group.progress[self.position].is_queued:
            return True
        group.progress[self.position].is_queued = True
        arrival = next(self._arrivals)
        place = (group.deadline, group.number, arrival, group)
        if self.is_by_deadline:
            heapq.heappush(self._by_order, (0.0, *place))
            return True
        described = ReadyGroup(
            partition=group.partition, group=group.number, attempt=group.attempt, version=group.version,
            deadline=group.deadline, num_rows=group.size, arrival=arrival,
        )  # fmt: skip
        heapq.heappush(self._by_order, (float(self._order(described)), *place))
        heapq.heappush(self._by_deadline, (0.0, *place))
        return True

    def pop(self, basket: Basket, by_deadline: bool = False) -> list[Pick]:
        """Ready rows, the first groups first, as many as the basket takes."""
        heap = self._by_deadline if by_deadline and not self.is_by_deadline else self._by_order
        picks = []
        while heap:
            group = heap[0][-1]
            progress = group.progress[self.position]
            ready = progress.ready & ~group.gone
            if not progress.is_queued or not ready or (self.takes_groups and group.num_waiting(self.position)):
                progress.is_queued = False
                heapq.heappop(heap)
                continue
            bits = basket.fill(group, ready, self.takes_groups)
            if not bits:
                break
            picks.append((group, bits))
            if bits != ready:
                break
            progress.is_queued = False
            heapq.heappop(heap)
        return picks

    # What is leased

    def add_lease(self, lease: Lease, ends_s: float) -> None:
        heapq.heappush(self._leases, (ends_s, next(self._num_leases), lease))

    def next_end(self) -> float | None:
        """When the earliest lease ends that still has rows."""
        while self._leases and not self._leases[0][-1].num_open:
            heapq.heappop(self._leases)
        return self._leases[0][0] if self._leases else None

    def pop_ended(self, now: float) -> Lease | None:
        ends_s = self.next_end()
        return heapq.heappop(self._leases)[-1] if ends_s is not None and ends_s <= now else None

    def take_back(self, holder: str) -> list[Lease]:
        """The leases of one client, which end now."""
        ended = [entry[-1] for entry in self._leases if entry[-1].holder == holder]
        self._leases = [entry for entry in self._leases if entry[-1].holder != holder]
        heapq.heapify(self._leases)
        return ended
