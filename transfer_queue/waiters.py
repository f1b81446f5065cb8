"""Requests that cannot be answered yet. Owns who waits and until when, not what for."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from transfer_queue.errors import RowRefused
from transfer_queue.wire import Reserve, Take

MAX_WAIT_S = 1e6


class Waiter:
    """One parked request. asking: the clock has been asked and has not answered. seen: the world in which the request
    was last tried; a different one is worth another try. waits_for: a few words for `introspect`."""

    __slots__ = ("asking", "expires_s", "peer", "request", "seen", "waits_for")

    def __init__(self, peer: bytes, request: Reserve | Take, expires_s: float) -> None:
        self.peer = peer
        self.request = request
        self.expires_s = expires_s
        self.asking = False
        self.seen: tuple[int, int] | None = None
        self.waits_for = ""

    @property
    def address(self) -> str:
        """Of the client, the same as long as it lives."""
        return self.peer.hex()


def patience(request: Reserve | Take) -> float:
    """Its wait_s, if that is a time one can wait."""
    if not 0 <= request.wait_s <= MAX_WAIT_S:
        raise RowRefused(f"wait_s: {request.wait_s}; must be from 0 to {MAX_WAIT_S:.0f}")
    return request.wait_s


def client_name(peer: bytes) -> str:
    """A client's address on its shard is its name and something that no other client has."""
    return peer.rpartition(b"/")[0].decode(errors="replace")


class Waiters:
    """In order of arrival; by (peer, request id); and by the end of their patience."""

    def __init__(self) -> None:
        self._all: dict[tuple[bytes, int], Waiter] = {}
        self._ends: list[tuple[float, int, Waiter]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Waiter]:
        """A snapshot: waiters may leave while it is walked."""
        return iter(list(self._all.values()))

    def __contains__(self, waiter: Waiter) -> bool:
        return self._all.get((waiter.peer, waiter.request.id)) is waiter

    def add(self, waiter: Waiter) -> None:
        self._all[waiter.peer, waiter.request.id] = waiter
        self.remind(waiter)

    def remove(self, waiter: Waiter) -> None:
        if waiter in self:
            del self._all[waiter.peer, waiter.request.id]

    def find(self, peer: bytes, request: int) -> Waiter | None:
        return self._all.get((peer, request))

    def remind(self, waiter: Waiter) -> None:
        """The clock has answered; the waiter's patience counts again."""
        heapq.heappush(self._ends, (waiter.expires_s, next(self._order), waiter))

    def expired(self, now: float) -> list[Waiter]:
        """Those whose patience ends by now. One who asks the clock is passed over, and waits for its answer."""
        ended = []
        while self._ends and self._ends[0][0] <= now:
            waiter = heapq.heappop(self._ends)[-1]
            if waiter in self and not waiter.asking:
                ended.append(waiter)
        return ended

    def next_end(self) -> float | None:
        while self._ends and (self._ends[0][-1] not in self or self._ends[0][-1].asking):
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None
