"""A live shard against nonsense."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from transfer_queue import wire
from transfer_queue.client import QueueClient
from transfer_queue.frames import pack
from transfer_queue.rows import Column
from transfer_queue.spans import Span

Make = Callable[..., Any]
SPANS = [Span("train", 0, 0, 0, 1)]


@pytest.fixture
def speak() -> Iterator[Callable[[str], zmq.Socket]]:
    sockets: list[zmq.Socket] = []

    def start(endpoint: str) -> zmq.Socket:
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        sockets.append(socket)
        return socket

    yield start
    for socket in sockets:
        socket.close()


def requests() -> list[list[bytes]]:
    """A good message of each kind."""
    headers, frames = pack({"tokens": Column.ragged([[1, 2]], "int32")})
    messages = [
        wire.Announce(1, "p", 0), wire.Reserve(2, "p", 1, 1, "train", 0, 0.0), wire.Announce(18, "p", 1 << 62),
        wire.Take(4, "train", 1, ("tokens", 2), 0, 0, 0.0), wire.Ack(5, "reward", SPANS), wire.Commit(6, 0, 0, SPANS),
        wire.Drop(7, SPANS, "tied"), wire.ProducerLost(8, "p"), wire.Introspect(9), wire.Locate(10), wire.Cancel(11, 3),
        wire.Decline(12, "reward", SPANS), wire.Reserve(14, "p", 1 << 40, 1 << 40, "train", 1 << 60, 0.0),
        *(wire.Take(14, "reward", 1, None, None, 0, wait_s) for wait_s in (0.0, float("inf"), float("nan"), -1.0)),
        wire.Take(17, "train", -1, None, 1 << 62, 1 << 62, 1.0),
        wire.Drop(19, [Span("train", -5, -5, 0, 1), Span("", 1 << 62, 1 << 62, 1 << 19, 1 << 20)], ""),
    ]  # fmt: skip
    put = [wire.encode(wire.Put(13, SPANS, headers, [0])), *(bytes(frame) for frame in frames)]
    return [[wire.encode(message)] for message in messages] + [put]


def nonsense(dice: random.Random) -> list[bytes]:
    """Noise, or a good message with a byte, a frame or an end that is wrong."""
    if dice.random() < 0.3:
        return [dice.randbytes(dice.randrange(40)) for _ in range(dice.randrange(1, 4))]
    frames = list(dice.choice(requests()))
    at = dice.randrange(len(frames))
    kind = dice.randrange(4)
    if kind == 0 and frames[at]:
        place = dice.randrange(len(frames[at]))
        frames[at] = frames[at][:place] + dice.randbytes(1) + frames[at][place + 1 :]
    elif kind == 1:
        frames[at] = frames[at][: dice.randrange(len(frames[at]) + 1)]
    elif kind == 2:
        frames.insert(at + 1, dice.randbytes(8))
    else:
        frames[at] += dice.randbytes(3)
    return frames


def test_ten_thousand_bad_messages_leave_the_shard_as_it_was(serve: Make, speak: Make) -> None:
    server = serve()
    socket = speak(server.endpoint)
    dice = random.Random(7)
    for _ in range(10_000):
        socket.send_multipart(nonsense(dice))
        while socket.poll(0):
            socket.recv_multipart()
    with QueueClient(server.endpoint) as client:
        client.producer_lost("p")
        client.announce("q", 0)
        groups = client.reserve("q", 4, 1, wait_s=5.0)
        assert groups
        assert client.put(groups[0].keys, {"note": Column.scalars([1.0], "float32")}) == 1


def test_bad_request_with_an_id_is_answered_by_a_typed_error(serve: Make, speak: Make) -> None:
    socket = speak(serve().endpoint)
    headers, _ = pack({"tokens": Column.ragged([[1, 2]], "int32")})
    for frames in (
        [wire.MAGIC + b"\x93\xa8Announce\x07\xa1p"],
        [wire.encode(wire.Put(7, SPANS, headers, [])), b"\0" * 7, b"\0" * 8],
        [wire.encode(wire.Put(7, SPANS, [], []))],
        [wire.encode(wire.Put(7, SPANS, headers, [1, 2])), b"\0" * 8, b"\0\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0"],
    ):
        socket.send_multipart(frames)
        assert socket.poll(5000), f"no answer to {frames}"
        reply = wire.decode_reply(memoryview(socket.recv_multipart()[0]))
        assert isinstance(reply, wire.Refused)
        assert (reply.id, reply.error) == (7, "WireError")


def test_message_above_the_limit_is_not_taken_in(serve: Make) -> None:
    server = serve(max_message_bytes=10_000)
    with QueueClient(server.endpoint, timeout_s=1.0) as client:
        client.announce("p", 0)
        (group,) = client.reserve("p", 1, 1)
        with pytest.raises(Exception, match=r"max_message_bytes|no answer"):
            client.put(group.keys, {"tokens": Column.ragged([[0.0] * 5000], "float32")})
    with QueueClient(server.endpoint) as client:
        assert client.put(group.keys, {"tokens": Column.ragged([[0.0] * 50], "float32")}) == 1


def test_address_in_use_is_refused_by_name(serve: Make) -> None:
    server = serve(endpoint="tcp://127.0.0.1:*")
    with pytest.raises(ValueError, match=r"endpoint: .*cannot be bound"):
        serve(endpoint=server.endpoint)
