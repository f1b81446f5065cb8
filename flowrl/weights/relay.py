"""A node's relay: pulls what the node lacks of each version from the nodes that hold it, and gives what others lack.

One thread, one loop: questions of other relays come by a ROUTER socket, answers to ours by a DEALER for each of them.
What it receives it writes to buffers of its own and makes visible by one rename, as a trainer rank does where it holds
everything. A newer version is begun when the one before has arrived; those in between are never sent.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import zmq

from controllers.mailbox import Mailbox
from flowrl.weights.buffers import Buffer
from flowrl.weights.delta import Encoding, digest, goes_whole
from flowrl.weights.delta import encode as encode_slice
from flowrl.weights.held import HeldVersions, gathered
from flowrl.weights.pool import BufferPool, OnPublished
from flowrl.weights.relay_wire import (
    NO_BASE,
    Answer,
    Ask,
    Done,
    Given,
    Gone,
    Open,
    Opened,
    decode_answer,
    decode_question,
    encode,
)
from flowrl.weights.slices import Holdings, Slice
from flowrl.weights.store import WeightStore
from flowrl.weights.transfer import Transfer, TransferFailed, Wanted
from transfer_queue.security import secure_client, secure_server

_TICK_S = 1.0
_OPEN_TIMEOUT_S = 60.0
_LINGER_MS = 500


class _NoHeader:
    """The bytes of the header come as all others do."""

    header = b""

    def __init__(self, file_name: str, num_bytes: int) -> None:
        self.file_name = file_name
        self.num_bytes = num_bytes


class Relay:
    """node: this one's number. serving: nodes with engines or evaluation. store: what this node's engines read.
    written: where this node's trainer ranks write, None if it has none; the same as `store` if they write all of a
    version. bind: an endpoint, its port possibly `*`. secret: for CURVE, none on one host. pin_of(version): the name
    under which it is to be pinned here, or "". Everything but `run` may be called from any thread. received_bytes: of
    payload, by version; sent_bytes: in all."""

    def __init__(
        self,
        *,
        node: int,
        serving: Sequence[int],
        store: WeightStore,
        written: WeightStore | None,
        companions: Sequence[Path],
        bind: str,
        secret: str = "",
        delta: bool = True,
        anchor_every: int = 20,
        on_published: OnPublished = lambda version, path: None,
        pin_of: Callable[[int], str] = lambda version: "",
    ) -> None:
        self._node = node
        self._serving = tuple(serving)
        self._store = store
        self._companions = companions
        self._secret = secret
        self._delta = delta
        self._anchor_every = anchor_every
        self._on_published = on_published
        self._pin_of = pin_of
        self._held = None if written is None else HeldVersions(written, delta)
        self._mailbox = Mailbox()
        self._stopping = threading.Event()
        self._holdings: Holdings | None = None
        self._slices: list[Slice] = []
        self._needy: list[int] = []
        self._newest: dict[int, int] = {}
        self._peers: dict[int, zmq.Socket[bytes]] = {}
        self._pool: BufferPool | None = None
        self._buffer: Buffer | None = None
        self._whole: tuple[int, np.ndarray] | None = None
        self._opening: tuple[int, set[int], float] | None = None
        self._transfer: Transfer | None = None
        self._num_transfers = 0
        self._whole_s, self._changes_s = math.inf, 0.0
        found = store.latest()
        self._last = -1 if found is None or written is store else found.version
        self._parked: dict[tuple[int, int], list[tuple[bytes, Ask]]] = {}
        self.received_bytes: dict[int, int] = {}
        self.sent_bytes = 0
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, _LINGER_MS)
        if secret:
            secure_server(self._router, secret)
        self._router.bind(bind)
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, node: int, endpoint: str) -> None:
        """Another node's relay is there."""
        self._mailbox.post(partial(self._connect, node, endpoint))

    def hold(self, holdings: Holdings) -> None:
        """Which node's ranks write what: the same for all versions."""
        self._mailbox.post(partial(self._hold, holdings))

    def written(self, node: int, version: int) -> None:
        """The ranks of a node have written their part of a version."""
        self._mailbox.post(partial(self._newest.__setitem__, node, version))

    def stop(self) -> None:
        self._stopping.set()
        self._mailbox.post(lambda: None)

    def run(self) -> None:
        """Until `stop`. Raises TransferFailed if a node that holds bytes does not give them."""
        try:
            while not self._stopping.is_set():
                self._turn()
        finally:
            self._close()

    def _turn(self) -> None:
        poller = zmq.Poller()
        can_answer = [self._router] if self._holdings is not None else []  # others may have been told first
        for source in (self._mailbox.fd, *can_answer, *self._peers.values()):
            poller.register(source, zmq.POLLIN)
        ready = dict(poller.poll(int(_TICK_S * 1000)))
        if self._mailbox.fd in ready:
            self._mailbox.run()
        if self._router in ready:
            identity, question = self._router.recv_multipart()
            self._answer(identity, question)
        for node, peer in list(self._peers.items()):
            if peer in ready:
                answer, *payload = peer.recv_multipart()
                self._hear(node, decode_answer(answer), payload)
        self._look_for_newer()
        if self._transfer is not None:
            self._send_asks(self._transfer.overdue())
        if self._opening is not None and time.monotonic() > self._opening[2]:
            raise TransferFailed(f"nodes {sorted(self._opening[1])} have not opened version {self._opening[0]} in time")

    # Receiving.

    def _look_for_newer(self) -> None:
        """Begins with the newest version that all nodes which hold a part of it have written."""
        if self._opening or self._transfer or self._holdings is None or self._node not in self._needy:
            return
        owners = set(self._holdings.ranges)
        if not owners <= self._newest.keys() or not owners - {self._node} <= self._peers.keys():
            return
        version = min(self._newest[node] for node in owners)
        if version <= self._last:
            return
        others = owners - {self._node}
        if self._node in owners and not (self._held and self._held.hold(version, self._node)):
            return  # overtaken: a newer one is about to be announced
        self._opening = (version, set(others), time.monotonic() + _OPEN_TIMEOUT_S)
        for node in others:
            self._peers[node].send(encode(Open(version)))

    def _hear(self, node: int, answer: Answer, payload: list[bytes]) -> None:
        if isinstance(answer, Opened):
            self._hear_opened(node, answer)
        elif self._transfer is None or answer.version != self._transfer.version:
            return  # of a transfer that has been given up
        elif isinstance(answer, Gone):
            self._send_asks(self._transfer.gone(answer.index))
        else:
            self._send_asks(self._transfer.given(answer, payload[0]))
            if self._transfer.has(answer.index):
                self._serve_parked(answer.index)
            self._send_asks(self._transfer.asks())
            if self._transfer.is_complete:
                self._finish()

    def _hear_opened(self, node: int, answer: Opened) -> None:
        if self._opening is None or answer.version != self._opening[0]:
            return
        version, waited_for, _ = self._opening
        if not answer.is_there:
            self._opening = None
            if self._newest.get(node, version) > version:
                self._last = version  # it cannot be had any more; word of a newer one has come meanwhile
            else:
                self._newest.pop(node, None)  # until it announces the one that has replaced it
            self._tell_done(version)
            return
        waited_for.discard(node)
        if not waited_for:
            self._opening = None
            self._begin(version)

    def _begin(self, version: int) -> None:
        assert self._holdings is not None
        if self._pool is None:
            blank = _NoHeader(self._holdings.file_name, self._holdings.num_bytes)
            companions = [*self._companions, *self._store.beside(self._holdings.texts)]
            self._pool = BufferPool(self._store, blank, companions, self._on_published)
        self._buffer = self._pool.begin()
        is_whole = goes_whole(self._num_transfers, self._anchor_every, self._whole_s, self._changes_s)
        self._num_transfers += 1
        base = self._whole if self._delta and not is_whole else None
        into = self._buffer.bytes.numpy()
        self._transfer = Transfer(version, self._slices, self._node, self._needy, base, into)
        for index, part in enumerate(self._slices):
            if part.owner == self._node and self._held is not None:
                data = self._held.bytes_of(version, part)
                assert data is not None, "held since it was opened"
                self._transfer.put_local(index, data)
                self._serve_parked(index)
        self._send_asks(self._transfer.asks())
        if self._transfer.is_complete:
            self._finish()

    def _finish(self) -> None:
        transfer, buffer = self._transfer, self._buffer
        assert transfer is not None and buffer is not None and self._pool is not None
        self.received_bytes[transfer.version] = transfer.num_received_bytes
        self._note(transfer)
        self._last = transfer.version
        self._tell_done(transfer.version)
        path = self._pool.commit(buffer, transfer.version, self._pin_of(transfer.version))
        # A version that waits for a reader may be written over; then the one before stays the base.
        if path is not None:
            self._whole = (transfer.version, buffer.bytes.numpy())
        self._transfer = self._buffer = None

    def _note(self, transfer: Transfer) -> None:
        """How long it took, for the next to go as is faster."""
        if transfer.has_base:
            self._changes_s = transfer.seconds()
        else:
            self._whole_s = transfer.seconds()

    def _tell_done(self, version: int) -> None:
        assert self._holdings is not None
        for node in self._holdings.ranges:
            if node == self._node and self._held is not None:
                self._held.done(version, self._node)
            elif node in self._peers:
                self._peers[node].send(encode(Done(version)))

    def _send_asks(self, wanted: Sequence[Wanted]) -> None:
        for giver, ask in wanted:
            self._peers[giver].send(encode(ask))

    # Giving.

    def _answer(self, identity: bytes, body: bytes) -> None:
        question = decode_question(body)
        user = int(identity)
        if isinstance(question, Ask):
            self._answer_ask(identity, question)
        elif self._held is None:
            return
        elif isinstance(question, Open):
            is_there = self._held.hold(question.version, user)
            self._router.send_multipart([identity, encode(Opened(question.version, is_there))])
        else:
            self._held.done(question.version, user)

    def _answer_ask(self, identity: bytes, ask: Ask) -> None:
        part = self._slices[ask.index]
        own = self._held.bytes_of(ask.version, part) if self._held is not None and part.owner == self._node else None
        if own is not None:
            assert self._held is not None
            base = self._held.bytes_of(ask.base, part) if ask.base != NO_BASE else None
            encoding, payload = encode_slice(own, base)
            given = Given(ask.version, ask.index, encoding, ask.base if base is not None else NO_BASE, digest(own))
            self._give(identity, given, payload)
        elif part.owner == self._node:
            self._router.send_multipart([identity, encode(Gone(ask.version, ask.index))])
        else:
            self._forward(identity, ask)

    def _forward(self, identity: bytes, ask: Ask) -> None:
        """What this node has received itself: as it came, if the asker has the same base."""
        transfer = self._transfer
        newest = transfer.version if transfer is not None else -1 if self._whole is None else self._whole[0]
        if transfer is not None and transfer.version == ask.version and transfer.has(ask.index):
            given, payload = transfer.forwards.get(ask.index, (None, b""))
            if given is not None and given.base == ask.base:
                self._give(identity, given, payload)
            else:
                self._give_whole(identity, ask, transfer.bytes_of(ask.index))
        elif self._whole is not None and self._whole[0] == ask.version:
            part = self._slices[ask.index]
            self._give_whole(identity, ask, gathered(self._whole[1], part))
        elif ask.version >= newest:
            self._parked.setdefault((ask.version, ask.index), []).append((identity, ask))
        else:
            self._router.send_multipart([identity, encode(Gone(ask.version, ask.index))])

    def _serve_parked(self, index: int) -> None:
        assert self._transfer is not None
        for identity, ask in self._parked.pop((self._transfer.version, index), []):
            self._forward(identity, ask)
        for version, other in [key for key in self._parked if key[0] < self._transfer.version]:
            for identity, ask in self._parked.pop((version, other)):
                self._router.send_multipart([identity, encode(Gone(ask.version, ask.index))])

    def _give_whole(self, identity: bytes, ask: Ask, data: np.ndarray) -> None:
        self._give(identity, Given(ask.version, ask.index, Encoding.WHOLE, NO_BASE, digest(data)), data)

    def _give(self, identity: bytes, given: Given, payload: bytes | np.ndarray) -> None:
        """A payload that lies in a mapped version is copied: the version may be let go before it has been sent."""
        self.sent_bytes += len(payload)
        self._router.send_multipart([identity, encode(given), bytes(payload)], copy=False)

    # Links.

    def _connect(self, node: int, endpoint: str) -> None:
        """A relay that has been started anew has another endpoint, and knows nothing of what it was asked before."""
        if node == self._node:
            return
        known = self._peers.pop(node, None)
        if known is not None:
            known.close(0)
        peer = self._context.socket(zmq.DEALER)
        peer.setsockopt(zmq.LINGER, _LINGER_MS)
        peer.setsockopt(zmq.IDENTITY, str(self._node).encode())
        if self._secret:
            secure_client(peer, self._secret)
        peer.connect(endpoint)
        self._peers[node] = peer
        if known is not None and self._holdings is not None and node in self._holdings.ranges:
            self._give_up()

    def _give_up(self) -> None:
        """What is under way, if anything; the newest version is begun in its place, or the same again."""
        if self._opening is not None:
            version, self._opening = self._opening[0], None
            self._tell_done(version)
        elif self._transfer is not None:
            assert self._pool is not None and self._buffer is not None, "a transfer has a buffer"
            self._pool.abandon(self._buffer)
            version, self._transfer, self._buffer = self._transfer.version, None, None
            self._tell_done(version)

    def _hold(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._slices = holdings.slices()
        self._needy = holdings.needy(self._serving)

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._router.close()
        self._context.term()
        if self._pool is not None:
            self._whole = self._transfer = None
            self._pool.close()
        if self._held is not None:
            self._held.close()
