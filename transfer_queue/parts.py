"""Messages in parts on a ZeroMQ socket. Small parts are copied, because handing memory over costs more than that; large
ones are not."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

COPIED_BYTES = 64 << 10
_MORE, _HAS_MORE, NOBLOCK = int(zmq.SNDMORE), int(zmq.RCVMORE), int(zmq.NOBLOCK)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
"""As plain numbers: arithmetic with enumerations takes longer than the calls."""


def is_small(part: bytes | memoryview) -> bool:
    return (len(part) if isinstance(part, bytes) else part.nbytes) < COPIED_BYTES


def send(socket: zmq.Socket, parts: Sequence[bytes | memoryview], flags: int = 0) -> None:
    """All of them, or none: ZMQError comes before the first, if at all."""
    last = len(parts) - 1
    for at, part in enumerate(parts):
        socket.send(part, flags | _MORE if at < last else flags, copy=is_small(part))


def has_message(socket: zmq.Socket) -> bool:
    return bool(int(socket.getsockopt(_EVENTS)) & _POLLIN)


def receive(socket: zmq.Socket, num_small: int) -> list[memoryview]:
    """A message that is there. The first parts are known to be small."""
    parts = [memoryview(socket.recv(NOBLOCK))]
    while socket.getsockopt(_HAS_MORE):
        if len(parts) < num_small:
            parts.append(memoryview(socket.recv(NOBLOCK)))
        else:
            parts.append(socket.recv(NOBLOCK, copy=False).buffer)
    return parts
