"""Which rows exist, which columns they have, who has taken them. Pure: no sockets, no payload; time is an argument.

The ledger knows every row's state for every consumer (`states.State`) and takes the arrows. It does not know whether
the staleness rule admits a group or a claim: the caller asks a `Clock` first, and tells it what `put` and the ends
return. What is taken for training is in `updates.py`. The ledger holds no payload: `freed` names the rows whose payload
may go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from transfer_queue.config import MAX_COLUMNS, ConsumerSpec
from transfer_queue.contents import KnownNames
from transfer_queue.cursor import Cursor
from transfer_queue.errors import RowRefused
from transfer_queue.lanes import Lane
from transfer_queue.partitions import Partition, ledger_bytes
from transfer_queue.sampling import Basket
from transfer_queue.spans import Span, ranges
from transfer_queue.states import PENDING, Group, Lease, Pick, State


class Retired(NamedTuple):
    """A group that left for good. rows: what returns to the staleness account (0 if its partition has none)."""

    group: Group
    rows: int


class Arrival(NamedTuple):
    """One span of a put. position: of its first row in the put. fresh rows get the columns, repeated ones have them,
    and must have them alike; all others are gone and their contents are ignored. group: None if it is gone."""

    span: Span
    position: int
    group: Group | None
    fresh: int
    repeated: int


class Ledger:
    def __init__(
        self,
        consumers: Mapping[str, ConsumerSpec],
        *,
        first_group: int = 0,
        group_stride: int = 1,
        byte_limit: int = 4 << 30,
        lease_s: float = 600.0,
        max_attempts: int = 3,
        cursors: Mapping[str, Cursor] | None = None,
        first_attempt: int = 0,
    ) -> None:
        self.group_stride = group_stride
        self.byte_limit = byte_limit
        self.lease_s = lease_s
        self.max_attempts = max_attempts
        self.promised_bytes = 0
        self.puts = 0
        self.freed: list[Pick] = []
        self.touched: dict[tuple[str, int, int], Group] | None = None
        """Groups that have changed, if somebody wants to know."""
        self.ended: Counter[str] = Counter()
        self._columns: set[str] = set()
        self._names = KnownNames()
        self.partitions: dict[str, Partition] = {}
        self.lanes: dict[str, Lane] = {}
        for name, spec in consumers.items():
            cursor = (cursors or {}).get(spec.partition)
            new = Partition(spec.partition, first_group, group_stride, cursor, first_attempt)
            partition = self.partitions.setdefault(spec.partition, new)
            lane = Lane(name, spec, len(partition.lanes))
            self.check_columns((*spec.columns, *spec.optional))
            partition.lanes.append(lane)
            self.lanes[name] = lane
            if spec.training:
                partition.training = lane

    # Reserving: nothing -> RESERVED

    def groups_in_room(self, group_size: int, group_bytes: int, num_groups: int, stored_bytes: int) -> int:
        """How many of the groups fit under the byte limit, beside what is promised, or what is there if that is more.
        What the ledger itself keeps of groups is held under that limit too, apart, so that rows that promise no bytes
        cannot fill the memory."""
        if group_bytes > self.byte_limit:
            raise RowRefused(f"row_bytes: a group of {group_bytes} bytes; byte_limit is {self.byte_limit}")
        if ledger_bytes(group_size) > self.byte_limit:
            raise RowRefused(f"group_size: {group_size}; the ledger alone would need more than {self.byte_limit} bytes")
        free = self.byte_limit - max(self.promised_bytes, stored_bytes)
        kept = self.byte_limit - sum(partition.ledger_bytes for partition in self.partitions.values())
        return max(0, min(num_groups, free // max(1, group_bytes), kept // ledger_bytes(group_size)))

    def check_group_size(self, partition: Partition, group_size: int, batch_rows: int, group_bytes: int) -> None:
        """Where there is a clock, an update is a whole number of equal groups; else its last one would never fit."""
        if batch_rows % group_size:
            raise RowRefused(f"group_size: {group_size}; must divide the {batch_rows} rows of an update")
        if partition.group_size not in (0, group_size):
            raise RowRefused(f"group_size: {group_size}; partition {partition.name!r} has {partition.group_size}")
        if self.group_stride == 1 and group_bytes * batch_rows // group_size > self.byte_limit:
            raise RowRefused(f"row_bytes: an update needs more than byte_limit, {self.byte_limit}")

    def reserve(
        self,
        partition: Partition,
        producer: str,
        num_groups: int,
        group_size: int,
        *,
        row_bytes: int = 0,
        version: int = 0,
        deadline: int = 0,
        now: float = 0.0,
    ) -> list[Group]:
        """Groups that were lost or dropped come back first, then the next numbers of this shard."""
        partition.group_size = group_size
        groups = []
        for _ in range(num_groups):
            number, attempt = partition.next_number(group_size)
            group = Group(
                partition.name, number, attempt, group_size, len(partition.lanes),
                producer=producer, version=version, deadline=deadline, row_bytes=row_bytes, born_s=now,
            )  # fmt: skip
            partition.add(group)
            groups.append(group)
            self.touch(group)
        self.promised_bytes += num_groups * group_size * row_bytes
        return groups

    # Putting: RESERVED -> READY

    def plan_put(self, spans: Sequence[Span], columns: Sequence[str], versions: Sequence[int]) -> list[Arrival]:
        """Sorts the rows and refuses what must be refused; changes nothing."""
        self.check_columns(columns)
        names = self._names.of(columns)
        plan, seen, end = [], dict[Group, int](), 0
        for span in spans:
            group = self.partition(span.partition).find(span)
            rows = span.bits
            position, end = end, end + rows.bit_count()
            if group is None:
                plan.append(Arrival(span, position, None, 0, 0))
                continue
            fresh, every = rows & ~group.gone, 0
            if fresh & group.filled:
                some = group.have.with_any(names) & fresh
                every = group.have.with_all(names) & fresh if some else 0
                if some != every:
                    rule = "a put adds columns, all or none"
                    raise RowRefused(f"{span}: some of {list(columns)} are there already; {rule}")
                fresh ^= some
            before = seen.get(group, 0)
            if before & rows:
                raise RowRefused("keys: the same row twice in one put")
            seen[group] = before | rows
            if versions:
                group.check_versions(span, fresh, versions[position:end])
            plan.append(Arrival(span, position, group, fresh, every))
        return plan

    def put(
        self,
        plan: Sequence[Arrival],
        columns: Sequence[str],
        versions: Sequence[int],
        deadline_of: Callable[[int], int],
    ) -> list[tuple[int, int, int]]:
        """Adds the columns to the fresh rows. Returns the (old, new, rows) by which deadlines moved."""
        self.puts += 1
        names = self._names.of(columns)
        moves = []
        for span, position, group, fresh, _ in plan:
            if group is None or not fresh:
                continue
            for first, end in ranges(fresh) if versions else ():
                start = position + first - span.first
                group.versions[first:end] = versions[start : start + end - first]
            group.have.add(names, fresh)
            if fresh & ~group.filled:
                group.filled |= fresh
                if group.filled == group.all and (move := self._settle_deadline(group, deadline_of)) is not None:
                    moves.append(move)
        for arrival in plan:
            if arrival.group is not None and arrival.fresh:
                self._offer(arrival.group)
                self.touch(arrival.group)
        return moves

    def _settle_deadline(self, group: Group, deadline_of: Callable[[int], int]) -> tuple[int, int, int] | None:
        """All of its tokens are there, so the oldest is known."""
        if self.partitions[group.partition].training is None:
            return None
        old, group.deadline = group.deadline, deadline_of(min(group.versions))
        return (old, group.deadline, group.size) if group.deadline != old else None

    def _offer(self, group: Group) -> None:
        """Makes rows ready for the consumers whose columns are complete now."""
        for lane in self.partitions[group.partition].lanes:
            progress = group.progress[lane.position]
            ready = group.have.with_all(lane.columns) & ~(progress.begun | group.gone)
            if ready:
                progress.become_ready(ready)
                lane.push(group)

    # Ordinary leases: READY -> LEASED -> DONE, LEASED -> READY

    def lease(self, lane: Lane, basket: Basket[Group], now: float, holder: str = "") -> list[Pick]:
        """Ready rows, in the consumer's order, as many as the basket takes."""
        picks = lane.pop(basket)
        if picks:
            lease = Lease([group for group, _ in picks], holder)
            for group, bits in picks:
                group.progress[lane.position].lend(bits, lease)
            lane.add_lease(lease, now + self.lease_s)
        return picks

    def lose_leases(self, now: float) -> int:
        """Rows whose lease has ended are ready again; how many."""
        lost = 0
        for lane in self.lanes.values():
            while (lease := lane.pop_ended(now)) is not None:
                lost += self._end_lease(lane, lease)
        return lost

    def lose_holder(self, holder: str) -> int:
        """A client is gone: what it has leased is ready again; how many rows."""
        return sum(self._end_lease(lane, lease) for lane in self.lanes.values() for lease in lane.take_back(holder))

    def _end_lease(self, lane: Lane, lease: Lease) -> int:
        held = [(group, group.progress[lane.position].lent.get(lease, 0)) for group in lease.groups]
        return self.return_rows(lane, [(group, bits) for group, bits in held if bits])

    def return_rows(self, lane: Lane, picks: Sequence[Pick]) -> int:
        """LEASED -> READY for those of the rows that are not done; how many."""
        returned = 0
        for group, bits in picks:
            progress = group.progress[lane.position]
            bits &= progress.leased & ~group.gone
            if bits:
                progress.lose_lease(bits)
                lane.push(group)
                returned += bits.bit_count()
        lane.redelivered += returned
        return returned

    def next_end(self) -> float | None:
        """When the next lease ends."""
        return min((end for lane in self.lanes.values() if (end := lane.next_end()) is not None), default=None)

    def ack(self, lane: Lane, spans: Sequence[Span]) -> int:
        """Finishes leased rows, also those whose lease was lost meanwhile; how many were not finished before."""
        if lane.spec.training:
            raise RowRefused(f"consumer: {lane.name!r} is training; it commits")
        picks = self.find(spans)
        for group, bits in picks:
            never = bits & ~group.progress[lane.position].begun
            if never:
                raise RowRefused(f"keys: {next(group.keys(never))} was never ready for {lane.name!r}")
        count = 0
        for group, bits in picks:
            bits &= ~group.progress[lane.position].done
            self.finish(lane, group, bits)
            count += bits.bit_count()
        return count

    def finish(self, lane: Lane, group: Group, bits: int) -> None:
        lane.done += bits.bit_count()
        self.touch(group)
        ended = group.finish(lane.position, bits)
        if ended:
            self._free(group, ended)
            self.partitions[group.partition].forget_if_finished(group)
        if lane.takes_groups and group.progress[lane.position].ready:
            lane.push(group)

    # Ends: LOST, DROPPED

    def drop(self, spans: Sequence[Span], reason: str, again: bool = False) -> list[Retired]:
        """The groups of these rows, whole: an update is made of whole ones. Those in an update stay. again: their
        prompts are tried again, up to `max_attempts` times."""
        retired = self.end(self.groups_of(spans), State.DROPPED, reason)
        if again:
            self._try_again(retired)
        return retired

    def drop_late(self, groups: Sequence[Group]) -> list[Retired]:
        """They keep ready ones waiting. Their prompts are tried again, up to `max_attempts` times."""
        return self._drop_for_now(groups, "late")

    def drop_overdue(self, groups: Sequence[Group]) -> list[Retired]:
        """Those of them that are not PENDING; their prompts are tried again, up to `max_attempts` times."""
        return self._drop_for_now([group for group in groups if group.claim is None], "surplus")

    def _drop_for_now(self, groups: Sequence[Group], reason: str) -> list[Retired]:
        retired = self.end(groups, State.DROPPED, reason)
        self._try_again(retired)
        return retired

    def _try_again(self, retired: Sequence[Retired]) -> None:
        for group, _ in retired:
            partition = self.partitions[group.partition]
            if group.attempt - partition.first_attempt + 1 < self.max_attempts:
                partition.reserve_anew(group)
            else:
                self.ended["attempts_exhausted"] += group.size

    def producer_lost(self, producer: str) -> list[Retired]:
        """Its unfinished groups are LOST, whole, and reserved anew, earliest number first."""
        unfinished = [
            group
            for partition in self.partitions.values()
            for group in partition.groups.values()
            if group.producer == producer and group.filled != group.all
        ]
        return self.lose(sorted(unfinished, key=lambda group: group.number), "producer_lost")

    def lose(self, groups: Sequence[Group], reason: str) -> list[Retired]:
        """Groups that nobody works on any more are LOST and reserved anew."""
        retired = self.end(groups, State.LOST, reason)
        for group, _ in retired:
            self.partitions[group.partition].reserve_anew(group)
        return retired

    def end(self, groups: Sequence[Group], end: State, reason: str) -> list[Retired]:
        """Retires groups that are in no update. One that the clock is asked for meets its end if the clock refuses."""
        retired = []
        for group in groups:
            if group.claim is None:
                retired.append(self.retire(group, end, reason))
            elif group.claim == PENDING:
                group.doom = (end, reason)
        return retired

    def retire(self, group: Group, end: State, reason: str) -> Retired:
        partition = self.partitions[group.partition]
        self.ended[reason] += group.size
        self.touch(group)
        self._free(group, group.leave())
        partition.remove(group)
        is_outstanding = partition.training is not None and group.claim is None
        return Retired(group, group.size if is_outstanding else 0)

    def _free(self, group: Group, bits: int) -> None:
        self.promised_bytes -= group.row_bytes * bits.bit_count()
        if bits & group.filled:
            self.freed.append((group, bits & group.filled))

    # Looking up

    def partition(self, name: str) -> Partition:
        if name not in self.partitions:
            raise RowRefused(f"partition: {name!r}; consumers read {sorted(self.partitions)}")
        return self.partitions[name]

    def lane(self, consumer: str) -> Lane:
        if consumer not in self.lanes:
            raise RowRefused(f"consumer: {consumer!r}; declared are {sorted(self.lanes)}")
        return self.lanes[consumer]

    def find(self, spans: Sequence[Span]) -> list[Pick]:
        """Those of the rows that are not gone. Raises RowRefused for one that never was."""
        picks = []
        for span in spans:
            group = self.partition(span.partition).find(span)
            if group is not None and (bits := span.bits & ~group.gone):
                picks.append((group, bits))
        return picks

    def groups_of(self, spans: Sequence[Span]) -> list[Group]:
        """Each once."""
        return list({group.identity: group for group, _ in self.find(spans)}.values())

    def touch(self, group: Group) -> None:
        if self.touched is not None:
            self.touched[group.identity] = group

    def bring_back(self, group: Group, claim: tuple[int, int] | None, taker: str) -> None:
        """A group of an earlier life, with what is READY of it, or LEASED to the update that held it."""
        partition = self.partitions[group.partition]
        partition.add(group)
        self.promised_bytes += group.row_bytes * (group.all & ~group.gone).bit_count()
        if claim is not None and partition.training is not None:
            progress = group.progress[partition.training.position]
            progress.lend(progress.ready, None)
            group.claim, group.taker = claim, taker
        for lane in partition.lanes:
            if group.progress[lane.position].ready:
                lane.push(group)

    def check_columns(self, names: Sequence[str]) -> None:
        """Raises RowRefused for one too many."""
        self._columns.update(names)
        if len(self._columns) > MAX_COLUMNS:
            self._columns.difference_update(names)
            raise RowRefused(f"columns: {list(names)}; at most {MAX_COLUMNS} names")
