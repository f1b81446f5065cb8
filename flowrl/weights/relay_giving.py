"""A relay's giving end: answers the relays of other nodes, out of what this node's ranks write and what has come here.

What is not here yet, but on its way, is given when it comes: slices that this node is being given itself, and those
that its ranks have not yet written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zmq

from flowrl.weights.delta import Encoding, digest
from flowrl.weights.delta import encode as encode_slice
from flowrl.weights.held import HeldVersions, gathered
from flowrl.weights.relay_wire import NO_BASE, Ask, Given, Gone, Open, Opened, decode_question, encode
from flowrl.weights.slices import Slice
from flowrl.weights.transfer import Transfer


class Giving:
    """node: this one's number; held: what its ranks write, None if it has none. sent_bytes: of payload, in all.

    To be kept up to date: slices, of every version; transfer, what is on its way here; whole, the version that came
    here last and its bytes."""

    def __init__(self, node: int, held: HeldVersions | None, router: zmq.Socket[bytes]) -> None:
        self.slices: Sequence[Slice] = ()
        self.transfer: Transfer | None = None
        self.whole: tuple[int, np.ndarray] | None = None
        self.sent_bytes = 0
        self._node = node
        self._held = held
        self._router = router
        self._parked: dict[tuple[int, int], list[tuple[bytes, Ask]]] = {}
        self._unwritten: list[tuple[bytes, Ask]] = []

    @property
    def waits_for_writing(self) -> bool:
        """Whether somebody has asked for what this node's ranks are about to write; see `retry`."""
        return bool(self._unwritten)

    def answer(self, identity: bytes, body: bytes) -> None:
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

    def arrived(self, index: int) -> None:
        """A slice of the version that is on its way here."""
        assert self.transfer is not None
        for identity, ask in self._parked.pop((self.transfer.version, index), []):
            self._forward(identity, ask)
        for version, other in [key for key in self._parked if key[0] < self.transfer.version]:
            for identity, ask in self._parked.pop((version, other)):
                self._refuse(identity, ask)

    def retry(self) -> None:
        """Gives what has been written since."""
        asked, self._unwritten = self._unwritten, []
        for identity, ask in asked:
            self._answer_ask(identity, ask)

    def _answer_ask(self, identity: bytes, ask: Ask) -> None:
        part = self.slices[ask.index]
        if self._held is None or part.owner != self._node:
            self._forward(identity, ask)
        elif not self._held.is_there(ask.version):
            self._refuse(identity, ask)
        elif (own := self._held.bytes_of(ask.version, part)) is None:
            self._unwritten.append((identity, ask))
        else:
            base = self._held.bytes_of(ask.base, part) if ask.base != NO_BASE else None
            encoding, payload = encode_slice(own, base)
            given = Given(ask.version, ask.index, encoding, ask.base if base is not None else NO_BASE, digest(own))
            self._give(identity, given, payload)

    def _forward(self, identity: bytes, ask: Ask) -> None:
        """What this node has received itself: as it came, if the asker has the same base."""
        transfer = self.transfer
        newest = transfer.version if transfer is not None else -1 if self.whole is None else self.whole[0]
        if transfer is not None and transfer.version == ask.version and transfer.has(ask.index):
            given, payload = transfer.forwards.get(ask.index, (None, b""))
            if given is not None and given.base == ask.base:
                self._give(identity, given, payload)
            else:
                self._give_whole(identity, ask, transfer.bytes_of(ask.index))
        elif self.whole is not None and self.whole[0] == ask.version:
            self._give_whole(identity, ask, gathered(self.whole[1], self.slices[ask.index]))
        elif ask.version >= newest:
            self._parked.setdefault((ask.version, ask.index), []).append((identity, ask))
        else:
            self._refuse(identity, ask)

    def _refuse(self, identity: bytes, ask: Ask) -> None:
        self._router.send_multipart([identity, encode(Gone(ask.version, ask.index))])

    def _give_whole(self, identity: bytes, ask: Ask, data: np.ndarray) -> None:
        self._give(identity, Given(ask.version, ask.index, Encoding.WHOLE, NO_BASE, digest(data)), data)

    def _give(self, identity: bytes, given: Given, payload: bytes | np.ndarray) -> None:
        """A payload that lies in a mapped version is copied: the version may be let go before it has been sent."""
        self.sent_bytes += len(payload)
        self._router.send_multipart([identity, encode(given), bytes(payload)], copy=False)
