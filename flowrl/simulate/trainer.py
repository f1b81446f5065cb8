"""A trainer that sleeps: it takes what is ready for its update, is busy with it, and publishes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from flowrl.simulate.outcome import Record
from flowrl.simulate.world import NEVER_S, World
from transfer_queue import wire
from transfer_queue.rows import RowKey
from transfer_queue.spans import spans_of

PEER = b"trainer"


class SleepingTrainer:
    """Asks all shards at once, as a client does that has nothing at home; the first that has rows ends the wait."""

    def __init__(self, world: World, record: Record, publish: Callable[[int], None], max_rows: int) -> None:
        self.update = 0
        self.is_done = False
        self._world = world
        self._setting = world.setting
        self._record = record
        self._publish = publish
        self._max_rows = max_rows
        self._waiting: dict[int, int] = {}
        self._is_over = False
        self._closed = False
        self._keys: list[RowKey] = []
        self._got = 0
        self._held_rows = 0
        self._idle_since = 0.0
        world.join(PEER, self._hear)

    def start(self) -> None:
        self._take()

    def _take(self) -> None:
        self._is_over, self._got = False, 0
        self._idle_since = self._world.now
        for shard in range(self._setting.shards):
            fields = ("train", self._max_rows, None, self.update, 0, NEVER_S)
            self._waiting[self._world.ask(shard, PEER, wire.Take, *fields)] = shard

    def _hear(self, reply: wire.Message) -> None:
        assert not isinstance(reply, wire.Refused), f"the trainer was refused: {reply.message}"
        if not isinstance(reply, wire.Delivered):
            return
        del self._waiting[reply.id]
        self._check(reply)
        self._keys += reply.keys
        self._got += len(reply.keys)
        self._closed = self._closed or reply.closed
        if not self._is_over and (reply.keys or reply.closed):
            self._is_over = True
            for number, shard in list(self._waiting.items()):
                self._world.ask(shard, PEER, wire.Cancel, number)
        if not self._waiting:
            self._work()

    def _check(self, reply: wire.Delivered) -> None:
        sizes = Counter((key.group, key.attempt) for key in reply.keys)
        assert all(size == self._setting.group_size for size in sizes.values()), f"a group was split: {reply.keys}"
        for key, version in zip(reply.keys, reply.versions, strict=True):
            self._record.trained(key, self.update - version)

    def _work(self) -> None:
        self._record.idle_s += self._world.now - self._idle_since
        self._held_rows += self._got
        rest = 0 if self._closed else self._held_rows % self._setting.micro_batch_rows
        busy_s = (self._held_rows - rest) * self._setting.row_train_s
        self._held_rows = rest
        if not self._closed:
            self._world.at(busy_s, self._take)
            return
        self._world.at(busy_s + self._setting.step_s, self._end_update)

    def _end_update(self) -> None:
        size = self._setting.batch_rows
        assert len(self._keys) == size, f"update {self.update} has {len(self._keys)} rows; its size is {size}"
        for shard in range(self._setting.shards):
            keys = [key for key in self._keys if self._world.owner(key) == shard]
            if keys:
                self._world.ask(shard, PEER, wire.Commit, 0, self.update, spans_of(keys))
        self._keys = []
        self._closed = False
        self.update += 1
        self._record.update_ends.append(self._world.now)
        if self.update == self._setting.updates:
            self.is_done = True
            return
        self._world.at(self._setting.publish_s, partial(self._publish, self.update))
        self._take()
