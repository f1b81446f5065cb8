"""The consumers' side of a shard: take, acknowledge, commit, drop."""

from __future__ import annotations

from collections.abc import Sequence

from transfer_queue import wire
from transfer_queue.clock import NOT_BLOCKED
from transfer_queue.core import Columns, Core
from transfer_queue.errors import RowRefused, StaleIncarnation
from transfer_queue.sampling import Basket
from transfer_queue.states import Group, Lane, Row
from transfer_queue.waiters import Waiter, patience


class Delivery:
    def __init__(self, core: Core) -> None:
        self._core = core

    def take(self, peer: bytes, request: wire.Take, columns: Columns) -> None:
        """Parks the request; `try_take` does the rest."""
        lane = self._core.ledger.lane(request.consumer)
        if lane.spec.training != (request.update is not None):
            rule = "a training take names its update" if lane.spec.training else "only a training take names an update"
            raise RowRefused(f"update: {request.update} from {request.consumer!r}; {rule}")
        if request.budget is not None and request.budget[0] not in lane.spec.columns:
            raise RowRefused(f"budget: {request.budget[0]!r}; {request.consumer!r} reads {lane.spec.columns}")
        self._basket(request)
        self._core.waiters.add(Waiter(peer, request, self._core.now + patience(request)))

    def try_take(self, waiter: Waiter, request: wire.Take) -> None:
        core = self._core
        lane = core.ledger.lane(request.consumer)
        waiter.waits_for = "rows"
        if request.update is not None:
            self._try_training_take(waiter, request, lane, request.update)
            return
        rows = core.ledger.lease(lane, self._basket(request).accepts, core.now)
        if rows and not self._deliver(waiter, request, rows, False):
            core.ledger.return_rows(lane, rows)

    def _try_training_take(self, waiter: Waiter, request: wire.Take, lane: Lane, update: int) -> None:
        core = self._core
        state = core.clock.snapshot()
        if request.incarnation < state.incarnation:
            raise StaleIncarnation(f"incarnation: {request.incarnation}; {state.incarnation} has replaced it")
        if request.incarnation > state.incarnation or state.version < update:
            waiter.waits_for = f"update {update} of incarnation {request.incarnation}"
            return
        accepts = self._basket(request).accepts
        groups = core.updates.take_undelivered(request.incarnation, update, accepts)
        if groups or state.version > update:
            self._deliver_training(waiter, request, update, groups)
            return
        groups = core.updates.nominate(lane, accepts)
        if groups:
            self._claim(waiter, request, lane, update, groups)

    def _claim(self, waiter: Waiter, request: wire.Take, lane: Lane, update: int, groups: Sequence[Group]) -> None:
        core = self._core
        waiter.waits_for = "staleness"
        waiter.asking = True

        def claimed(granted: int, blocked: int) -> None:
            waiter.asking = False
            core.updates.grant(groups[:granted], request.incarnation, update)
            for group in groups[:granted]:
                core.log("taken", group.rows, update=update)
            for retired, reason in core.updates.refuse(lane, groups[granted:]):
                core.retired("dropped", [retired], reason=reason)
            if granted:
                self._deliver_training(waiter, request, update, groups[:granted])
                return
            if core.config.late == "drop" and blocked != NOT_BLOCKED:
                core.retired("dropped", core.ledger.drop_late(lane, blocked), reason="late")
            core.waiters.remind(waiter)

        core.clock.claim(update, request.incarnation, [(g.deadline, len(g.rows)) for g in groups], claimed)

    def _deliver_training(self, waiter: Waiter, request: wire.Take, update: int, groups: Sequence[Group]) -> None:
        """Whoever asked may be gone; its rows stay in the update and are given to the next one who asks for it."""
        core = self._core
        is_full = core.clock.snapshot().version > update
        closed = is_full and not core.updates.has_undelivered(request.incarnation, update)
        rows = [row for group in groups for row in group.rows]
        if not self._deliver(waiter, request, rows, closed) and groups:
            core.updates.keep_undelivered(groups)
            core.note_change()

    def _deliver(self, waiter: Waiter, request: wire.Take, rows: Sequence[Row], closed: bool) -> bool:
        spec = self._core.ledger.lane(request.consumer).spec
        keys = [row.key for row in rows]
        columns = self._core.storage.gather(keys, spec.columns, spec.optional) if keys else {}
        versions = [row.version for row in rows]
        return self._core.answer(waiter, wire.Delivered(request.id, keys, [], versions, closed), columns)

    def _basket(self, request: wire.Take) -> Basket[Row]:
        if request.budget is None:
            return Basket(request.max_rows)
        name, budget = request.budget

        def cost(unit: Sequence[Row]) -> int:
            return self._core.storage.length_of([row.key for row in unit], name)

        return Basket(request.max_rows, budget, cost)

    def ack(self, peer: bytes, request: wire.Ack, columns: Columns) -> wire.Message:
        ledger = self._core.ledger
        return wire.Done(request.id, ledger.ack(ledger.lane(request.consumer), request.keys))

    def commit(self, peer: bytes, request: wire.Commit, columns: Columns) -> wire.Message:
        state = self._core.clock.snapshot()
        if request.incarnation < state.incarnation:
            raise StaleIncarnation(f"incarnation: {request.incarnation}; {state.incarnation} has replaced it")
        return wire.Done(request.id, self._core.updates.commit(request.keys, request.incarnation, request.update))

    def drop(self, peer: bytes, request: wire.Drop, columns: Columns) -> wire.Message:
        retired = self._core.ledger.drop(request.keys, request.reason)
        self._core.retired("dropped", retired, reason=request.reason)
        return wire.Done(request.id, sum(len(group.rows) for group, _ in retired))

    def decline(self, peer: bytes, request: wire.Decline, columns: Columns) -> None:
        """An answer reached somebody who had stopped waiting for it: what it gave away is taken back."""
        core = self._core
        rows = core.ledger.find(request.keys)
        if not request.consumer:
            groups = {id(row.group): row.group for row in rows if row.group.empty}
            core.retired("lost", core.ledger.lose(list(groups.values()), "undelivered"))
            return
        lane = core.ledger.lane(request.consumer)
        if lane.spec.training:
            core.updates.keep_undelivered(list({id(row.group): row.group for row in rows if row.group.claim}.values()))
            core.note_change()
            return
        core.ledger.return_rows(lane, rows)
