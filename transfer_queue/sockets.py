"""A client's sockets: how they are made, and what verbs look like on them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import zmq

from transfer_queue import wire
from transfer_queue.config import HIGH_WATER_MARK
from transfer_queue.errors import QueueTimeout
from transfer_queue.frames import pack, unpack
from transfer_queue.rows import Column
from transfer_queue.security import check_endpoint, secure_client
from transfer_queue.steps import Answer, Send
from transfer_queue.verbs import Verbs

DEFAULT_WAIT_S = 10.0
DEFAULT_TIMEOUT_S = 30.0
MAX_NAME = 60


def frames_of(step: Send) -> list[Any]:
    """What a step puts on the socket."""
    request = step.request
    if not isinstance(request, wire.Put) or request.placed is not None:
        return [wire.encode(request)]
    headers, frames = pack(step.columns)
    return [wire.encode(wire.Put(request.id, request.spans, headers, request.versions)), *frames]


def answer_of(frames: Sequence[memoryview]) -> Answer:
    reply = wire.decode_reply(frames[0])
    columns: dict[str, Column] = {}
    if isinstance(reply, wire.Delivered) and reply.spans and not reply.placed:
        columns = unpack(reply.columns, frames[1:], sum(map(len, reply.spans)))
    return Answer(reply.id, reply, columns)


def timeout_of(verbs: Verbs, unheard: Sequence[Send], timeout_s: float) -> QueueTimeout:
    names = ", ".join(f"{verbs.endpoints[step.endpoint]} ({type(step.request).__name__.lower()})" for step in unheard)
    return QueueTimeout(f"no answer from {names} in {timeout_s:.1f} s")


def connect(context: Any, endpoints: Sequence[str], secret: str, name: str) -> list[Any]:
    """Each with an address that begins with the client's name and is nobody else's."""
    if len(name) > MAX_NAME:
        raise ValueError(f"name: {name!r}; at most {MAX_NAME} characters")
    for endpoint in endpoints:
        check_endpoint(endpoint, secret)
    sockets = []
    for endpoint in endpoints:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTING_ID, f"{name}/{secrets.token_hex(8)}".encode())
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        if secret and endpoint.startswith("tcp://"):
            secure_client(socket, secret)
        socket.connect(endpoint)
        sockets.append(socket)
    return sockets
