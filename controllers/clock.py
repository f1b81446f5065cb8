"""A node's end of the clock: answers the shards of its node, from the accounts on node 0.

On node 0 the accounts are here, behind a lock; elsewhere requests go to node 0 in batches, one batch at a time, because
their order matters. When the accounts change in a way that may grant what was refused, all shards are told. Messages
between nodes are so many to a version, either way, so that they grow with nodes and not with rows (`pace.py`); a new
version is told at once. What the numbers mean is `transfer_queue.staleness`'s.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import zmq

from controllers.mailbox import Mailbox
from controllers.pace import Pace
from controllers.peers import Peers
from controllers.settings import QueueSettings
from transfer_queue.clock_messages import (
    ClockState,
    clock_state,
    decode_clock_answer,
    decode_clock_request,
    encode_clock,
)
from transfer_queue.clock_server import shard_of
from transfer_queue.membership import Membership
from transfer_queue.staleness import Accounts

Requests = Sequence[tuple[str, bytes]]
"""(shard, request) each."""

_SERVE = "clock/serve"
_STATE = "clock/state"
_encode_batch = msgspec.msgpack.Encoder().encode
_decode_replies = msgspec.msgpack.Decoder(list[bytes]).decode
_decode_requests = msgspec.msgpack.Decoder(list[tuple[str, bytes]]).decode


class ClockService:
    """Made before the peers start, then `start`ed. on_failure(reason) is called once, from the service's thread, if it
    cannot go on."""

    def __init__(
        self, endpoint: str, peers: Peers, settings: QueueSettings, timeout_s: float, on_failure: Callable[[str], None]
    ) -> None:
        self._endpoint = endpoint
        self._peers = peers
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._mailbox = Mailbox()
        self._shards: set[bytes] = set()
        self._waiting: list[tuple[bytes, bytes]] = []
        self._pace = Pace()
        self._untold: ClockState | None = None
        self._told = (0, 0)
        self._is_closing = False
        if peers.node == 0:
            self._lock = threading.Lock()
            self._accounts = Accounts(
                settings.batch_rows,
                settings.max_staleness,
                settings.version,
                settings.incarnation,
                awaited_shards=peers.num_nodes if settings.is_restored else 0,
                surplus_rows=settings.surplus_rows,
            )
            self._members = Membership(self._accounts)
            self._seen_changes = self._accounts.changes
            peers.register(_SERVE, self._serve_remote)
        else:
            peers.register(_STATE, self._hear_state)
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._mailbox.post(self._set_closing)
        self._thread.join()

    def _run(self) -> None:
        context = zmq.Context()
        self._router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(self._endpoint)
        try:
            self._loop()
        except Exception as error:  # whatever it is, a run without its clock must end
            self._on_failure(f"clock of node {self._peers.node}: {error!r}\n{traceback.format_exc()}")
        self._router.close()
        context.term()

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._mailbox.fd, zmq.POLLIN)
        while not self._is_closing:
            ready = dict(poller.poll(self._patience_ms()))
            if self._mailbox.fd in ready:
                self._mailbox.run()
            if self._router in ready:
                self._receive()
            if self._peers.node == 0:
                self._answer(self._serve)
            elif self._pace.wait_s(time.monotonic()) == 0:
                self._answer(self._forward)
            if self._untold is not None:
                self._tell_nodes(self._untold)

    def _patience_ms(self) -> int | None:
        """How long what is to be said to another node has to wait for more to go with it; None if nothing is."""
        if not self._waiting and self._untold is None:
            return None
        return math.ceil(1000 * self._pace.wait_s(time.monotonic()))

    def _answer(self, serve: Callable[[Requests], list[bytes]]) -> None:
        """All that waits."""
        waiting, self._waiting = self._waiting, []
        replies = serve([(shard_of(identity), request) for identity, request in waiting]) if waiting else []
        for (identity, _), reply in zip(waiting, replies, strict=True):
            if reply:
                self._router.send_multipart([identity, reply])

    def _receive(self) -> None:
        """All that has arrived: (shard, request) each."""
        while self._router.poll(0):
            identity, request = self._router.recv_multipart()
            self._waiting.append((identity, request))
            self._shards.add(identity)

    def _serve(self, requests: Requests) -> list[bytes]:
        """A reply for each, empty where there is none. On node 0, in any thread."""
        replies = []
        with self._lock:
            for shard, request in requests:
                reply = self._members.serve(shard, decode_clock_request(request))
                replies.append(b"" if reply is None else encode_clock(reply))
            if self._accounts.changes != self._seen_changes:
                self._seen_changes = self._accounts.changes
                self._mailbox.post(partial(self._tell, clock_state(self._accounts)))  # in order, hence under the lock
        return replies

    def _forward(self, requests: Requests) -> list[bytes]:
        self._pace.sent(time.monotonic())
        return _decode_replies(self._peers.call(0, _SERVE, _encode_batch(requests), self._timeout_s))

    def _serve_remote(self, _node: int, batch: bytes) -> bytes:
        return _encode_batch(self._serve(_decode_requests(batch)))

    def _hear_state(self, _node: int, state: bytes) -> bytes:
        told = decode_clock_answer(state)
        assert isinstance(told, ClockState), "nobody here has asked"
        self._mailbox.post(partial(self._tell_shards, told))
        return b""

    def _tell(self, state: ClockState) -> None:
        self._tell_shards(state)
        self._tell_nodes(state)

    def _tell_shards(self, state: ClockState) -> None:
        self._pace.heard(state.version, time.monotonic())
        for shard in self._shards:
            self._router.send_multipart([shard, encode_clock(state)])

    def _tell_nodes(self, state: ClockState) -> None:
        """The newest state is all that matters. On node 0."""
        now = time.monotonic()
        is_urgent = self._told != (state.incarnation, state.version)
        if not is_urgent and self._pace.wait_s(now) > 0:
            self._untold = state
            return
        self._untold, self._told = None, (state.incarnation, state.version)
        self._pace.sent(now)
        self._peers.broadcast(_STATE, encode_clock(state))

    def _set_closing(self) -> None:
        self._is_closing = True
