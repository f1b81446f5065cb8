"""One shard of the queue without its sockets: requests in, replies out, time as an argument.

What cannot be answered now is parked, and tried again when the world it was tried in has changed: a put, an
acknowledgement, an announcement, a lost lease, a change of the clock. Nothing is tried on a timer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transfer_queue import wire
from transfer_queue.admission import Admission
from transfer_queue.clock import Clock
from transfer_queue.config import QueueConfig
from transfer_queue.core import Columns, Core, Events, Send
from transfer_queue.delivery import Delivery
from transfer_queue.errors import QueueClosed, QueueError, RowRefused
from transfer_queue.inspection import describe
from transfer_queue.lateness import Lateness
from transfer_queue.saved import save
from transfer_queue.segments import PrivateSpace
from transfer_queue.waiters import Waiter
from transfer_queue.writer import Space


class Shard:
    """space: where the rows lie; in this process's own memory unless told otherwise."""

    def __init__(
        self, config: QueueConfig, clock: Clock, send: Send, events: Events | None = None, space: Space | None = None
    ) -> None:
        self._core = core = Core(config, clock, send, events, space or PrivateSpace())
        self._admission = Admission(core)
        self._delivery = Delivery(core)
        self._lateness = Lateness(core)
        self._handlers: dict[type[wire.Message], Callable[..., wire.Message | None]] = {
            wire.Locate: self._locate,
            wire.Announce: self._admission.announce,
            wire.Reserve: self._admission.reserve,
            wire.Put: self._admission.put,
            wire.ProducerLost: self._admission.producer_lost,
            wire.ConsumerLost: self._delivery.consumer_lost,
            wire.Take: self._delivery.take,
            wire.Ack: self._delivery.ack,
            wire.Commit: self._delivery.commit,
            wire.CloseUpdate: self._delivery.close_update,
            wire.Begin: self._delivery.begin,
            wire.Drop: self._delivery.drop,
            wire.Decline: self._delivery.decline,
            wire.Cancel: self._cancel,
            wire.Save: self._save,
            wire.Introspect: self._introspect,
        }

    def handle(self, peer: bytes, request: wire.Request, columns: Columns, now: float) -> None:
        """Answers the request, or parks it."""
        self._core.now = now
        try:
            reply = self._handlers[type(request)](peer, request, columns)
        except (QueueError, ValueError) as error:
            reply = refusal(request.id, error)
        if reply is not None:
            self._core.send(peer, reply, {})
        self.settle(now)

    def settle(self, now: float) -> None:
        """Ends leases and patience that are over, and tries everyone whose world has changed, until nothing moves."""
        core = self._core
        core.now = now
        core.restore()
        core.follow_incarnation()
        core.ledger.lose_leases(now)
        is_moving = True
        while is_moving:
            is_moving = False
            self._lateness.follow()
            core.free()
            for waiter in core.waiters:
                if not waiter.asking and waiter in core.waiters and waiter.seen != core.world_of(waiter):
                    is_moving = True
                    self._try(waiter)
        for waiter in core.waiters.expired(now):
            core.give_up(waiter)

    def next_deadline(self) -> float | None:
        """When `settle` must be called though nothing has happened."""
        ends = [end for end in (self._core.waiters.next_end(), self._core.ledger.next_end()) if end is not None]
        return min(ends, default=None)

    def close(self) -> None:
        """Tells all who wait that nothing will come."""
        for waiter in self._core.waiters:
            self._core.answer(waiter, refusal(waiter.request.id, QueueClosed("the shard is closing")))
        if self._core.durability is not None:
            self._core.durability.close()
        self._core.storage.heap.close()

    def _try(self, waiter: Waiter) -> None:
        waiter.seen = self._core.world_of(waiter)
        try:
            if isinstance(waiter.request, wire.Take):
                self._delivery.try_take(waiter, waiter.request)
            else:
                self._admission.try_reserve(waiter, waiter.request)
        except (QueueError, ValueError) as error:
            self._core.answer(waiter, refusal(waiter.request.id, error))

    def _cancel(self, peer: bytes, request: wire.Cancel, columns: Columns) -> None:
        """A waiter that asks the clock is answered when the clock has answered."""
        waiter = self._core.waiters.find(peer, request.target)
        if waiter is not None:
            waiter.expires_s = self._core.now
            if not waiter.asking:
                self._core.give_up(waiter)

    def _locate(self, peer: bytes, request: wire.Locate, columns: Columns) -> wire.Message:
        """To everyone who may write here, if they can, a number of their own."""
        config, heap = self._core.config, self._core.storage.heap
        where = (heap.space.path, heap.space.token, heap.add_writer()) if heap.space.path else ("", "", 0)
        return wire.Located(request.id, config.first_group, config.group_stride, config.max_message_bytes, *where)

    def _save(self, peer: bytes, request: wire.Save, columns: Columns) -> wire.Message:
        core, config = self._core, self._core.config
        directory = Path(config.save_dir, request.directory)
        if not config.save_dir or not directory.resolve().is_relative_to(Path(config.save_dir).resolve()):
            rule = f"must be below save_dir, {config.save_dir!r}" if config.save_dir else "this shard has no save_dir"
            raise RowRefused(f"directory: {request.directory!r}; {rule}")
        try:
            rows = save(
                directory, core.ledger, core.storage, config.first_group, config.group_stride,
                with_rows=request.with_rows,
            )  # fmt: skip
        except OSError as error:
            raise RowRefused(f"directory: {request.directory!r}; {error.strerror}") from error
        return wire.Done(request.id, rows)

    def _introspect(self, peer: bytes, request: wire.Introspect, columns: Columns) -> wire.Message:
        return wire.Report(request.id, self.describe())

    def describe(self) -> dict[str, Any]:
        """Depths, ages, leases, and who waits for what. Consumes nothing."""
        core = self._core
        state = core.clock.snapshot()
        waiters = [
            {"verb": type(waiter.request).__name__.lower(), "who": _who(waiter.request), "for": waiter.waits_for}
            for waiter in core.waiters
        ]
        return describe(core.ledger, core.now) | {
            "clock": {
                "version": state.version,
                "filled": state.filled,
                "incarnation": state.incarnation,
                "is_broken": state.is_broken,
                "awaited_shards": state.awaited_shards,
                "batch_rows": core.clock.batch_rows,
                "max_staleness": core.clock.max_staleness,
                "surplus_rows": core.clock.surplus_rows,
            },
            "byte_limit": core.config.byte_limit,
            "producers": dict(core.versions),
            "waiters": waiters,
            "stored_rows": len(core.storage),
            "stored_bytes": core.storage.num_bytes,
            "segments": len(core.storage.heap),
            "segment_bytes": core.storage.heap.num_bytes,
        }


def refusal(request: int, error: Exception) -> wire.Refused:
    """A ValueError is the asker's own mistake, found by a file that knows no wire."""
    name = type(error).__name__ if isinstance(error, QueueError) else RowRefused.__name__
    return wire.Refused(request, name, str(error))


def _who(request: wire.Take | wire.Reserve) -> str:
    return request.consumer if isinstance(request, wire.Take) else request.producer
