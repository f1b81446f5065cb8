"""Groups and leases: what the ledger keeps in memory. One method for each arrow of the state machine.

Rows of a group are bits of integers, so that what they do together costs as much as what one does. This file owns the
arrows; `ledger.py` owns the rules that say when an arrow is taken.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence

from transfer_queue.contents import Contents
from transfer_queue.errors import RowRefused
from transfer_queue.rows import RowKey
from transfer_queue.spans import Span, bits_between, ranges


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


GONE = (State.LOST, State.DROPPED, State.EXPIRED)
PENDING = (-1, -1)


class Progress:
    """A group's rows as one consumer has them: bits of those READY, LEASED and DONE; all others are RESERVED. lent:
    what each ordinary lease holds. is_queued: whether the consumer's lane has an entry for the group."""

    __slots__ = ("done", "is_queued", "leased", "lent", "ready")

    def __init__(self) -> None:
        self.ready = 0
        self.leased = 0
        self.done = 0
        self.lent: dict[Lease, int] = {}
        self.is_queued = False

    @property
    def begun(self) -> int:
        """Rows past RESERVED."""
        return self.ready | self.leased | self.done

    def state_of(self, index: int) -> State:
        bit = 1 << index
        if self.ready & bit:
            return State.READY
        if self.leased & bit:
            return State.LEASED
        return State.DONE if self.done & bit else State.RESERVED

    def become_ready(self, bits: int) -> None:
        assert not bits & self.begun, f"{bits:b} of {self.begun:b} are past RESERVED"
        self.ready |= bits

    def lend(self, bits: int, lease: Lease | None) -> None:
        """Leases of training have no end and belong to the group (`Group.claim`)."""
        assert not bits & ~self.ready, f"{bits:b} are not all READY: {self.ready:b}"
        self.ready ^= bits
        self.leased |= bits
        if lease is not None:
            self.lent[lease] = bits

    def lose_lease(self, bits: int) -> None:
        assert not bits & ~self.leased, f"{bits:b} are not all LEASED: {self.leased:b}"
        self.leased ^= bits
        self.ready |= bits
        self._settle(bits)

    def finish(self, bits: int) -> None:
        assert not bits & ~(self.ready | self.leased), f"{bits:b} are not all READY or LEASED"
        self.ready &= ~bits
        self.leased &= ~bits
        self.done |= bits
        self._settle(bits)

    def _settle(self, bits: int) -> None:
        for lease, held in list(self.lent.items()) if self.lent else ():
            if held & bits:
                left = held & ~bits
                if left:
                    self.lent[lease] = left
                else:
                    del self.lent[lease]
                    lease.num_open -= 1


class Group:
    """One prompt's rows. All of them count by the group's one deadline, that of its oldest token, because an update
    takes whole groups: with a deadline for each row, groups of mixed deadlines could block one another for good.

    have: which rows have which columns. filled: rows with any. gone: rows that no consumer needs any more.
    versions: of each row's oldest token. progress: for each consumer, by its lane's position. claim: the (incarnation,
    update) that holds it, or PENDING while the clock is asked; taker: the client that asked. doom: (end, reason) that
    befell it meanwhile."""

    __slots__ = (
        "all", "attempt", "born_s", "claim", "deadline", "doom", "filled", "gone", "have", "number", "partition",
        "producer", "progress", "row_bytes", "size", "taker", "version", "versions",
    )  # fmt: skip

    def __init__(
        self, partition: str, number: int, attempt: int, size: int, num_lanes: int, *, producer: str = "",
        version: int = 0, deadline: int = 0, row_bytes: int = 0, born_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.partition = partition
        self.number = number
        self.attempt = attempt
        self.size = size
        self.all = (1 << size) - 1
        self.producer = producer
        self.version = version
        self.deadline = deadline
        self.row_bytes = row_bytes
        self.born_s = born_s
        self.have = Contents()
        self.filled = 0
        self.gone = 0
        self.versions = [version] * size
        self.progress = [Progress() for _ in range(num_lanes)]
        self.claim: tuple[int, int] | None = None
        self.taker = ""
        self.doom: tuple[State, str] | None = None

    @property
    def identity(self) -> tuple[str, int, int]:
        return (self.partition, self.number, self.attempt)

    def num_waiting(self, lane: int) -> int:
        """Rows neither ready nor done for this consumer."""
        progress = self.progress[lane]
        return self.size - (progress.ready | progress.done).bit_count()

    def spans(self, bits: int) -> Iterable[Span]:
        if bits == self.all:
            return (Span(self.partition, self.number, self.attempt, 0, self.size),)
        return (Span(self.partition, self.number, self.attempt, first, end) for first, end in ranges(bits))

    def keys(self, bits: int) -> Iterator[RowKey]:
        return (key for span in self.spans(bits) for key in span.keys)

    def versions_of(self, bits: int) -> list[int]:
        if bits == self.all:
            return self.versions
        return [version for first, end in ranges(bits) for version in self.versions[first:end]]

    def check_versions(self, span: Span, fresh: int, versions: Sequence[int]) -> None:
        """Of rows that come, given as a span, those that are fresh. Raises RowRefused for one that is older than the
        group's reservation."""
        if min(versions) >= self.version:
            return
        for offset, version in enumerate(versions):
            if version < self.version and fresh >> (span.first + offset) & 1:
                key = RowKey(span.partition, span.group, span.first + offset, span.attempt)
                raise RowRefused(f"versions: {key} has {version}, reserved at {self.version}")

    def finish(self, lane: int, bits: int) -> int:
        """For one consumer; the rows that no consumer needs any more now."""
        self.progress[lane].finish(bits)
        ended = bits & ~self.gone
        for progress in self.progress:
            ended &= progress.done
        self.gone |= ended
        return ended

    def leave(self) -> int:
        """LOST, DROPPED or EXPIRED: whole, whatever its rows' states. The rows that were still needed."""
        ended = self.all & ~self.gone
        self.gone = self.all
        for progress in self.progress:
            progress._settle(self.all)
        return ended


class Lease:
    """What one take of an ordinary consumer got, for the client `holder`. num_open: groups of which it still holds
    rows; an old lease without any is forgotten long before it would end."""

    __slots__ = ("groups", "holder", "num_open")

    def __init__(self, groups: list[Group], holder: str) -> None:
        self.groups = groups
        self.holder = holder
        self.num_open = len(groups)


Pick = tuple[Group, int]
"""Rows of a group, as bits."""


def picked(group: Group, span: Span) -> Pick:
    return group, bits_between(span.first, span.end)


def num_rows(picks: Sequence[Pick]) -> int:
    return sum(bits.bit_count() for _, bits in picks)
