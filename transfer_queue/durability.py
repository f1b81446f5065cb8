"""Keeps a shard's journal up to date, and brings the shard back from it."""

from __future__ import annotations

import logging
from pathlib import Path

from transfer_queue.clock import Clock
from transfer_queue.errors import WireError
from transfer_queue.inspection import outstanding
from transfer_queue.journal import Journal, Past
from transfer_queue.ledger import Ledger
from transfer_queue.parcels import Parcel
from transfer_queue.records import (
    AnyRecord,
    ClockRecord,
    GoneRecord,
    GroupRecord,
    checksum,
    group_of,
    group_record,
    parcel_record,
    partition_record,
)
from transfer_queue.states import Group
from transfer_queue.storage import Storage
from transfer_queue.updates import Updates

_log = logging.getLogger(__name__)


class Durability:
    """Owns the journal. `recover` comes first, `flush` before every answer and before memory is given up."""

    def __init__(self, directory: Path, ledger: Ledger, updates: Updates, storage: Storage, clock: Clock) -> None:
        self._journal = Journal(directory)
        self._ledger = ledger
        self._updates = updates
        self._storage = storage
        self._clock = clock
        self._partitions = {name: partition_record(partition) for name, partition in ledger.partitions.items()}
        self._clock_record: ClockRecord | None = None
        ledger.touched = {}
        storage.news = []

    def flush(self) -> None:
        """Writes down what has changed since the last time."""
        assert self._ledger.touched is not None and self._storage.news is not None, "set by __init__"
        records: list[AnyRecord] = [parcel_record(parcel) for parcel in self._storage.news if parcel.num_live]
        for parcel in self._storage.news:
            for identity in {identity for identity, _ in parcel.pieces}:
                group = self._ledger.partitions[identity[0]].groups.get(identity[1])
                if group is not None:
                    self._ledger.touched[group.identity] = group
        self._storage.news.clear()
        records += [self._record(group) for group in self._ledger.touched.values()]
        self._ledger.touched.clear()
        records += self._changed()
        self._journal.append(records)
        if self._journal.is_mostly_history:
            self._journal.rewrite(self._everything())

    def close(self) -> None:
        self.flush()
        self._journal.close()

    def _record(self, group: Group) -> AnyRecord:
        if self._ledger.partitions[group.partition].groups.get(group.number) is not group:
            return GoneRecord(*group.identity)
        return group_record(self._ledger, group, self._storage.shelf(group.identity))

    def _changed(self) -> list[AnyRecord]:
        """Of partitions and the clock."""
        changed: list[AnyRecord] = []
        for name, partition in self._ledger.partitions.items():
            record = partition_record(partition)
            if record != self._partitions[name]:
                self._partitions[name] = record
                changed.append(record)
        state = self._clock.snapshot()
        now = ClockRecord(state.version, state.filled, state.incarnation)
        if now != self._clock_record:
            self._clock_record = now
            changed.append(now)
        return changed

    def _everything(self) -> list[AnyRecord]:
        groups = [group for partition in self._ledger.partitions.values() for group in partition.groups.values()]
        parcels = {parcel.number: parcel for parcel in self._storage.parcels()}
        records: list[AnyRecord] = [parcel_record(parcel) for parcel in parcels.values()]
        records += [self._record(group) for group in groups]
        records += self._partitions.values()
        return [*records, self._clock_record] if self._clock_record is not None else records

    # Coming back

    def recover(self, now: float) -> int:
        """Everything as the journal has it; how many rows. What is not whole in a segment is LOST, by groups."""
        past = self._journal.past
        for name, record in past.partitions.items():
            if name in self._ledger.partitions:
                partition = self._ledger.partitions[name]
                partition.group_size, partition.next_group = record.group_size, record.next_group
                for size, number, attempt in record.again:
                    partition.again[size].append((number, attempt))
        parcels = self._open_parcels(past)
        claimed: list[Group] = []
        for known in past.groups.values():
            group = self._recover_group(known, parcels, now)
            if group is not None and group.claim is not None:
                claimed.append(group)
        self._storage.end_recovery(max(past.parcels, default=-1) + 1)
        self._updates.keep_undelivered(claimed, for_their_taker=True)
        if past.clock is not None:
            self._clock.recover(past.clock.version, past.clock.filled, past.clock.incarnation, self._outstanding())
        self._journal.rewrite([*self._everything(), *self._changed()])
        self._journal.past = Past()
        return len(self._storage)

    def _open_parcels(self, past: Past) -> dict[int, Parcel]:
        """Those that groups refer to and that are whole."""
        parcels = {}
        for number in sorted({number for known in past.groups.values() for number, *_ in known.pieces}):
            record = past.parcels[number]
            try:
                parcel = self._storage.reopen(number, record.segment, record.num_rows, record.columns)
            except WireError as error:
                _log.warning("parcel %d is gone, and its groups are lost: %s", number, error)
                continue
            if checksum(parcel) == record.checksum:
                parcels[number] = parcel
            else:
                _log.warning("parcel %d is torn, and its groups are lost", number)
        return parcels

    def _recover_group(self, known: GroupRecord, parcels: dict[int, Parcel], now: float) -> Group | None:
        partition = self._ledger.partitions.get(known.partition)
        if partition is None:
            _log.warning("group %s: no consumer reads partition %r any more", known.number, known.partition)
            return None
        group = group_of(known, partition, now)
        if any(number not in parcels for number, *_ in known.pieces):
            partition.reserve_anew(group)
            self._ledger.ended["torn"] += group.size
            return None
        pieces = [(parcels[number], first, end, position) for number, first, end, position in known.pieces]
        self._storage.put_back(group.identity, group.filled & ~group.gone, pieces)
        self._ledger.bring_back(group, known.claim, known.taker)
        return group

    def _outstanding(self) -> dict[int, int]:
        total: dict[int, int] = {}
        for partition in self._ledger.partitions.values():
            for deadline, rows in outstanding(partition).items():
                total[deadline] = total.get(deadline, 0) + rows
        return total
