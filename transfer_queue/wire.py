"""Messages between clients and a shard, and how columns become frames. Never pickle.

A message is one header frame, then the frames of its columns, in the header's order: values, and offsets (int64) unless
every row has one value. The header is `MAGIC`, whose last byte is the protocol's version, and a tagged msgpack struct;
every request has an id, which its reply repeats. Sizes and dtypes are checked before anything is allocated for them.
This file owns the form on the wire, not what the shard does (`shard.py`) nor the sockets (`server.py`, `client.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from transfer_queue.config import MAX_COLUMNS
from transfer_queue.errors import RowRefused, WireError
from transfer_queue.rows import Column, RowKey

MAGIC = b"flowrl-queue\x01"
MAX_ROWS = 1 << 20
MAX_HEADER_BYTES = 64 << 20
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
                 "float16", "float32", "float64")
}  # fmt: skip
_OFFSETS = np.dtype("<i8")


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    id: int


class ColumnHeader(msgspec.Struct, frozen=True, array_like=True):
    name: str
    dtype: str
    ragged: bool


class Reservation(msgspec.Struct, frozen=True, array_like=True):
    """A group to produce. version: what its deadline counts from; the engine that works on it has loaded at least
    it."""

    partition: str
    group: int
    attempt: int
    group_size: int
    version: int
    deadline: int

    @property
    def keys(self) -> tuple[RowKey, ...]:
        return tuple(RowKey(self.partition, self.group, index, self.attempt) for index in range(self.group_size))


# Requests


class Locate(Message, frozen=True):
    """Which group numbers are this shard's?"""


class Announce(Message, frozen=True):
    producer: str
    version: int


class Reserve(Message, frozen=True):
    producer: str
    num_groups: int
    group_size: int
    partition: str
    row_bytes: int
    wait_s: float


class Put(Message, frozen=True):
    keys: list[RowKey]
    columns: list[ColumnHeader]
    versions: list[int]


class Take(Message, frozen=True):
    consumer: str
    max_rows: int
    budget: tuple[str, int] | None
    update: int | None
    incarnation: int
    wait_s: float


class Ack(Message, frozen=True):
    consumer: str
    keys: list[RowKey]


class Commit(Message, frozen=True):
    incarnation: int
    update: int
    keys: list[RowKey]


class Drop(Message, frozen=True):
    keys: list[RowKey]
    reason: str


class ProducerLost(Message, frozen=True):
    producer: str


class Introspect(Message, frozen=True):
    pass


class Decline(Message, frozen=True):
    """An answer came for which nobody waited any more: these rows of a take, or of a reservation (consumer empty), go
    back. Has no reply."""

    consumer: str
    keys: list[RowKey]


class Cancel(Message, frozen=True):
    """Answer the parked request `target` now, with what there is. Has no reply of its own."""

    target: int


# Replies


class Located(Message, frozen=True):
    first_group: int
    group_stride: int


class Done(Message, frozen=True):
    """count: rows (or groups, for a loss) that the request changed."""

    count: int


class Reserved(Message, frozen=True):
    groups: list[Reservation]


class Delivered(Message, frozen=True):
    """Rows of a take; none if it timed out. closed: the update is full, and this shard has nothing more for it."""

    keys: list[RowKey]
    columns: list[ColumnHeader]
    versions: list[int]
    closed: bool


class Report(Message, frozen=True):
    state: dict[str, Any]


class Refused(Message, frozen=True):
    """error: a class of `errors.py`."""

    error: str
    message: str


Request = Locate | Announce | Reserve | Put | Take | Ack | Commit | Drop | ProducerLost | Introspect | Decline | Cancel
Reply = Located | Done | Reserved | Delivered | Report | Refused

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)
_any = msgspec.msgpack.Decoder(list[Any])


def encode(message: Message) -> bytes:
    return MAGIC + _encoder.encode(message)


