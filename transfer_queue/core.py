"""What the parts of a shard share: the ledger, the bytes, the clock, who waits, and how to tell them. No verbs here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer_queue import wire
from transfer_queue.clock import Clock
from transfer_queue.config import QueueConfig
from transfer_queue.cursor import ATTEMPTS_A_LIFE
from transfer_queue.durability import Durability
from transfer_queue.ledger import Ledger, Retired
from transfer_queue.rows import Column, RowKey
from transfer_queue.saved import Restoration
from transfer_queue.staleness import tally
from transfer_queue.states import Group
from transfer_queue.storage import Storage
from transfer_queue.updates import Updates
from transfer_queue.waiters import Waiter, Waiters
from transfer_queue.writer import Space

Columns = Mapping[str, Column]
Send = Callable[[bytes, wire.Message, Columns], bool]
"""(peer, reply, columns) -> whether the peer is still there."""
Events = Callable[[str, RowKey, dict[str, Any]], None]
"""(kind, key, fields): reserved, taken (by a training consumer), dropped, lost."""


class Core:
    """changes: counts what makes a refused claim or reservation worth another try. room: the same for reservations
    alone: memory, announcements, groups to be reserved anew. has_overdue: whether there may be groups whose deadline
    has passed though the version has not moved since they were looked for. now: seconds, as of the request in hand."""

    def __init__(self, config: QueueConfig, clock: Clock, send: Send, events: Events | None, space: Space) -> None:
        self.config = config
        self.clock = clock
        self._send = send
        self.ledger = Ledger(
            config.consumers,
            first_group=config.first_group,
            group_stride=config.group_stride,
            byte_limit=config.byte_limit,
            lease_s=config.lease_s,
            max_attempts=config.max_attempts,
            cursors=config.cursors,
            first_attempt=config.life * ATTEMPTS_A_LIFE,
        )
        self.updates = Updates(self.ledger)
        self.storage = Storage(space)
        self.waiters = Waiters()
        self.versions: dict[str, int] = {}
        self.changes = 0
        self.room = 0
        self.has_overdue = False
        self.now = 0.0
        self.incarnation = 0
        self.durability: Durability | None = None
        if config.durable_dir:
            self.durability = Durability(Path(config.durable_dir), self.ledger, self.updates, self.storage, clock)
            self.durability.recover(time.monotonic())
        self.restoration: Restoration | None = None
        if config.restore_dir and not len(self.storage):
            self.restoration = Restoration(Path(config.restore_dir), config.first_group, config.group_stride)
        self._events = events
        clock.on_change = self.note_change
        clock.enter()

    def send(self, peer: bytes, reply: wire.Message, columns: Columns) -> bool:
        """What has been promised is written down before it is said. False if the peer is gone."""
        if self.durability is not None:
            self.durability.flush()
        return self._send(peer, reply, columns)

    def note_change(self) -> None:
        self.changes += 1

    def world_of(self, waiter: Waiter) -> tuple[int, int]:
        """What the waiter's fate depends on."""
        if isinstance(waiter.request, wire.Take):
            return self.changes, self.ledger.lane(waiter.request.consumer).pushes
        return self.changes, self.room

    def answer(self, waiter: Waiter, reply: wire.Message, columns: Columns | None = None) -> bool:
        """Whether it arrived, as far as one can tell."""
        self.waiters.remove(waiter)
        return self.send(waiter.peer, reply, columns or {})

    def give_up(self, waiter: Waiter) -> None:
        """An empty answer."""
        if waiter in self.waiters:
            number = waiter.request.id
            is_take = isinstance(waiter.request, wire.Take)
            self.answer(waiter, wire.Delivered(number, [], [], [], False) if is_take else wire.Reserved(number, []))

    def retired(self, kind: str, retired: Sequence[Retired], **fields: Any) -> None:
        """The clock gets its capacity back, once, and the log its events."""
        entries = tally((group.deadline, rows) for group, rows in retired if rows)
        if entries:
            self.clock.retire(entries)
        for group, _ in retired:
            self.log(kind, group, **fields)
        if retired:
            self.room += 1

    def restore(self) -> None:
        """Once, when the clock has been heard."""
        if self.restoration is not None and self.clock.batch_rows is not None:
            restoration, self.restoration = self.restoration, None
            self.incarnation = self.clock.snapshot().incarnation
            restoration.run(self.ledger, self.storage, self.clock, self.now)
            self.note_change()

    def follow_incarnation(self) -> None:
        """If another trainer has begun: what its predecessors took and did not finish is ready again, or expires."""
        state = self.clock.snapshot()
        if state.incarnation <= self.incarnation:
            return
        self.incarnation = state.incarnation
        self.versions = {name: version for name, version in self.versions.items() if version <= state.version}
        returned, expired = self.updates.roll_back(state.incarnation, state.version)
        self.clock.unclaim(state.incarnation, tally(returned))
        self.retired("dropped", expired, reason="rolled_back")

    def free(self) -> None:
        """Lets go of the bytes of rows that are done."""
        if self.ledger.freed:
            if self.durability is not None:
                self.durability.flush()
            self.storage.free([(group.identity, bits) for group, bits in self.ledger.freed])
            self.ledger.freed.clear()
            self.room += 1

    def log(self, kind: str, group: Group, **fields: Any) -> None:
        """An event for each row of the group."""
        if self._events is not None:
            for key in group.keys(group.all):
                self._events(kind, key, fields)
