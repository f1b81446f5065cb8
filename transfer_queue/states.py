"""Rows, groups and lanes: what the ledger keeps in memory. One method for each arrow of the state machine.

A *lane* is one consumer's view of its partition: what is ready for it, what it has leased. This file owns the arrows
and the order of what is ready; `ledger.py` owns the rules that say when an arrow is taken.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections.abc import Callable, Sequence

from transfer_queue.config import ConsumerSpec
from transfer_queue.rows import RowKey


class State(enum.Enum):
    """Of one row for one consumer.

    RESERVED -> READY -> LEASED -> DONE
    LEASED -> READY    (the lease was lost, or the clock refused it)
    READY -> DONE      (acknowledged by one whose lease was lost meanwhile)
    RESERVED -> LOST   (its producer is gone; with it go the rows of its group that were ready)
    RESERVED, READY, LEASED -> DROPPED   (a consumer, or the staleness rule, gave the group up)
    READY -> EXPIRED   (its tokens belong to a future that a restarted trainer never had)
    """

    RESERVED = "reserved"
    READY = "ready"
    LEASED = "leased"
    DONE = "done"
    LOST = "lost"
    DROPPED = "dropped"
    EXPIRED = "expired"


Accepts = Callable[[Sequence["Row"]], bool]
"""Whether a unit still fits into a take."""

GONE = (State.LOST, State.DROPPED, State.EXPIRED)


class Row:
    """have: bits of the columns that are there. states, leases: one entry a lane of its partition, by position."""

    __slots__ = ("group", "have", "key", "leases", "num_bytes", "pending", "states", "version")

    def __init__(self, key: RowKey, group: Group, num_lanes: int, num_bytes: int) -> None:
        self.key = key
        self.group = group
        self.have = 0
        self.version = group.version
        self.states = [State.RESERVED] * num_lanes
        self.leases: list[Lease | None] = [None] * num_lanes
        self.pending = num_lanes
        self.num_bytes = num_bytes

    def become_ready(self, lane: int) -> None:
        assert self.states[lane] is State.RESERVED, f"{self.key} is {self.states[lane]}"
        self.states[lane] = State.READY

    def lend(self, lane: int, lease: Lease | None) -> None:
        """Leases of training have no end and belong to the group (`Group.claim`)."""
        assert self.states[lane] is State.READY, f"{self.key} is {self.states[lane]}"
        self.states[lane] = State.LEASED
        self.leases[lane] = lease

    def lose_lease(self, lane: int) -> None:
        assert self.states[lane] is State.LEASED, f"{self.key} is {self.states[lane]}"
        self.states[lane] = State.READY

    def finish(self, lane: int) -> bool:
        """True if this was the last consumer."""
        assert self.states[lane] in (State.LEASED, State.READY), f"{self.key} is {self.states[lane]}"
        self.states[lane] = State.DONE
        lease = self.leases[lane]
        if lease is not None:
            lease.settle()
        self.pending -= 1
        return self.pending == 0

    def leave(self, end: State) -> None:
        """LOST, DROPPED or EXPIRED, for every consumer that is not done."""
        assert end in GONE, f"{end} is not an end"
        self.states = [state if state is State.DONE else end for state in self.states]
        self.pending = 0


class Group:
    """One prompt's rows. All of them count by the group's one deadline, that of its oldest token, because an update
    takes whole groups: with a deadline for each row, groups of mixed deadlines could block one another for good.

    empty: rows without their first put. waiting: for each lane, rows neither ready nor done. claim: the (incarnation,
    update) that holds it, or PENDING while the clock is asked. doom: (end, reason) that befell it meanwhile."""

    __slots__ = (
        "attempt", "born_s", "claim", "deadline", "doom", "empty", "number", "partition", "producer", "rows", "version",
        "waiting",
    )  # fmt: skip

    def __init__(self, partition: str, number: int, attempt: int, producer: str, version: int, deadline: int) -> None:
        self.partition = partition
        self.number = number
        self.attempt = attempt
        self.producer = producer
        self.version = version
        self.deadline = deadline
        self.born_s = 0.0
        self.rows: list[Row] = []
        self.empty = 0
        self.waiting: list[int] = []
        self.claim: tuple[int, int] | None = None
        self.doom: tuple[State, str] | None = None


PENDING = (-1, -1)


class Lease:
    """Rows that one take of an ordinary consumer got. Lets go of them once all are done, long before it would end."""

    __slots__ = ("open", "rows")

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.open = len(rows)

    def settle(self) -> None:
        self.open -= 1
        if self.open == 0:
            self.rows = []


class Lane:
    """Ready units in the order (deadline, group, index), and the leases by when they end. Entries of rows that have
    left the state meanwhile are skipped when they surface, so a take costs what it takes. pushes: how often one
    came."""

    def __init__(self, name: str, spec: ConsumerSpec, position: int) -> None:
        self.name = name
        self.spec = spec
        self.position = position
        self.need = 0
        self.pushes = 0
        self.redelivered = 0
        self.done = 0
        self._ready: list[tuple[int, int, int, int, Row | Group]] = []
        self._leases: list[tuple[float, int, Lease]] = []
        self._num_leases = itertools.count()

    def push(self, unit: Row | Group) -> None:
        self.push_back(unit)
        self.pushes += 1

    def push_back(self, unit: Row | Group) -> None:
        """Of one that was popped and refused by the clock: nothing new for those who wait."""
        group, index = (unit, -1) if isinstance(unit, Group) else (unit.group, unit.key.index)
        heapq.heappush(self._ready, (group.deadline, group.number, index, group.attempt, unit))

    def pop(self, accepts: Accepts) -> list[tuple[Row | Group, list[Row]]]:
        """Units with the rows of theirs that are ready, earliest deadline first, as long as they are accepted."""
        units = []
        while self._ready:
            unit = self._ready[0][-1]
            rows = [row for row in self.rows_of(unit) if row.states[self.position] is State.READY]
            if rows and not accepts(rows):
                break
            heapq.heappop(self._ready)
            if rows:
                units.append((unit, rows))
        return units

    @staticmethod
    def rows_of(unit: Row | Group) -> list[Row]:
        return unit.rows if isinstance(unit, Group) else [unit]

    def add_lease(self, lease: Lease, ends_s: float) -> None:
        heapq.heappush(self._leases, (ends_s, next(self._num_leases), lease))

    def next_end(self) -> float | None:
        """When the earliest lease ends that still has rows."""
        while self._leases and not self._leases[0][-1].rows:
            heapq.heappop(self._leases)
        return self._leases[0][0] if self._leases else None

    def pop_ended(self, now: float) -> Lease | None:
        ends_s = self.next_end()
        return heapq.heappop(self._leases)[-1] if ends_s is not None and ends_s <= now else None