def decode_request(header: memoryview) -> Request:
    """Raises WireError for anything that is not one request of this protocol."""
    return _decode(_requests, header)


def decode_reply(header: memoryview) -> Reply:
    return _decode(_replies, header)


def _decode(decoder: msgspec.msgpack.Decoder, header: memoryview) -> Any:
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"header of {len(header)} bytes; at most {MAX_HEADER_BYTES}")
    if header[: len(MAGIC)] != MAGIC:
        raise WireError("this is not protocol version 1 of the queue")
    try:
        return decoder.decode(header[len(MAGIC) :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"header: {error}") from error


def request_id(header: memoryview) -> int | None:
    """The id of a message that does not decode, if it has one, so that its sender can be told."""
    if header[: len(MAGIC)] != MAGIC or len(header) > MAX_HEADER_BYTES:
        return None
    try:
        fields = _any.decode(header[len(MAGIC) :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return fields[1] if len(fields) > 1 and isinstance(fields[1], int) else None


def pack(columns: Mapping[str, Column]) -> tuple[list[ColumnHeader], list[memoryview]]:
    """Headers and frames. Raises RowRefused for a dtype that does not travel."""
    headers = []
    frames = []
    for name, column in columns.items():
        dtype = column.values.dtype
        if dtype.name not in DTYPES:
            raise RowRefused(f"columns: {name!r} is {dtype}; what travels is {', '.join(DTYPES)}")
        ragged = not _is_scalar(column)
        headers.append(ColumnHeader(name, dtype.name, ragged))
        frames.append(_bytes_of(column.values, DTYPES[dtype.name]))
        if ragged:
            frames.append(_bytes_of(column.offsets, _OFFSETS))
    return headers, frames


def unpack(headers: Sequence[ColumnHeader], frames: Sequence[memoryview], num_rows: int) -> dict[str, Column]:
    """The columns as views of the frames, after every check."""
    if len(headers) > MAX_COLUMNS or num_rows > MAX_ROWS:
        raise WireError(f"{len(headers)} columns of {num_rows} rows; at most {MAX_COLUMNS} of {MAX_ROWS}")
    if len(frames) != sum(1 + header.ragged for header in headers):
        raise WireError(f"{len(frames)} frames for {len(headers)} columns")
    columns: dict[str, Column] = {}
    rest = iter(frames)
    for header in headers:
        if header.dtype not in DTYPES or header.name in columns:
            raise WireError(f"column {header.name!r} of dtype {header.dtype!r}: twice there, or of no known dtype")
        values = _array(header.name, next(rest), DTYPES[header.dtype])
        offsets = _array(header.name, next(rest), _OFFSETS) if header.ragged else _scalar_offsets(num_rows)
        _check_offsets(header.name, offsets, len(values), num_rows)
        columns[header.name] = Column(values, offsets)
    return columns


def _array(name: str, frame: memoryview, dtype: np.dtype) -> np.ndarray:
    if frame.nbytes % dtype.itemsize:
        raise WireError(f"column {name!r}: {frame.nbytes} bytes are no whole number of {dtype}")
    return np.frombuffer(frame, dtype=dtype)


def _check_offsets(name: str, offsets: np.ndarray, num_values: int, num_rows: int) -> None:
    spans = len(offsets) == num_rows + 1 and offsets[0] == 0 and offsets[-1] == num_values
    if not spans or (offsets[1:] < offsets[:-1]).any():
        raise WireError(f"column {name!r}: offsets do not describe {num_rows} rows of {num_values} values")


def _is_scalar(column: Column) -> bool:
    return len(column.values) == len(column) and bool((column.offsets == _scalar_offsets(len(column))).all())


def _scalar_offsets(num_rows: int) -> np.ndarray:
    return np.arange(num_rows + 1, dtype=np.int64)


def _bytes_of(array: np.ndarray, dtype: np.dtype) -> memoryview:
    return np.ascontiguousarray(array, dtype=dtype).view(np.uint8).data
