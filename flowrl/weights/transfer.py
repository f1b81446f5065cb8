"""One version on its way to one node: what to ask whom, and whether what came is right. Knows no sockets.

asks (a window for each giver) -> given, verified, put in place -> is_complete
                               -> gone or late: the owner is asked instead of a fellow receiver
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowrl.weights.delta import Encoding, decode, digest
from flowrl.weights.held import gathered, scatter
from flowrl.weights.relay_wire import NO_BASE, Ask, Given
from flowrl.weights.slices import Slice, giver

WINDOW = 8
FELLOW_TIMEOUT_S = 10.0
OWNER_TIMEOUT_S = 60.0


class TransferFailed(RuntimeError):
    """A node has not given what it holds; the message names it."""


class Wanted(NamedTuple):
    giver: int
    ask: Ask


class Transfer:
    """base: a version that this node has whole, and its bytes; into: the bytes of the version to be."""

    def __init__(
        self,
        version: int,
        slices: Sequence[Slice],
        node: int,
        needy: Sequence[int],
        base: tuple[int, np.ndarray] | None,
        into: np.ndarray,
    ) -> None:
        self.version = version
        self._begun = time.monotonic()
        self.has_base = base is not None
        self.num_received_bytes = 0
        self.forwards: dict[int, tuple[Given, bytes]] = {}
        self._slices = slices
        self._base = base
        self._into = into
        self._missing = {index for index, part in enumerate(slices) if part.owner != node}
        self._asked: dict[int, tuple[int, float]] = {}
        self._is_written = False
        self._retried: set[int] = set()
        self._queues: dict[int, deque[int]] = {}
        givers = {index: giver(index, slices[index].owner, needy, node) for index in sorted(self._missing)}
        # First what others wait to be given by this node.
        for index in sorted(givers, key=lambda index: givers[index] != slices[index].owner):
            self._queues.setdefault(givers[index], deque()).append(index)

    @property
    def is_complete(self) -> bool:
        return not self._missing

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun

    def has(self, index: int) -> bool:
        return index not in self._missing

    def bytes_of(self, index: int) -> np.ndarray:
        return gathered(self._into, self._slices[index])

    def put_local(self, index: int, data: np.ndarray) -> None:
        """A slice that this node's own ranks have written."""
        scatter(self._into, self._slices[index], data)

    def asks(self) -> list[Wanted]:
        """All that may be asked now."""
        found = []
        waited_for = [of for of, _ in self._asked.values()]
        for of, queue in self._queues.items():
            for _ in range(WINDOW - waited_for.count(of)):
                if not queue:
                    break
                found.append(self._ask(of, queue.popleft(), NO_BASE if self._base is None else self._base[0]))
        return found

    def given(self, answer: Given, payload: bytes) -> list[Wanted]:
        """Puts it in its place. What does not have its digest is asked for once more, whole and from its owner."""
        if answer.index not in self._asked:
            return []  # to a transfer of this version that was given up
        part = self._slices[answer.index]
        of, _ = self._asked.pop(answer.index)
        self.num_received_bytes += len(payload)
        base = None
        if self._base is not None and answer.base == self._base[0]:
            base = gathered(self._base[1], part)
        try:
            data = decode(Encoding(answer.encoding), payload, base, part.num_bytes)
            is_right = digest(data) == answer.digest
        except ValueError:
            is_right = False
        if not is_right:
            if answer.index in self._retried:
                raise TransferFailed(f"node {of} gave slice {answer.index} of version {self.version} broken, twice")
            self._retried.add(answer.index)
            return [self._ask(part.owner, answer.index, NO_BASE)]
        scatter(self._into, part, data)
        self._missing.remove(answer.index)
        if answer.encoding != Encoding.WHOLE:
            self.forwards[answer.index] = (answer, payload)
        return []

    def gone(self, index: int) -> list[Wanted]:
        """The node that was asked has it no longer. Raises TransferFailed if that is its owner."""
        if index not in self._asked:
            return []
        of, _ = self._asked.pop(index)
        owner = self._slices[index].owner
        if of == owner:
            raise TransferFailed(f"node {of} has version {self.version} no longer")
        return [self._ask(owner, index, NO_BASE)]

    def overdue(self) -> list[Wanted]:
        """To be asked only once all of the version is written: until then nobody is late, so the first call gives
        everybody their time anew. Raises TransferFailed, naming the node, if an owner does not answer; a fellow is
        given up on."""
        now = time.monotonic()
        if not self._is_written:
            self._is_written = True
            self._asked = {index: (of, now + self._limit_s(of, index)) for index, (of, _) in self._asked.items()}
        late = [(index, of) for index, (of, due) in self._asked.items() if due < now]
        for index, of in late:
            if of == self._slices[index].owner:
                raise TransferFailed(f"node {of} has not given slice {index} of version {self.version} in time")
        return [wanted for index, _ in late for wanted in self.gone(index)]

    def _ask(self, of: int, index: int, base: int) -> Wanted:
        self._asked[index] = (of, time.monotonic() + self._limit_s(of, index))
        return Wanted(of, Ask(self.version, index, base))

    def _limit_s(self, of: int, index: int) -> float:
        return OWNER_TIMEOUT_S if of == self._slices[index].owner else FELLOW_TIMEOUT_S
