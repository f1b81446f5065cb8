"""A node's relay: pulls what the node lacks of each version from the nodes that hold it, and gives what others lack.

One thread, one loop: questions of other relays come by a ROUTER socket (`relay_giving.py`), answers to ours by a DEALER
for each of them. What it receives it writes to buffers of its own and makes visible by one rename, as a trainer rank
does where it holds everything. A version is begun while the trainer's ranks still write it, and is shown when all of it
is here and all ranks have said that they have written theirs. A newer one is begun when the one before has arrived;
those in between are never sent.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import zmq

from controllers.mailbox import Mailbox
from flowrl.weights.buffers import Buffer
from flowrl.weights.delta import goes_whole
from flowrl.weights.held import HeldVersions
from flowrl.weights.pool import BufferPool, OnPublished
from flowrl.weights.relay_giving import Giving
from flowrl.weights.relay_wire import Answer, Done, Gone, Open, Opened, decode_answer, encode
from flowrl.weights.slices import Holdings, Slice
from flowrl.weights.store import WeightStore
from flowrl.weights.transfer import Transfer, TransferFailed, Wanted
from transfer_queue.security import secure_client, secure_server

_TICK_S = 1.0
_WRITING_TICK_S = 0.001  # while somebody waits for what ranks are writing: they tell nobody how far they are
_OWN_SLICES = 16
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
    under which it is to be pinned here, or "". Everything but `run` may be called from any thread; what is told of a
    node, in its order. received_bytes: of payload, by version; sent_bytes: in all."""

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
        self._newest: dict[int, int] = {}  # by node, what its ranks have at least begun; and what they have shown
        self._whole_at: dict[int, int] = {}
        self._peers: dict[int, zmq.Socket[bytes]] = {}
        self._pool: BufferPool | None = None
        self._buffer: Buffer | None = None
        self._opening: tuple[int, set[int], float] | None = None
        self._transfer: Transfer | None = None
        self._num_transfers = 0
        self._whole_s, self._changes_s = math.inf, 0.0
        found = store.latest()
        self._last = -1 if found is None or written is store else found.version
        self._own: deque[int] = deque()
        self._done = -1
        self.received_bytes: dict[int, int] = {}
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, _LINGER_MS)
        if secret:
            secure_server(self._router, secret)
        self._router.bind(bind)
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._giving = Giving(node, self._held, self._router)

    def connect(self, node: int, endpoint: str) -> None:
        """Another node's relay is there."""
        self._mailbox.post(partial(self._connect, node, endpoint))

    def hold(self, holdings: Holdings) -> None:
        """Which node's ranks write what: the same for all versions."""
        self._mailbox.post(partial(self._hold, holdings))

    def begun(self, node: int, version: int, path: Path) -> None:
        """The ranks of a node have begun to write their part of a version, in that directory of theirs."""
        self._mailbox.post(partial(self._begun, node, version, path))

    def written(self, node: int, version: int) -> None:
        """The ranks of a node have written their part of a version, and all others theirs."""
        self._mailbox.post(partial(self._written, node, version))

    def failed(self, node: int, version: int) -> None:
        """What a node's ranks had begun to write will not be published: one rank, there or elsewhere, could not."""
        self._mailbox.post(partial(self._failed, node, version))

    @property
    def sent_bytes(self) -> int:
        return self._giving.sent_bytes

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
        ready = dict(poller.poll(int(1000 * (_WRITING_TICK_S if self._waits_for_writing else _TICK_S))))
        if self._mailbox.fd in ready:
            self._mailbox.run()
        if self._router in ready:
            identity, question = self._router.recv_multipart()
            self._giving.answer(identity, question)
        for node, peer in list(self._peers.items()):
            if peer in ready:
                answer, *payload = peer.recv_multipart()
                self._hear(node, decode_answer(answer), payload)
        self._giving.retry()
        if self._transfer is not None:
            self._take_own(self._transfer)
        if self._transfer is not None:
            self._finish_if_whole(self._transfer)
        self._look_for_newer()
        if self._opening is not None and time.monotonic() > self._opening[2]:
            raise TransferFailed(f"nodes {sorted(self._opening[1])} have not opened version {self._opening[0]} in time")

    # Receiving.

    def _look_for_newer(self) -> None:
        """Begins with the newest version that all nodes which hold a part of it have begun to write."""
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
            is_held = self._whole_at.get(node) == self._newest.get(node) == answer.version
            if self._slices[answer.index].owner == node and not is_held:
                self._give_up()  # it was begun, and may have been written over before it was shown
            else:
                self._send_asks(self._transfer.gone(answer.index))
        else:
            self._send_asks(self._transfer.given(answer, payload[0]))
            if self._transfer.has(answer.index):
                self._giving.arrived(answer.index)
            self._send_asks(self._transfer.asks())

    def _hear_opened(self, node: int, answer: Opened) -> None:
        if self._opening is None or answer.version != self._opening[0]:
            return
        version, waited_for, _ = self._opening
        if not answer.is_there:
            self._opening = None
            if self._newest.get(node, version) > version:
                self._last = version  # it cannot be had any more; word of a newer one has come meanwhile
            else:  # it was begun and is gone; or the node has yet to hear of it itself, and is asked again
                self._newest[node] = self._whole_at.get(node, -1)
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
        base = self._giving.whole if self._delta and not is_whole else None
        into = self._buffer.bytes.numpy()
        self._transfer = Transfer(version, self._slices, self._node, self._needy, base, into)
        self._giving.transfer = self._transfer
        self._own = deque(index for index, part in enumerate(self._slices) if part.owner == self._node)
        self._send_asks(self._transfer.asks())

    def _take_own(self, transfer: Transfer) -> None:
        """What this node's own ranks have written of it by now, in the order in which they do; some, and then others
        are answered."""
        for _ in range(min(_OWN_SLICES, len(self._own))):
            assert self._held is not None, "there are ranks here"
            data = self._held.bytes_of(transfer.version, self._slices[self._own[0]])
            if data is None:
                if not self._held.is_there(transfer.version):
                    self._give_up()  # begun, and written over before it was shown
                return
            transfer.put_local(self._own.popleft(), data)

    def _finish_if_whole(self, transfer: Transfer) -> None:
        is_agreed = self._is_agreed(transfer.version)
        if not transfer.is_complete or self._own:
            if is_agreed:
                self._send_asks(transfer.overdue())
            return
        if self._done != transfer.version:
            # Also before all have agreed: it may wait there for a buffer that is held for this node.
            self._done = transfer.version
            self._tell_done(transfer.version)
        if not is_agreed:
            return
        buffer = self._buffer
        assert buffer is not None and self._pool is not None
        self.received_bytes[transfer.version] = transfer.num_received_bytes
        self._note(transfer)
        self._last = transfer.version
        path = self._pool.commit(buffer, transfer.version, self._pin_of(transfer.version))
        # A version that waits for a reader may be written over; then the one before stays the base.
        if path is not None:
            self._giving.whole = (transfer.version, buffer.bytes.numpy())
        self._transfer = self._giving.transfer = self._buffer = None

    def _is_agreed(self, version: int) -> bool:
        """Whether all ranks have written it. Those of a node that have gone on to a newer one had; had they not, they
        would have said so, and the transfer had been given up."""
        assert self._holdings is not None
        return all(
            self._whole_at.get(node, -1) >= version or self._newest.get(node, -1) > version
            for node in self._holdings.ranges
        )

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
            version = self._transfer.version
            self._transfer = self._giving.transfer = self._buffer = None
            self._tell_done(version)

    def _begun(self, node: int, version: int, path: Path) -> None:
        if node == self._node and self._held is not None:
            self._held.begun(version, path)
        self._newest[node] = version

    def _written(self, node: int, version: int) -> None:
        if node == self._node and self._held is not None:
            self._held.written(version)
        self._whole_at[node] = version
        self._newest[node] = max(version, self._newest.get(node, -1))

    def _failed(self, node: int, version: int) -> None:
        if node == self._node and self._held is not None:
            self._held.failed()
        self._newest[node] = self._whole_at.get(node, -1)
        under_way = self._transfer.version if self._transfer else self._opening[0] if self._opening else -1
        if under_way == version:
            self._give_up()

    @property
    def _waits_for_writing(self) -> bool:
        return self._giving.waits_for_writing or (self._transfer is not None and bool(self._own))

    def _hold(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._slices = self._giving.slices = holdings.slices()
        self._needy = holdings.needy(self._serving)

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._router.close()
        self._context.term()
        if self._pool is not None:
            self._giving.whole = self._transfer = self._giving.transfer = None
            self._pool.close()
        if self._held is not None:
            self._held.close()
