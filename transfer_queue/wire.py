"""Messages between clients and a shard. Never pickle.

A message is one header frame, then the frames of its columns (`frames.py`). On the shard's own node columns stay in
shared memory instead, and the header says where they lie (`Placed`, `Layout`). The header is `MAGIC`, whose last byte
is the protocol's version, and a tagged msgpack struct; every request has an id, which its reply repeats. This file owns
what is said, not what the shard does (`shard.py`) nor the sockets (`server.py`, `client.py`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from transfer_queue.errors import WireError
from transfer_queue.spans import Keys, Span

MAGIC = b"flowrl-queue\x03"
MAX_HEADER_BYTES = 64 << 20


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    id: int


class ColumnHeader(msgspec.Struct, frozen=True, array_like=True):
    """narrow: the type that the bytes are of, where it is not `dtype` itself."""

    name: str
    dtype: str
    ragged: bool
    narrow: str = ""


class ColumnPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where a column lies in a segment, in bytes from its start. offsets_at: 0 where every row has one value. narrow:
    the type that lies there, where it is not `dtype` itself."""

    name: str
    dtype: str
    num_values: int
    values_at: int
    offsets_at: int
    narrow: str = ""


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """The columns of one put. generation: what the segment's must still be after they have been read."""

    segment: str
    generation: int
    num_rows: int
    columns: list[ColumnPlace]


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """Where the rows of these columns lie. runs: int32 (n, 3), (index of a `Placed` or -1, first row, end), in the
    order of the rows; those of -1 have length 0."""

    names: list[str]
    runs: bytes


class Recycled(msgspec.Struct, frozen=True, array_like=True):
    """Nothing in this segment of the writer's is needed any more. puts: how many the shard had seen in it by then.
    is_removed: it is no longer there."""

    name: str
    puts: int
    is_removed: bool


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
    def span(self) -> Span:
        return Span(self.partition, self.group, self.attempt, 0, self.group_size)

    @property
    def keys(self) -> Keys:
        return Keys([self.span])


# Requests


class Locate(Message, frozen=True):
    """Which group numbers are this shard's, and where is its shared memory?"""


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
    spans: list[Span]
    columns: list[ColumnHeader]
    versions: list[int]
    placed: Placed | None = None


class Take(Message, frozen=True):
    consumer: str
    max_rows: int
    budget: tuple[str, int] | None
    update: int | None
    incarnation: int
    wait_s: float
    is_near: bool = False
    """Whether the columns may stay in shared memory."""
    done: list[Span] = []
    """Rows of earlier takes that are acknowledged by the way."""


class Ack(Message, frozen=True):
    consumer: str
    spans: list[Span]


class Commit(Message, frozen=True):
    incarnation: int
    update: int
    spans: list[Span]


class CloseUpdate(Message, frozen=True):
    """The update may end with the rows it has: no more will come."""

    incarnation: int
    update: int


class Begin(Message, frozen=True):
    """A new incarnation of the trainer starts at `version`. lost: names of shards that are gone for good."""

    incarnation: int
    version: int
    lost: list[str]


class Drop(Message, frozen=True):
    spans: list[Span]
    reason: str
    again: bool = False


class ProducerLost(Message, frozen=True):
    producer: str


class ConsumerLost(Message, frozen=True):
    """What clients of this name have taken and not finished is ready again. (Rows taken for training are not.)"""

    client: str


class Save(Message, frozen=True):
    """Write what the shard holds to a file of its own in this directory. with_rows: or else only which groups are still
    to be done."""

    directory: str
    with_rows: bool = True


class Introspect(Message, frozen=True):
    pass


class Decline(Message, frozen=True):
    """An answer came for which nobody waited any more: these rows of a take, or of a reservation (consumer empty), go
    back. Has no reply."""

    consumer: str
    spans: list[Span]


class Cancel(Message, frozen=True):
    """Answer the parked request `target` now, with what there is. Has no reply of its own."""

    target: int


# Replies


class Located(Message, frozen=True):
    """segments: the directory of the shard's shared memory, which is the client's too if it reads `token` there.
    writer: the client's number as one who writes segments. max_put_bytes: no put may bring more."""

    first_group: int
    group_stride: int
    max_put_bytes: int
    segments: str = ""
    token: str = ""
    writer: int = 0


class Done(Message, frozen=True):
    """count: rows (or groups, for a loss) that the request changed."""

    count: int


class Stored(Message, frozen=True):
    """unwanted: positions of the rows that were dropped or lost meanwhile; their contents are ignored."""

    unwanted: list[int]
    recycled: list[Recycled]


class Reserved(Message, frozen=True):
    groups: list[Reservation]


class Delivered(Message, frozen=True):
    """Rows of a take; none if it timed out. closed: the update is full, and this shard has nothing more for it."""

    spans: list[Span]
    columns: list[ColumnHeader]
    versions: list[int]
    closed: bool
    placed: list[Placed] = []
    layouts: list[Layout] = []

    @property
    def keys(self) -> Keys:
        return Keys(self.spans)


class Report(Message, frozen=True):
    state: dict[str, Any]


class Refused(Message, frozen=True):
    """error: a class of `errors.py`."""

    error: str
    message: str


Request = (
    Locate | Announce | Reserve | Put | Take | Ack | Commit | CloseUpdate | Begin | Drop | ProducerLost | ConsumerLost
    | Save | Introspect | Decline | Cancel
)  # fmt: skip
Reply = Located | Done | Stored | Reserved | Delivered | Report | Refused

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
        raise WireError(f"this is not protocol version {MAGIC[-1]} of the queue")
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
