"""A queue in files: one a shard, written while it lives, read by a later queue of as many shards as it has.

    MAGIC | length (uint64) | CRC-32 (uint32) | header, msgpack | the bytes of its columns

What is saved: groups whose rows have all been put, with what consumers are done with; the numbers of those that are
still to be sampled. Leases and claims are not. The shards of the later queue read all files, and agree without a word
on which groups still fit under the staleness bound; the others are reserved anew.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from transfer_queue.clock import Clock
from transfer_queue.frames import pack, unpack
from transfer_queue.ledger import Ledger
from transfer_queue.partitions import Partition
from transfer_queue.records import GroupRecord, PartitionRecord, group_of, group_record, partition_record
from transfer_queue.rows import Column
from transfer_queue.spans import Span
from transfer_queue.staleness import Accounts, tally
from transfer_queue.storage import Storage
from transfer_queue.wire import ColumnHeader

MAGIC = b"queue\x00\x00\x02"
_HEAD = struct.Struct("<QI")


class SavedColumn(msgspec.Struct, frozen=True, array_like=True):
    """The rows of these spans, in their order. sizes: bytes of the values, and of the offsets where rows differ."""

    header: ColumnHeader
    spans: list[Span]
    sizes: list[int]
    checksum: int


class SavedShard(msgspec.Struct, frozen=True, array_like=True):
    first_group: int
    group_stride: int
    partitions: list[PartitionRecord]
    groups: list[GroupRecord]
    columns: list[SavedColumn]


def save(
    directory: Path, ledger: Ledger, storage: Storage, first_group: int, group_stride: int, *, with_rows: bool = True
) -> int:
    """Writes this shard's file, whole or not at all; how many rows are in it."""
    groups = [
        group
        for partition in ledger.partitions.values()
        for group in partition.groups.values()
        if with_rows and group.filled == group.all
    ]
    columns, buffers = [], []
    for name in sorted({name for group in groups for name, _ in group.have.columns()}):
        have = frozenset((name,))
        spans = [span for group in groups for span in group.spans(group.have.with_any(have) & ~group.gone)]
        if spans:
            column = storage.gather(spans, (name,))[name]
            (header,), parts = pack({name: column})
            checksum = 0
            for part in parts:
                checksum = zlib.crc32(part, checksum)
            columns.append(SavedColumn(header, spans, [part.nbytes for part in parts], checksum))
            buffers += parts
    records = [group_record(ledger, group, None) for group in groups]
    kept = {group.identity for group in groups}
    partitions = [_with_others(partition, kept) for partition in ledger.partitions.values()]
    saved = SavedShard(first_group, group_stride, partitions, records, columns)
    _write(directory / f"shard-{first_group}-of-{group_stride}", msgspec.msgpack.encode(saved), buffers)
    return sum((group.all & ~group.gone).bit_count() for group in groups)


def _with_others(partition: Partition, kept: Container[tuple[str, int, int]]) -> PartitionRecord:
    """Open groups that are not in the file, such as those that somebody is still working on, count as lost."""
    record = partition_record(partition)
    others = [
        (group.size, group.number, group.attempt + 1)
        for group in partition.groups.values()
        if group.identity not in kept and partition.is_open(group)
    ]
    return msgspec.structs.replace(record, again=record.again + others)


