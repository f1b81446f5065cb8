"""A shard on a socket: one thread, one ROUTER, the clock's socket, one poller. Sleeps until something happens.

Owns sockets, framing and what a bad message is worth (a typed refusal if its sender can be told, otherwise nothing);
what requests mean is in `shard.py`.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import zmq

from transfer_queue import parts, wire
from transfer_queue.clock import Clock
from transfer_queue.config import HIGH_WATER_MARK, QueueConfig
from transfer_queue.core import Events
from transfer_queue.errors import WireError
from transfer_queue.frames import pack, unpack
from transfer_queue.rows import Column
from transfer_queue.security import secure_server
from transfer_queue.segments import SharedSpace, check_room, default_root, sweep
from transfer_queue.shard import Shard, refusal

MESSAGES_A_TURN = 64
_log = logging.getLogger(__name__)


class Readable(Protocol):
    def fileno(self) -> int: ...


class QueueServer:
    """Bound when it is made, so that `endpoint` (with the port that the system chose) can be told before `serve`."""

    def __init__(
        self, config: QueueConfig, clock: Clock, events: Events | None = None, context: zmq.Context | None = None
    ) -> None:
        self._space = _make_space(config)
        self._clock = clock
        self._max_bytes = config.max_message_bytes
        try:
            self._socket = _bind(config, context or zmq.Context.instance())
        except ValueError:
            self._space.close()
            raise
        self._stop_fd = os.eventfd(0)
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.shard = Shard(config, clock, self._send, events, self._space)

    def serve(self, stop: Readable | int | None = None) -> None:
        """Until `stop()` is called, from any thread, or the given file becomes readable (the end of a pipe does)."""
        stops = [self._stop_fd]
        if stop is not None:
            stops.append(stop if isinstance(stop, int) else stop.fileno())
        poller = zmq.Poller()
        for source in (self._socket, self._clock.socket, *stops):
            if source is not None:
                poller.register(source, zmq.POLLIN)
        try:
            while not any(source in stops for source, _ in poller.poll(self._patience_ms())):
                self._turn()
        finally:
            self.shard.close()

    def stop(self) -> None:
        """Makes `serve` return. Safe from any thread and from a signal handler."""
        os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """After `serve` has returned."""
        self._socket.close()
        self._clock.close()
        os.close(self._stop_fd)

    def _turn(self) -> None:
        """Handles what has arrived, a bounded number of messages, and what has become due."""
        self._clock.receive()
        num_handled = 0
        while num_handled < MESSAGES_A_TURN and parts.has_message(self._socket):
            peer, *frames = parts.receive(self._socket, num_small=2)
            self._handle(peer.tobytes(), frames)
            num_handled += 1
        if not num_handled:  # what is handled settles everything by itself
            self.shard.settle(time.monotonic())

    def _handle(self, peer: bytes, frames: list[memoryview]) -> None:
        if not frames:
            return
        try:
            if sum(frame.nbytes for frame in frames) > self._max_bytes:
                raise WireError(f"message above max_message_bytes, {self._max_bytes}")
            request = wire.decode_request(frames[0])
            columns: Mapping[str, Column] = {}
            if isinstance(request, wire.Put) and request.placed is None:
                columns = unpack(request.columns, frames[1:], sum(map(len, request.spans)))
        except WireError as error:
            number = wire.request_id(frames[0])
            _log.warning("refused a message: %s", error)
            if number is not None:
                self._send(peer, refusal(number, error), {})
            return
        self.shard.handle(peer, request, columns, time.monotonic())

    def _send(self, peer: bytes, reply: wire.Message, columns: Mapping[str, Column]) -> bool:
        """False if the peer is gone, or reads so slowly that its high-water mark is reached."""
        frames: list[memoryview] = []
        if columns:
            assert isinstance(reply, wire.Delivered), "only a delivery brings columns"
            headers, frames = pack(columns)
            reply = wire.Delivered(reply.id, reply.spans, headers, reply.versions, reply.closed)
        try:
            parts.send(self._socket, [peer, wire.encode(reply), *frames], parts.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            _log.warning("%s for a peer that is gone: %s", type(reply).__name__, error)
            return False
        return True

    def _patience_ms(self) -> int | None:
        """Rounded up, so that what is due is due when the poll returns."""
        deadline = self.shard.next_deadline()
        return None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)


def _make_space(config: QueueConfig) -> SharedSpace:
    """A directory of this shard's own. What dead shards have left beside it goes. A durable one is there again after a
    death."""
    if config.durable_dir:
        check_room(Path(config.durable_dir), config.byte_limit, "durable_dir")
        return SharedSpace.keep(Path(config.durable_dir))
    root = Path(config.segment_dir) if config.segment_dir else default_root()
    sweep(root)
    check_room(root, config.byte_limit, "segment_dir")
    return SharedSpace.make(root / f"{os.getpid()}-{secrets.token_hex(4)}")


def _bind(config: QueueConfig, context: zmq.Context) -> zmq.Socket:
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, config.max_message_bytes)
    if config.secret and config.endpoint.startswith("tcp://"):
        secure_server(socket, config.secret)
    try:
        socket.bind(config.endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ValueError(f"endpoint: {config.endpoint!r} cannot be bound: {error}") from error
    return socket
