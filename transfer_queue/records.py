"""What a shard writes down of itself, for its next life: groups, parcels, partitions, the clock. No files here.

A record says all there is to say of its subject, so the last one counts. Leases of ordinary consumers are not written
down: whoever had one is asked again. What an update holds is.
"""

from __future__ import annotations

import zlib

import msgspec

from transfer_queue.contents import Contents
from transfer_queue.ledger import Ledger
from transfer_queue.parcels import Parcel
from transfer_queue.partitions import Partition
from transfer_queue.spans import bits_between, ranges
from transfer_queue.states import Group
from transfer_queue.storage import Shelf
from transfer_queue.wire import ColumnPlace

Ranges = list[tuple[int, int]]


class Record(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One line of the journal."""


class ParcelRecord(Record, frozen=True):
    """checksum: CRC-32 of the columns' bytes, in their order."""

    number: int
    segment: str
    num_rows: int
    columns: list[ColumnPlace]
    checksum: int


class GroupRecord(Record, frozen=True):
    """have: by column; done: by consumer. pieces: (parcel, first row, end, position in the parcel)."""

    partition: str
    number: int
    attempt: int
    size: int
    producer: str
    version: int
    deadline: int
    row_bytes: int
    versions: list[int]
    have: dict[str, Ranges]
    done: dict[str, Ranges]
    claim: tuple[int, int] | None
    taker: str
    pieces: list[tuple[int, int, int, int]]

    @property
    def identity(self) -> tuple[str, int, int]:
        return (self.partition, self.number, self.attempt)


class GoneRecord(Record, frozen=True):
    partition: str
    number: int
    attempt: int


class PartitionRecord(Record, frozen=True):
    """again: (size, group, attempt) of groups to be reserved anew."""

    name: str
    group_size: int
    next_group: int
    again: list[tuple[int, int, int]]


class ClockRecord(Record, frozen=True):
    version: int
    filled: int
    incarnation: int


AnyRecord = ParcelRecord | GroupRecord | GoneRecord | PartitionRecord | ClockRecord


def parcel_record(parcel: Parcel) -> ParcelRecord:
    places = list(parcel.places.values())
    return ParcelRecord(parcel.number, parcel.held.segment.name, len(parcel.starts) - 1, places, checksum(parcel))


def checksum(parcel: Parcel) -> int:
    total = 0
    for column in parcel.columns.values():
        total = zlib.crc32(column.values.view("u1").data, total)
        total = zlib.crc32(column.offsets.view("u1").data, total)
    return total


def group_record(ledger: Ledger, group: Group, shelf: Shelf | None) -> GroupRecord:
    """Of what a shelf holds, only rows that are still needed."""
    lanes = ledger.partitions[group.partition].lanes
    pieces = [(piece.parcel.number, piece.first, piece.end, piece.position) for piece in shelf.pieces] if shelf else []
    return GroupRecord(
        group.partition, group.number, group.attempt, group.size, group.producer, group.version, group.deadline,
        group.row_bytes, group.versions,
        {name: list(ranges(bits)) for name, bits in group.have.columns()},
        {lane.name: list(ranges(group.progress[lane.position].done)) for lane in lanes},
        group.claim if group.claim is not None and group.claim[0] >= 0 else None, group.taker, pieces,
    )  # fmt: skip


def group_of(record: GroupRecord, partition: Partition, now: float) -> Group:
    """As it was, except that nothing of it is leased: rows are READY for whom they are complete and who is not done
    with them. The lanes do not know of it yet."""
    group = Group(
        record.partition, record.number, record.attempt, record.size, len(partition.lanes), producer=record.producer,
        version=record.version, deadline=record.deadline, row_bytes=record.row_bytes, born_s=now,
    )  # fmt: skip
    group.versions = list(record.versions)
    group.have = contents_of(record)
    group.filled = group.have.with_any(frozenset(record.have))
    gone = group.all
    for lane in partition.lanes:
        progress = group.progress[lane.position]
        progress.done = _bits(record.done.get(lane.name, []))
        progress.ready = group.have.with_all(lane.columns) & ~progress.done
        gone &= progress.done
    group.gone = gone
    return group


def contents_of(record: GroupRecord) -> Contents:
    """Names with the same rows came together, or might have."""
    together: dict[int, list[str]] = {}
    for name, spans in record.have.items():
        together.setdefault(_bits(spans), []).append(name)
    return Contents((frozenset(names), rows) for rows, names in together.items())


def partition_record(partition: Partition) -> PartitionRecord:
    again = [(size, number, attempt) for size, groups in partition.again.items() for number, attempt in groups]
    return PartitionRecord(partition.name, partition.group_size, partition.next_group, again)


def _bits(spans: Ranges) -> int:
    bits = 0
    for first, end in spans:
        bits |= bits_between(first, end)
    return bits
