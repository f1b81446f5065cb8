"""Engines that sleep: they reserve groups, let time pass, and put the rows."""

from __future__ import annotations

import random
from functools import partial

from flowrl.rollout.scheduling.surplus import is_overdue
from flowrl.simulate.outcome import Record
from flowrl.simulate.world import NEVER_S, NO_COLUMNS, World
from transfer_queue import wire
from transfer_queue.rows import Column, RowKey
from transfer_queue.spans import spans_of
from transfer_queue.wire import Reservation


class SleepingEngine:
    """life: counts its deaths; what an earlier life had begun is void."""

    def __init__(self, world: World, number: int, record: Record, dice: random.Random) -> None:
        self._world = world
        self._setting = world.setting
        self._shard = number % world.setting.shards
        self._name = f"engine{number}"
        self._peer = self._name.encode()
        self._record = record
        self._dice = dice
        self._life = 0
        self._running: dict[tuple[int, int], int] = {}
        self._deadlines: dict[tuple[int, int], int] = {}
        self._asked: int | None = None
        self._version = 0
        self._newest = 0
        self._loads_until = 0.0
        world.join(self._peer, self._hear)

    def start(self) -> None:
        self._announce(self._life)

    def publish(self, version: int) -> None:
        """New weights are there; the engine loads the newest when it notices."""
        self._newest = version
        lag = self._dice.expovariate(1 / self._setting.engine_lag_s) if self._setting.engine_lag_s else 0.0
        self._world.at(lag, partial(self._load, self._life))

    def _load(self, life: int) -> None:
        if life == self._life and self._version < self._newest:
            self._version = self._newest
            self._loads_until = self._world.now + self._setting.load_s
            self._give_up_overdue()
            self._world.at(self._setting.load_s, partial(self._announce, life))

    def _give_up_overdue(self) -> None:
        """No update can hold these any more; the shard drops them too, or has already."""
        for name in [name for name in self._running if is_overdue(self._deadlines[name], self._version)]:
            del self._running[name]

    def _announce(self, life: int) -> None:
        if life == self._life:
            self._world.ask(self._shard, self._peer, wire.Announce, self._name, self._version)
            self._reserve()

    def _reserve(self) -> None:
        """One reservation is parked at a time, for all places that are free."""
        places = self._setting.concurrency - len(self._running)
        if places and self._asked is None:
            self._asked = self._world.ask(
                self._shard, self._peer, wire.Reserve, self._name, places, self._setting.group_size, "train", 0, NEVER_S
            )

    def _hear(self, reply: wire.Message) -> None:
        if isinstance(reply, wire.Reserved) and reply.id == self._asked:
            self._asked = None
            for group in reply.groups:
                self._begin(group)
            self._reserve()

    def _begin(self, group: Reservation) -> None:
        """All rows start together, with the weights that are loaded."""
        self._running[group.group, group.attempt] = group.group_size
        self._deadlines[group.group, group.attempt] = group.deadline
        waits_s = max(0.0, self._loads_until - self._world.now)
        version = max(group.version, self._version)
        longest_s = 0.0
        for key in group.keys:
            seconds = self._setting.durations.draw(self._dice)
            longest_s = max(longest_s, seconds)
            self._record.begun(key, seconds)
            self._world.at(waits_s + seconds, partial(self._finish, self._life, key, version))
        if self._setting.failures and self._dice.random() < self._setting.failures:
            self._world.at(waits_s + self._dice.random() * longest_s, partial(self._die, self._life))

    def _finish(self, life: int, key: RowKey, version: int) -> None:
        name = (key.group, key.attempt)
        if life != self._life or name not in self._running:
            return
        self._put([key], "tokens", [version])
        self._running[name] -= 1
        if not self._running[name]:
            del self._running[name]
            del self._deadlines[name]
            self._judge(key)
            self._reserve()

    def _judge(self, last: RowKey) -> None:
        """The group is complete: it gets its advantages, unless it is filtered."""
        keys = [RowKey(last.partition, last.group, index, last.attempt) for index in range(self._setting.group_size)]
        is_tied = self._dice.random() < self._setting.filtered
        if is_tied and self._dice.random() < 0.5:
            self._world.ask(self._shard, self._peer, wire.Drop, spans_of(keys), "tied")
            return
        self._put(keys, "advantage", [])
        if is_tied:
            self._world.ask(self._shard, self._peer, wire.Drop, spans_of(keys), "tied")

    def _put(self, keys: list[RowKey], column: str, versions: list[int]) -> None:
        columns = {column: Column.empty_rows(len(keys), "int32")}
        self._world.ask(self._shard, self._peer, wire.Put, spans_of(keys), [], versions, columns=columns)

    def _die(self, life: int) -> None:
        """Its rows are lost, and whoever watches it says so."""
        if life != self._life:
            return
        self._life += 1
        self._running.clear()
        self._asked = None
        self._record.failures += 1
        self._world.ask(self._shard, self._peer, wire.ProducerLost, self._name, columns=NO_COLUMNS)
        self._world.at(self._setting.restart_s, partial(self._come_back, self._life))

    def _come_back(self, life: int) -> None:
        if life == self._life:
            self._version = self._newest
            self._announce(life)
