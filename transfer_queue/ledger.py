"""Which rows exist, which columns they have, who has taken them. Pure: no sockets, no payload; time is an argument.

The ledger knows every row's state for every consumer (`states.State`) and takes the arrows. It does not know whether
the staleness rule admits a group or a claim: the caller asks a `Clock` first, and tells it what `put` and the ends
return. What is taken for training is in `updates.py`. The ledger holds no payload: `freed` names the rows whose payload
may go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transfer_queue.config import MAX_COLUMNS, ConsumerSpec
from transfer_queue.errors import RowRefused
from transfer_queue.partitions import Partition
from transfer_queue.rows import RowKey
from transfer_queue.states import PENDING, Accepts, Group, Lane, Lease, Row, State


class Retired(NamedTuple):
    """A group that left for good. rows: what returns to the staleness account (0 if its partition has none)."""

    group: Group
    rows: int


class PutPlan(NamedTuple):
    """Positions in a put: `fresh` rows get the columns, `repeated` ones have them, and must have them alike; all others
    are gone and their contents are ignored."""

    rows: list[Row | None]
    fresh: list[int]
    repeated: list[int]


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
    ) -> None:
        self.group_stride = group_stride
        self.byte_limit = byte_limit
        self.lease_s = lease_s
        self.max_attempts = max_attempts
        self.promised_bytes = 0
        self.freed: list[RowKey] = []
        self.ended: Counter[str] = Counter()
        self._bits: dict[str, int] = {}
        self.partitions: dict[str, Partition] = {}
        self.lanes: dict[str, Lane] = {}
        for name, spec in consumers.items():
            new = Partition(spec.partition, first_group, group_stride)
            partition = self.partitions.setdefault(spec.partition, new)
            lane = Lane(name, spec, len(partition.lanes))
            lane.need = self._mask(spec.columns)
            partition.lanes.append(lane)
            self.lanes[name] = lane
            if spec.training:
                partition.training = lane

    # Reserving: nothing -> RESERVED

    def groups_in_room(self, group_bytes: int, num_groups: int, stored_bytes: int) -> int:
        """How many of the groups fit under the byte limit, beside what is promised, or what is there if that is
        more."""
        if group_bytes > self.byte_limit:
            raise RowRefused(f"row_bytes: a group of {group_bytes} bytes; byte_limit is {self.byte_limit}")
        free = self.byte_limit - max(self.promised_bytes, stored_bytes)
        return max(0, min(num_groups, free // max(1, group_bytes)))

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
            group = Group(partition.name, number, attempt, producer, version, deadline)
            group.born_s = now
            num_lanes = len(partition.lanes)
            keys = (RowKey(partition.name, number, index, attempt) for index in range(group_size))
            group.rows = [Row(key, group, num_lanes, row_bytes) for key in keys]
            group.empty = group_size
            group.waiting = [group_size] * num_lanes
            partition.groups[number] = group
            groups.append(group)
        self.promised_bytes += num_groups * group_size * row_bytes
        return groups

    # Putting: RESERVED -> READY

    def plan_put(self, keys: Sequence[RowKey], columns: Sequence[str], versions: Sequence[int]) -> PutPlan:
        """Sorts the rows and refuses what must be refused; changes nothing."""
        mask = self._mask(columns)
        rows: list[Row | None] = []
        fresh: list[int] = []
        repeated: list[int] = []
        for position, key in enumerate(keys):
            row = self.partition(key.partition).find(key)
            rows.append(row)
            if row is None:
                continue
            have = row.have & mask
            if have == mask:
                repeated.append(position)
            elif have:
                raise RowRefused(f"{key}: some of {list(columns)} are there already; a put adds columns, all or none")
            else:
                fresh.append(position)
                if versions and versions[position] < row.group.version:
                    raise RowRefused(f"versions: {key} has {versions[position]}, reserved at {row.group.version}")
        if len({id(row) for row in rows if row is not None}) < len(fresh) + len(repeated):
            raise RowRefused("keys: the same row twice in one put")
        return PutPlan(rows, fresh, repeated)

    def put(
        self, plan: PutPlan, columns: Sequence[str], versions: Sequence[int], deadline_of: Callable[[int], int]
    ) -> list[tuple[int, int, int]]:
        """Adds the columns to the fresh rows. Returns the (old, new, rows) by which deadlines moved."""
        mask = self._mask(columns)
        filled = []
        touched: list[Row] = []
        for position in plan.fresh:
            row = plan.rows[position]
            assert row is not None
            touched.append(row)
            if versions:
                row.version = versions[position]
            if not row.have:
                row.group.empty -= 1
                if not row.group.empty:
                    filled.append(row.group)
            row.have |= mask
        moves = [move for group in filled if (move := self._settle_deadline(group, deadline_of)) is not None]
        for row in touched:
            self._offer(row)
        return moves

    def _settle_deadline(self, group: Group, deadline_of: Callable[[int], int]) -> tuple[int, int, int] | None:
        """All of its tokens are there, so the oldest is known."""
        if self.partitions[group.partition].training is None:
            return None
        old, group.deadline = group.deadline, deadline_of(min(row.version for row in group.rows))
        return (old, group.deadline, len(group.rows)) if group.deadline != old else None

    def _offer(self, row: Row) -> None:
        """Makes the row ready for the consumers whose columns are complete now."""
        for lane in self.partitions[row.key.partition].lanes:
            at = lane.position
            if row.states[at] is State.RESERVED and row.have & lane.need == lane.need:
                row.become_ready(at)
                self._queue(lane, row)

    @staticmethod
    def _queue(lane: Lane, row: Row) -> None:
        if not lane.spec.takes_groups:
            lane.push(row)
            return
        row.group.waiting[lane.position] -= 1
        if not row.group.waiting[lane.position]:
            lane.push(row.group)

    # Ordinary leases: READY -> LEASED -> DONE, LEASED -> READY

    def lease(self, lane: Lane, accepts: Accepts, now: float) -> list[Row]:
        """Ready units, earliest deadline first, as long as they are accepted."""
        rows = [row for _, unit in lane.pop(accepts) for row in unit]
        if rows:
            lease = Lease(rows)
            for row in rows:
                row.lend(lane.position, lease)
                if lane.spec.takes_groups:
                    row.group.waiting[lane.position] += 1
            lane.add_lease(lease, now + self.lease_s)
        return rows

    def lose_leases(self, now: float) -> int:
        """Rows whose lease has ended are ready again; how many."""
        lost = 0
        for lane in self.lanes.values():
            while (lease := lane.pop_ended(now)) is not None:
                lost += self.return_rows(lane, lease.rows)
        return lost

    def return_rows(self, lane: Lane, rows: Sequence[Row]) -> int:
        """LEASED -> READY for those of the rows that are not done; how many."""
        returned = 0
        for row in rows:
            if row.states[lane.position] is State.LEASED:
                row.lose_lease(lane.position)
                self._queue(lane, row)
                returned += 1
        lane.redelivered += returned
        return returned

    def next_end(self) -> float | None:
        """When the next lease ends."""
        return min((end for lane in self.lanes.values() if (end := lane.next_end()) is not None), default=None)

    def ack(self, lane: Lane, keys: Sequence[RowKey]) -> int:
        """Finishes leased rows, also those whose lease was lost meanwhile; how many were not finished before."""
        if lane.spec.training:
            raise RowRefused(f"consumer: {lane.name!r} is training; it commits")
        rows = self.find(keys)
        for row in rows:
            if row.states[lane.position] is State.RESERVED:
                raise RowRefused(f"keys: {row.key} was never ready for {lane.name!r}")
        open_rows = [row for row in rows if row.states[lane.position] in (State.LEASED, State.READY)]
        for row in open_rows:
            if lane.spec.takes_groups and row.states[lane.position] is State.LEASED:
                row.group.waiting[lane.position] -= 1
            self.finish(lane, row)
        return len(open_rows)

    def finish(self, lane: Lane, row: Row) -> None:
        lane.done += 1
        if row.finish(lane.position):
            self._free(row)
            self.partitions[row.group.partition].forget_if_finished(row.group)

    # Ends: LOST, DROPPED

    def drop(self, keys: Sequence[RowKey], reason: str) -> list[Retired]:
        """The groups of these rows, whole: an update is made of whole ones. Those in an update stay."""
        groups = {id(row.group): row.group for row in self.find(keys)}
        return self.end(list(groups.values()), State.DROPPED, reason)

    def drop_late(self, lane: Lane, deadline: int) -> list[Retired]:
        """The unready group with the earliest deadline, if it is due by `deadline`: it keeps ready ones waiting. Its
        prompt is tried again, up to `max_attempts` times."""
        partition = self.partitions[lane.spec.partition]
        unready = [group for group in partition.groups.values() if group.waiting[lane.position] and group.claim is None]
        late = min(unready, key=lambda group: (group.deadline, group.number), default=None)
        if late is None or late.deadline > deadline:
            return []
        retired = self.end([late], State.DROPPED, "late")
        if late.attempt + 1 < self.max_attempts:
            partition.reserve_anew(late)
        else:
            self.ended["attempts_exhausted"] += len(late.rows)
        return retired

    def producer_lost(self, producer: str) -> list[Retired]:
        """Its unfinished groups are LOST, whole, and reserved anew, earliest number first."""
        unfinished = [
            group
            for partition in self.partitions.values()
            for group in partition.groups.values()
            if group.producer == producer and group.empty
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
        self.ended[reason] += len(group.rows)
        for row in group.rows:
            if row.pending:
                row.leave(end)
                self._free(row)
        del partition.groups[group.number]
        is_outstanding = partition.training is not None and group.claim is None
        return Retired(group, len(group.rows) if is_outstanding else 0)

    def _free(self, row: Row) -> None:
        self.promised_bytes -= row.num_bytes
        if row.have:
            self.freed.append(row.key)

    # Looking up

    def partition(self, name: str) -> Partition:
        if name not in self.partitions:
            raise RowRefused(f"partition: {name!r}; consumers read {sorted(self.partitions)}")
        return self.partitions[name]

    def lane(self, consumer: str) -> Lane:
        if consumer not in self.lanes:
            raise RowRefused(f"consumer: {consumer!r}; declared are {sorted(self.lanes)}")
        return self.lanes[consumer]

    def find(self, keys: Sequence[RowKey]) -> list[Row]:
        """Those of the rows that are not gone. Raises RowRefused for one that never was."""
        rows = (self.partition(key.partition).find(key) for key in keys)
        return [row for row in rows if row is not None]

    def _mask(self, columns: Sequence[str]) -> int:
        mask = 0
        for name in columns:
            if name not in self._bits:
                if len(self._bits) >= MAX_COLUMNS:
                    raise RowRefused(f"columns: {name!r}; at most {MAX_COLUMNS} names")
                self._bits[name] = 1 << len(self._bits)
            mask |= self._bits[name]
        return mask

    def describe(self, now: float) -> dict[str, Any]:
        """Counts by consumer and partition. Walks the live rows; consumes nothing."""
        partitions = {
            partition.name: {
                "groups": len(partition.groups),
                "rows_unfinished": sum(group.empty for group in partition.groups.values()),
                "to_reserve_anew": len(partition.again),
                "next_group": partition.next_group,
                "oldest_s": max((now - group.born_s for group in partition.groups.values()), default=0.0),
            }
            for partition in self.partitions.values()
        }
        consumers = {lane.name: self._describe_lane(lane) for lane in self.lanes.values()}
        return {
            "partitions": partitions,
            "consumers": consumers,
            "ended": dict(self.ended),
            "promised_bytes": self.promised_bytes,
        }

    def _describe_lane(self, lane: Lane) -> dict[str, int]:
        groups = self.partitions[lane.spec.partition].groups.values()
        states = Counter(row.states[lane.position] for group in groups for row in group.rows)
        return {
            "reserved": states[State.RESERVED],
            "ready": states[State.READY],
            "leased": states[State.LEASED],
            "done": lane.done,
            "redelivered": lane.redelivered,
        }
