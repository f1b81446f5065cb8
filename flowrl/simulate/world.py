"""Virtual time, the shards in it, and their clock. Knows no engine and no trainer.

A peer is a function that gets what a shard answers it. Whatever changes the accounts makes every shard look again, at
once or after the way that the news has to go.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType

from flowrl.simulate.distance import Distance
from flowrl.simulate.setting import Setting
from transfer_queue import wire
from transfer_queue.clock import Clock, DistantClock, LocalClock
from transfer_queue.clock_messages import ClockReply, ClockState
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.core import Columns
from transfer_queue.rows import RowKey
from transfer_queue.shard import Shard
from transfer_queue.staleness import Accounts

Hears = Callable[[wire.Message], None]
NEVER_S = 1e6
NO_COLUMNS: Columns = MappingProxyType({})
UNBOUNDED = 1 << 40
"""A bound that no run reaches."""


class World:
    """now: seconds since the start."""

    def __init__(self, setting: Setting, accounts: Accounts) -> None:
        self.now = 0.0
        self.accounts = accounts
        self.setting = setting
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ids = itertools.count(1)
        self._peers: dict[bytes, Hears] = {}
        self._seen_changes = accounts.changes
        self.distance = Distance(self, accounts, setting.shards, setting.clock_s, self._hear)
        self._clocks: list[Clock] = []
        self.shards: list[Shard] = []
        for at in range(setting.shards):
            clock = self._clock(at)
            self._clocks.append(clock)
            self.shards.append(Shard(_config(setting, at), clock, self._answer))

    # Time

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        """Later by that much."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def step(self) -> bool:
        """The next event; False if there is none."""
        if not self._events:
            return False
        self.now, _, act = heapq.heappop(self._events)
        act()
        return True

    # Shards

    def join(self, peer: bytes, hears: Hears) -> None:
        self._peers[peer] = hears

    def ask(
        self,
        shard: int,
        peer: bytes,
        make: Callable[..., wire.Message],
        *fields: object,
        columns: Columns = NO_COLUMNS,
    ) -> int:
        """Sends a request; its number."""
        number = next(self._ids)
        self.shards[shard].handle(peer, make(number, *fields), columns, self.now)  # type: ignore[arg-type]
        self._spread()
        return number

    def owner(self, key: RowKey) -> int:
        return key.group % self.setting.shards

    def _answer(self, peer: bytes, reply: wire.Message, columns: Columns) -> bool:
        """Peers hear when the shard has finished what it is doing."""
        self.at(0.0, partial(self._peers[peer], reply))
        return True

    # The clock

    def _clock(self, at: int) -> Clock:
        if not self.setting.clock_s:
            return LocalClock(self.accounts)
        return DistantClock(f"shard{at}", partial(self.distance.send, at))

    def _hear(self, at: int, messages: Sequence[ClockReply | ClockState]) -> None:
        clock = self._clocks[at]
        assert isinstance(clock, DistantClock), "what is at hand is not heard of"
        for message in messages:
            clock.hear(message)
            self.shards[at].settle(self.now)

    def _spread(self) -> None:
        """With the accounts at hand, others see at once what one shard has changed."""
        while not self.setting.clock_s and self.accounts.changes != self._seen_changes:
            self._seen_changes = self.accounts.changes
            for clock, shard in zip(self._clocks, self.shards, strict=True):
                clock.receive()
                shard.settle(self.now)


def _config(setting: Setting, at: int) -> QueueConfig:
    consumers = {
        "train": ConsumerSpec(columns=("tokens", "advantage"), training=True, order=setting.order),
    }
    return QueueConfig(
        endpoint="ipc://nowhere", consumers=consumers, first_group=at, group_stride=setting.shards, lease_s=NEVER_S,
        late=setting.late, max_attempts=setting.max_attempts,
    )  # fmt: skip
