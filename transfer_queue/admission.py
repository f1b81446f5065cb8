"""The producers' side of a shard: announce, reserve, put, and what becomes of a producer that is gone."""

from __future__ import annotations

from collections.abc import Sequence

from transfer_queue import frames, wire
from transfer_queue.core import Columns, Core
from transfer_queue.errors import DuplicateRow, RowRefused, WireError
from transfer_queue.ledger import Arrival
from transfer_queue.partitions import Partition
from transfer_queue.spans import Span, ranges
from transfer_queue.waiters import Waiter, patience

MAX_ROW_BYTES = 1 << 40


class Admission:
    def __init__(self, core: Core) -> None:
        self._core = core

    def announce(self, peer: bytes, request: wire.Announce, columns: Columns) -> wire.Message:
        self._core.versions[request.producer] = request.version
        self._core.room += 1
        return wire.Done(request.id, 1)

    def reserve(self, peer: bytes, request: wire.Reserve, columns: Columns) -> None:
        """Parks the request; `try_reserve` does the rest."""
        self._core.ledger.partition(request.partition)
        _check_range("group_size", request.group_size, 1, frames.MAX_ROWS)
        _check_range("num_groups", request.num_groups, 1, frames.MAX_ROWS // request.group_size)
        _check_range("row_bytes", request.row_bytes, 0, MAX_ROW_BYTES)
        self._core.waiters.add(Waiter(peer, request, self._core.now + patience(request)))

    def try_reserve(self, waiter: Waiter, request: wire.Reserve) -> None:
        """First memory, then the clock."""
        core = self._core
        partition = core.ledger.partition(request.partition)
        group_bytes = request.group_size * request.row_bytes
        num_groups = core.ledger.groups_in_room(
            request.group_size, group_bytes, request.num_groups, core.storage.num_bytes
        )
        if num_groups < 1:
            waiter.waits_for = "bytes"
        elif partition.training is None:
            self._reserved(waiter, request, num_groups, 0, 0)
        elif core.clock.batch_rows is None or core.clock.max_staleness is None:
            waiter.waits_for = "the clock's greeting"
        elif request.producer not in core.versions:
            waiter.waits_for = "an announced version"
        else:
            core.ledger.check_group_size(partition, request.group_size, core.clock.batch_rows, group_bytes)
            version = core.versions[request.producer]
            self._ask(waiter, request, partition, num_groups, version, version + core.clock.max_staleness)

    def _ask(
        self, waiter: Waiter, request: wire.Reserve, partition: Partition, num_groups: int, version: int, deadline: int
    ) -> None:
        """The memory is held while the clock is asked, so that nobody else is promised it."""
        core = self._core
        held_bytes = num_groups * request.group_size * request.row_bytes
        core.ledger.promised_bytes += held_bytes
        partition.group_size = request.group_size
        waiter.waits_for = core.clock.snapshot().refuses_by
        waiter.asking = True

        def admitted(groups: int) -> None:
            waiter.asking = False
            core.ledger.promised_bytes -= held_bytes
            if not groups:
                core.waiters.remind(waiter)
            elif waiter in core.waiters:
                self._reserved(waiter, request, groups, version, deadline)
            else:
                core.clock.retire([(deadline, groups * request.group_size)])

        core.clock.admit(deadline, request.group_size, num_groups, admitted)

    def _reserved(self, waiter: Waiter, request: wire.Reserve, num_groups: int, version: int, deadline: int) -> None:
        core = self._core
        groups = core.ledger.reserve(
            core.ledger.partition(request.partition),
            request.producer,
            num_groups,
            request.group_size,
            row_bytes=request.row_bytes,
            version=version,
            deadline=deadline,
            now=core.now,
        )
        for group in groups:
            core.log("reserved", group, producer=group.producer, version=version)
        core.has_overdue |= deadline < core.clock.snapshot().version
        reservations = [
            wire.Reservation(g.partition, g.number, g.attempt, g.size, g.version, g.deadline) for g in groups
        ]
        if not core.answer(waiter, wire.Reserved(request.id, reservations)):
            core.retired("lost", core.ledger.lose(groups, "undelivered"), producer=request.producer)

    def put(self, peer: bytes, request: wire.Put, columns: Columns) -> wire.Message:
        num_rows = sum(map(len, request.spans))
        if request.versions and len(request.versions) != num_rows:
            raise WireError(f"versions: {len(request.versions)} for {num_rows} rows")
        if request.placed is None:
            return self._put(request, num_rows, columns)
        frames.check_put_bytes(frames.num_bytes(request.placed), self._core.config.max_message_bytes)
        try:
            return self._put(request, num_rows, self._core.storage.open(request.placed, num_rows))
        finally:
            self._core.storage.end_put(request.placed)

    def _put(self, request: wire.Put, num_rows: int, columns: Columns) -> wire.Message:
        if not columns:
            raise WireError("columns: none; a put brings at least one")
        core = self._core
        names = list(columns)
        core.storage.check(columns)
        plan = core.ledger.plan_put(request.spans, names, request.versions)
        fresh = [(arrival, arrival.fresh) for arrival in plan if arrival.fresh]
        repeated = [(arrival, arrival.repeated) for arrival in plan if arrival.repeated]
        for same, start in _rows(repeated):
            mine = {name: column.slice(start, start + len(same)) for name, column in columns.items()}
            if not core.storage.holds(same, mine):
                raise DuplicateRow(f"{same}: {names} are there already, with other contents")
        core.storage.store(_rows(fresh), columns, request.placed)
        max_staleness = core.clock.max_staleness or 0
        moves = core.ledger.put(plan, names, request.versions, lambda version: version + max_staleness)
        if moves:
            core.clock.shift(moves)
        is_all_wanted = len(fresh) == len(plan) and sum(bits.bit_count() for _, bits in fresh) == num_rows
        unwanted = [] if is_all_wanted else _unwanted(plan)
        return wire.Stored(request.id, unwanted, core.storage.recycled(request.placed))

    def producer_lost(self, peer: bytes, request: wire.ProducerLost, columns: Columns) -> wire.Message:
        core = self._core
        core.versions.pop(request.producer, None)
        for waiter in core.waiters:
            if isinstance(waiter.request, wire.Reserve) and waiter.request.producer == request.producer:
                core.give_up(waiter)
        retired = core.ledger.producer_lost(request.producer)
        core.retired("lost", retired, producer=request.producer)
        return wire.Done(request.id, len(retired))


def _rows(picked: Sequence[tuple[Arrival, int]]) -> list[tuple[Span, int]]:
    """Some of the rows of a put, given as bits, with their positions in it."""
    rows = []
    for arrival, bits in picked:
        span = arrival.span
        if bits == span.bits:
            rows.append((span, arrival.position))
            continue
        for first, end in ranges(bits):
            rows.append((Span(*span.identity, first, end), arrival.position + first - span.first))
    return rows


def _unwanted(plan: Sequence[Arrival]) -> list[int]:
    gone = [(arrival, arrival.span.bits & ~(arrival.fresh | arrival.repeated)) for arrival in plan]
    return [start + offset for span, start in _rows(gone) for offset in range(len(span))]


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RowRefused(f"{name}: {value}; must be from {low} to {high}")
