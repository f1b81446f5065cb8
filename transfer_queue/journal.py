"""A shard's memory of itself on disk: an append-only file of records beside its segments.

    length (uint32) | CRC-32 (uint32) | record, msgpack          and again

What a shard has answered is in the file before the answer goes out, so a shard that is killed goes on where it was. A
torn tail, of the file or of a segment, is found by its checksum and cut off. The system's page cache survives the
shard; what a power failure leaves is checked in the same way, and may be less. Owns the file; what is written is
`records.py`'s.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from transfer_queue.records import (
    AnyRecord,
    ClockRecord,
    GoneRecord,
    GroupRecord,
    ParcelRecord,
    PartitionRecord,
)

FILE = "journal"
REWRITE_BYTES = 16 << 20
"""A file above this is written anew when most of it is history."""
_HEAD = struct.Struct("<II")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyRecord)


class Past:
    """What the last life left: the newest record of everything that is still there."""

    def __init__(self) -> None:
        self.parcels: dict[int, ParcelRecord] = {}
        self.groups: dict[tuple[str, int], GroupRecord] = {}
        self.partitions: dict[str, PartitionRecord] = {}
        self.clock: ClockRecord | None = None

    def learn(self, record: AnyRecord) -> None:
        match record:
            case ParcelRecord():
                self.parcels[record.number] = record
            case GroupRecord():
                self.groups[record.partition, record.number] = record
            case GoneRecord():
                known = self.groups.get((record.partition, record.number))
                if known is not None and known.attempt == record.attempt:
                    del self.groups[record.partition, record.number]
            case PartitionRecord():
                self.partitions[record.name] = record
            case ClockRecord():
                self.clock = record


class Journal:
    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self.past, end = _read(self._path)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        self._num_bytes = end
        self._num_bytes_anew = 0

    @property
    def is_mostly_history(self) -> bool:
        return self._num_bytes > max(REWRITE_BYTES, 4 * self._num_bytes_anew)

    def append(self, records: Sequence[AnyRecord]) -> None:
        if records:
            self._num_bytes += _write(self._fd, records)

    def rewrite(self, records: Sequence[AnyRecord]) -> None:
        """Puts a file of these alone in the place of the old one."""
        fresh = self._path.with_suffix(".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._num_bytes = self._num_bytes_anew = _write(fd, records)
        os.fsync(fd)
        fresh.rename(self._path)
        os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)


def _write(fd: int, records: Sequence[AnyRecord]) -> int:
    parts = []
    for record in records:
        body = _encoder.encode(record)
        parts += [_HEAD.pack(len(body), zlib.crc32(body)), body]
    data = memoryview(b"".join(parts))
    written = 0
    while written < len(data):
        written += os.write(fd, data[written:])
    return written


def _read(path: Path) -> tuple[Past, int]:
    """Everything up to the first record that is not whole; and where that begins."""
    past = Past()
    data = path.read_bytes() if path.exists() else b""
    end = 0
    for record, end_of_record in _records(data):
        past.learn(record)
        end = end_of_record
    return past, end


def _records(data: bytes) -> Iterator[tuple[AnyRecord, int]]:
    at = 0
    while at + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) < length or zlib.crc32(body) != checksum:
            return
        try:
            record = _decoder.decode(body)
        except msgspec.MsgspecError:
            return
        at += _HEAD.size + length
        yield record, at
