"""The accounts of several shards on a socket: one ROUTER, in one thread. Its other end is `RemoteClock`.

A shard's address is its name and something that no other process has, so what an earlier holder of the name still has
on the way is told apart, and passed over. Owns the socket and who is heard; what requests do is `membership.py`'s.
"""

from __future__ import annotations

import logging
import os

import zmq

from transfer_queue.clock_messages import Hello, clock_state, decode_clock_request, encode_clock
from transfer_queue.config import HIGH_WATER_MARK
from transfer_queue.errors import WireError
from transfer_queue.membership import Membership
from transfer_queue.security import check_endpoint, secure_server
from transfer_queue.staleness import Accounts

MAX_MESSAGE_BYTES = 16 << 20
_log = logging.getLogger(__name__)


def shard_of(address: bytes) -> str:
    """The name in a shard's address."""
    return address.rpartition(b"/")[0].decode(errors="replace")


class ClockServer:
    """Bound when it is made, so that `endpoint` can be told before `serve`, which alone touches the accounts."""

    def __init__(self, endpoint: str, accounts: Accounts, secret: str = "", context: zmq.Context | None = None) -> None:
        check_endpoint(endpoint, secret)
        self._members = Membership(accounts)
        self._heard: dict[str, bytes] = {}
        self._socket = (context or zmq.Context.instance()).socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if secret and endpoint.startswith("tcp://"):
            secure_server(self._socket, secret)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ValueError(f"endpoint: {endpoint!r} cannot be bound: {error}") from error
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stop_fd = os.eventfd(0)

    def serve(self, stop: int | None = None) -> None:
        """Until `stop()` is called, from any thread, or the given file becomes readable."""
        stops = [self._stop_fd] if stop is None else [self._stop_fd, stop]
        poller = zmq.Poller()
        for source in (self._socket, *stops):
            poller.register(source, zmq.POLLIN)
        while not any(source in stops for source, _ in poller.poll()):
            address, *frames = self._socket.recv_multipart()
            if len(frames) == 1:
                self._handle(address, frames[0])

    def stop(self) -> None:
        """Makes `serve` return. Safe from any thread and from a signal handler."""
        os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """After `serve` has returned."""
        self._socket.close()
        os.close(self._stop_fd)

    def _handle(self, address: bytes, frame: bytes) -> None:
        try:
            request = decode_clock_request(frame)
        except WireError as error:
            _log.warning("refused a message: %s", error)
            return
        shard, accounts, lost = shard_of(address), self._members.accounts, self._members.lost_rows
        if isinstance(request, Hello):
            self._heard[shard] = address
        elif self._heard.get(shard) != address or shard not in self._members.shards:
            _log.warning("passed over a %s of shard %r, which counts as dead", type(request).__name__, shard)
            return
        before = accounts.changes
        reply = self._members.serve(shard, request)
        if self._members.lost_rows != lost:
            _log.warning("%d outstanding rows went with a shard that died", self._members.lost_rows - lost)
        if reply is not None:
            self._socket.send_multipart([address, encode_clock(reply)])
        if accounts.changes != before:
            state = encode_clock(clock_state(accounts))
            for name in self._members.shards:
                self._socket.send_multipart([self._heard[name], state])
