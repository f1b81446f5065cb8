"""The way between shards and accounts on different nodes: what is said goes in batches, as controllers send it.

A shard's node has one batch under way at a time; both ways a node says so much to a version (`controllers/pace.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from controllers.pace import Pace
from transfer_queue.clock_messages import AnyClockRequest, ClockReply, ClockState, clock_state, serve_clock_request
from transfer_queue.staleness import Accounts

Hears = Callable[[int, Sequence[ClockReply | ClockState]], None]
"""(shard, what has arrived there)."""


class Time(Protocol):
    now: float

    def at(self, seconds: float, act: Callable[[], None]) -> None: ...


class Distance:
    """messages: sent so far between nodes, in either direction; an answer is part of its question."""

    def __init__(self, time: Time, accounts: Accounts, num_shards: int, one_way_s: float, hears: Hears) -> None:
        self.messages = 0
        self._time = time
        self._accounts = accounts
        self._one_way_s = one_way_s
        self._hears = hears
        self._waiting: list[list[AnyClockRequest]] = [[] for _ in range(num_shards)]
        self._is_asking = [False] * num_shards
        self._asks_later = [False] * num_shards
        self._paces = [Pace() for _ in range(num_shards)]
        self._telling = Pace()
        self._seen_changes = accounts.changes
        self._told: tuple[int, int] | None = None
        self._is_telling_later = False

    def send(self, shard: int, request: AnyClockRequest) -> None:
        self._waiting[shard].append(request)
        self._ask_in(shard, 0.0)

    def _ask_in(self, shard: int, seconds: float) -> None:
        if not self._asks_later[shard]:
            self._asks_later[shard] = True
            self._time.at(seconds, partial(self._ask, shard))

    def _ask(self, shard: int) -> None:
        self._asks_later[shard] = False
        if self._is_asking[shard] or not self._waiting[shard]:
            return
        wait_s = self._paces[shard].wait_s(self._time.now)
        if wait_s > 0:
            self._ask_in(shard, wait_s)
            return
        batch, self._waiting[shard] = self._waiting[shard], []
        self._paces[shard].sent(self._time.now)
        self._is_asking[shard] = True
        self.messages += 1
        self._time.at(self._one_way_s, partial(self._serve, shard, batch))

    def _serve(self, shard: int, batch: Sequence[AnyClockRequest]) -> None:
        served = [serve_clock_request(self._accounts, request) for request in batch]
        replies = [reply for reply in served if reply is not None]
        self._time.at(self._one_way_s, partial(self._answer, shard, replies))
        if self._accounts.changes != self._seen_changes:
            self._seen_changes = self._accounts.changes
            self._tell()

    def _answer(self, shard: int, replies: Sequence[ClockReply]) -> None:
        self._is_asking[shard] = False
        self._hears(shard, replies)
        self._ask_in(shard, 0.0)

    def _tell(self) -> None:
        """The newest state to everybody; a version that is new, at once."""
        accounts, now = self._accounts, self._time.now
        self._telling.heard(accounts.version, now)
        wait_s = self._telling.wait_s(now)
        if self._told == (accounts.incarnation, accounts.version) and wait_s > 0:
            if not self._is_telling_later:
                self._is_telling_later = True
                self._time.at(wait_s, self._tell_later)
            return
        self._told = (accounts.incarnation, accounts.version)
        self._telling.sent(now)
        state = clock_state(accounts)
        for shard in range(len(self._waiting)):
            self.messages += 1
            self._time.at(self._one_way_s, partial(self._hear_state, shard, state))

    def _tell_later(self) -> None:
        self._is_telling_later = False
        self._tell()

    def _hear_state(self, shard: int, state: ClockState) -> None:
        self._paces[shard].heard(state.version, self._time.now)
        self._hears(shard, [state])