def _write(path: Path, header: bytes, buffers: Sequence[memoryview]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        file.write(MAGIC + _HEAD.pack(len(header), zlib.crc32(header)) + header)
        for buffer in buffers:
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


class SavedQueue:
    """All files of a directory. Raises ValueError for a directory that does not hold one whole queue."""

    def __init__(self, directory: Path) -> None:
        paths = sorted(directory.glob("shard-*-of-*"))
        if not paths:
            raise ValueError(f"restore_dir: {directory}; there is no saved queue")
        self.shards = [_read_header(path) for path in paths]
        self._paths = paths
        strides = {shard.group_stride for shard in self.shards}
        firsts = {shard.first_group % shard.group_stride for shard in self.shards}
        if len(strides) > 1 or len(firsts) != max(strides):
            names = [path.name for path in paths]
            raise ValueError(f"restore_dir: {directory} has {names}; must be all shards of one queue, each once")

    def groups(self) -> list[GroupRecord]:
        return sorted((group for shard in self.shards for group in shard.groups), key=lambda group: group.identity)

    def columns(self) -> Iterator[tuple[list[Span], str, Column]]:
        """One at a time, read when it is its turn. Raises ValueError for one that is not whole."""
        for path, shard in zip(self._paths, self.shards, strict=True):
            with path.open("rb") as file:
                file.seek(len(MAGIC))
                file.seek(_HEAD.unpack(file.read(_HEAD.size))[0], os.SEEK_CUR)
                for saved in shard.columns:
                    yield saved.spans, saved.header.name, _read_column(path, file, saved)

    def partition(self, name: str, first_group: int, group_stride: int) -> PartitionRecord:
        """For one shard of the new queue. A shard of the old one may have lagged behind the others with its numbers."""
        parts = [(shard, part) for shard in self.shards for part in shard.partitions if part.name == name]
        end = max((part.next_group for _, part in parts), default=first_group)
        size = max((part.group_size for _, part in parts), default=0)
        again = [entry for _, part in parts for entry in part.again]
        again += [
            (size, number, 0) for shard, part in parts for number in range(part.next_group, end, shard.group_stride)
        ]
        mine = [entry for entry in again if (entry[1] - first_group) % group_stride == 0]
        return PartitionRecord(name, size, max(first_group, end + (first_group - end) % group_stride), sorted(mine))


class Restoration:
    """Brings back one shard's part, once the clock has been heard."""

    def __init__(self, directory: Path, first_group: int, group_stride: int) -> None:
        self._saved = SavedQueue(directory)
        self._first = first_group
        self._stride = group_stride

    def run(self, ledger: Ledger, storage: Storage, clock: Clock, now: float) -> None:
        fitting, shed = self._sort_out(ledger, clock)
        for name, partition in ledger.partitions.items():
            record = self._saved.partition(name, self._first, self._stride)
            partition.group_size, partition.next_group = record.group_size, record.next_group
            for size, number, attempt in record.again:
                partition.try_again(size, number, attempt)
        for known in self._mine(shed):
            ledger.partitions[known.partition].reserve_anew(group_of(known, ledger.partitions[known.partition], now))
        mine = {known.identity: known for known in self._mine(fitting)}
        for spans, name, column in self._saved.columns():
            rows, position = [], 0
            for span in spans:
                if span.identity in mine:
                    rows.append((span, position))
                position += len(span)
            storage.store(rows, {name: column})
        for known in mine.values():
            ledger.bring_back(group_of(known, ledger.partitions[known.partition], now), None, "")
        outstanding = [known for known in mine.values() if _is_outstanding(known, ledger.partitions[known.partition])]
        clock.unclaim(clock.snapshot().incarnation, tally((known.deadline, known.size) for known in outstanding))

    def _sort_out(self, ledger: Ledger, clock: Clock) -> tuple[list[GroupRecord], list[GroupRecord]]:
        """Of all shards' groups, those that are admissible one after the other, and those that are not: files are
        written one after the other too, and between two of them capacity may have moved. Tokens of a future that will
        not be are not admissible either."""
        fitting, shed = [], []
        version = clock.snapshot().version
        accounts = Accounts(clock.batch_rows or 1, clock.max_staleness or 0, version, surplus_rows=clock.surplus_rows)
        for known in self._saved.groups():
            partition = ledger.partitions.get(known.partition)
            if partition is None:
                continue
            if _is_outstanding(known, partition):
                is_due = version <= known.deadline and max(known.versions) <= version
                if not is_due or not accounts.admissible(known.deadline, known.size):
                    shed.append(known)
                    continue
                accounts.admit(known.deadline, known.size)
            fitting.append(known)
        return fitting, shed

    def _mine(self, groups: Iterable[GroupRecord]) -> Iterator[GroupRecord]:
        return (group for group in groups if (group.number - self._first) % self._stride == 0)


def _is_outstanding(known: GroupRecord, partition: Partition) -> bool:
    """Whether it is still to be trained."""
    return partition.training is not None and known.done.get(partition.training.name) != [(0, known.size)]


def _read_header(path: Path) -> SavedShard:
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + _HEAD.size)
        if len(start) < len(MAGIC) + _HEAD.size or not start.startswith(MAGIC):
            raise ValueError(f"restore_dir: {path} is no saved queue")
        length, checksum = _HEAD.unpack(start[len(MAGIC) :])
        header = file.read(length)
    if len(header) < length or zlib.crc32(header) != checksum:
        raise ValueError(f"restore_dir: {path} is not whole")
    return msgspec.msgpack.decode(header, type=SavedShard)


def _read_column(path: Path, file: BinaryIO, saved: SavedColumn) -> Column:
    parts = [file.read(size) for size in saved.sizes]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    if checksum != saved.checksum:
        raise ValueError(f"restore_dir: {path} is not whole: column {saved.header.name!r}")
    columns = unpack([saved.header], [memoryview(part) for part in parts], sum(map(len, saved.spans)))
    return columns[saved.header.name]
